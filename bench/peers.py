#!/usr/bin/env python3
"""The service beside other memory systems: the same turns, the same questions, the same weights, one run.

    python bench/peers.py [FILE] [--systems mem0,chroma,...] [--repeats N] [--turns N] [--questions N]
                          [--threads N] [--json FILE] [--markdown]

FILE is in the LoCoMo format (examples/locomo.py). Each system runs in a process and a virtual environment of its own
(data/peers/NAME, made from bench/peers/requirements-NAME.txt when it is not there; PIP_ARGS: further options of pip),
with all-MiniLM-L6-v2 from the same directory as the service. A repetition takes the systems one after the other, each
with empty stores; tables give medians of the repetitions, with the extremes, and ratios are medians of the ratios
within a repetition. `--threads` sets OMP_NUM_THREADS for the peers: where other programs use the cores, the threads of
a product wait for each other. Measured of each:

- add, 1 client and 8: until the time or the turns are up. `acknowledged` counts what the system said it keeps, by the
  time until then; `searchable` counts the same by the time until all of it has its vector;
- batch: all turns, 100 in a call, in the order of the conversations, into a new store, on which the rest is measured;
- search, 1 client and 8: each question once, the half of them each, so no answer can come from a cache; recall@10 is
  the share of a question's evidence among the first ten results, within its own conversation, its mean over all;
- asked again: 8 clients ask a few of those questions over and over;
- resident memory of the system's processes afterwards, its model included.

Exit status: 0 measured, 1 a system failed, 2 bad arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))
sys.path.append(str(PROJECT / "examples"))

import locomo  # noqa: E402
import peers_report  # noqa: E402
import report  # noqa: E402
from peers_process import OURS, PEERS, PeerFailure, System, environment  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn  # noqa: E402
from run import INTERRUPTS, WIDTH, interrupt  # noqa: E402
from servers import data_folder, file_system  # noqa: E402

from memory_system.embedding.model import resolve  # noqa: E402
from memory_system.settings import EmbeddingSettings  # noqa: E402

CLIENTS: Final = (1, 8)
BATCH: Final = 100
K: Final = 10
AGAIN: Final = 20
STEPS: Final = 7


@dataclass(frozen=True, slots=True)
class Task:
    """What every system is given: items to keep, and questions with their user and the keys of their evidence."""

    items: tuple[dict[str, Any], ...]
    questions: tuple[tuple[str, str, tuple[str, ...]], ...]


@dataclass
class Bench:
    """One run: its systems by name, and what was measured of each in each repetition."""

    task: Task
    options: argparse.Namespace
    folder: Path
    model: str
    progress: Progress
    measured: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    facts: dict[str, dict[str, str]] = field(default_factory=dict)

    def run(self, pythons: dict[str, Path]) -> None:
        self._task = self.progress.add_task("starting", total=STEPS * self.options.repeats * len(pythons))
        for repeat in range(self.options.repeats):
            for name, python in pythons.items():
                with System(name, python, self.model, self.folder, self.options.threads) as system:
                    found = self._measure(system, repeat)
                self.measured.setdefault(name, []).append(found)

    def _measure(self, system: System, repeat: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        self._say(f"{system.name}: opening")
        opened = system.ask("open", folder=str(self.folder / f"{system.name}-{repeat}-adds"))
        self.facts[system.name] = opened["facts"]
        items = list(self.task.items)
        most = min(self.options.adds, len(items) // len(CLIENTS))  # something is left for each of them
        for clients in CLIENTS:
            self._say(f"{system.name}: adds of {clients} clients")
            answer = system.ask("add", clients=clients, items=items[:most], seconds=self.options.seconds)
            items = items[answer["items"] :]
            found[f"add {clients}"] = _add_figures(answer)
        system.ask("close")
        system.ask("open", folder=str(self.folder / f"{system.name}-{repeat}-all"))
        self._say(f"{system.name}: {len(self.task.items)} turns in batches")
        found["batch"] = _add_figures(system.ask("batch", items=list(self.task.items), size=BATCH))
        self._search(system, found)
        found["resident_mb"] = system.ask("memory")["bytes"] / 1e6
        system.ask("close")
        return found

    def _search(self, system: System, found: dict[str, Any]) -> None:
        questions, recalls = self.task.questions, []
        for clients, part in zip(CLIENTS, (questions[::2], questions[1::2]), strict=True):
            self._say(f"{system.name}: searches of {clients} clients")
            answer = system.ask("search", clients=clients, questions=[list(one[:2]) for one in part], k=K)
            recalls += [
                len(set(evidence) & set(keys)) / len(evidence)
                for (_, _, evidence), keys in zip(part, answer["given"], strict=True)
            ]
            found[f"search {clients}"] = _figures(answer)
        found["recall"] = sum(recalls) / len(recalls)
        self._say(f"{system.name}: questions asked again")
        again = [list(one[:2]) for one in questions[:AGAIN]] * 10_000
        seconds = self.options.seconds
        answer = system.ask("search", clients=CLIENTS[-1], questions=again, k=K, seconds=seconds)
        found["search again"] = _figures(answer)

    def _say(self, text: str) -> None:
        self.progress.update(self._task, description=text, advance=0 if text.endswith("opening") else 1)


def _figures(answer: dict[str, Any]) -> dict[str, float]:
    waits = sorted(answer["waits_ms"])
    return {
        "per_s": len(waits) / answer["elapsed_s"],
        "p50_ms": waits[len(waits) // 2],
        "p95_ms": waits[min(len(waits) - 1, int(0.95 * len(waits)))],
    }


def _add_figures(answer: dict[str, Any]) -> dict[str, float]:
    items = answer["items"]
    rates = {"per_s": items / answer["elapsed_s"], "searchable_per_s": items / answer["settled_s"]}
    return {**_figures(answer), **rates, "items": items}


def task(conversations: Sequence[locomo.Conversation], turns: int | None, questions: int | None) -> Task:
    """The first `turns` turns of all, and questions of which all evidence is among them, spread over the file."""
    items = [
        {
            "key": f"{each.sample_id}/{turn.dia_id}",
            "text": turn.content,
            "user": each.sample_id,
            "session": str(session.number),
            "occurred_at": turn.occurred_at,
        }
        for each in conversations
        for session in each.sessions
        for turn in session.turns
    ][:turns]
    known = {item["key"] for item in items}
    asked = []
    for each in conversations:
        for question in each.questions:
            evidence = tuple(f"{each.sample_id}/{dia_id}" for dia_id in question.evidence)
            if known.issuperset(evidence):
                asked.append((question.text, each.sample_id, evidence))
    step = 1 if questions is None else max(1, len(asked) // questions)
    return Task(tuple(items), tuple(asked[::step][:questions]))


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the service beside other memory systems.")
    parser.add_argument("file", type=Path, nargs="?", help="conversations in the LoCoMo format")
    parser.add_argument("--systems", default=",".join(PEERS), metavar="NAME,...", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="repetitions, interleaved (%(default)s)")
    parser.add_argument("--adds", type=int, default=1000, metavar="N", help="at most so many of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="of adds, of repeats (%(default)s)")
    parser.add_argument("--turns", type=int, metavar="N", help="only the first of the file (default: all)")
    parser.add_argument("--questions", type=int, metavar="N", help="only so many (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the peers' products (default: their own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--markdown", action="store_true", help="print the tables as Markdown too")
    options = parser.parse_args(given)
    options.systems = [name.strip() for name in options.systems.split(",") if name.strip()]
    if unknown := set(options.systems) - set(PEERS):
        parser.error(f"there is no system {', '.join(sorted(unknown))}; there are {', '.join(PEERS)}")
    if min(options.repeats, options.adds, options.turns or 1, options.questions or 2) < 1 or options.seconds <= 0.0:
        parser.error("all numbers have to be above 0")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    try:
        path = options.file or locomo.default_file()
        given_task = task(locomo.load(path), options.turns, options.questions)
        if min(len(given_task.items), len(given_task.questions)) < len(CLIENTS):
            raise locomo.BadFile(f"{path}: it has too few turns, or questions with evidence")
        return measure(given_task, options, console)
    except (locomo.BadFile, PeerFailure) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2 if isinstance(error, locomo.BadFile) else 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


def measure(given_task: Task, options: argparse.Namespace, console: Console) -> int:
    began_s = time.monotonic()
    pythons = {OURS: Path(sys.executable)}
    for name in options.systems:
        pythons[name] = environment(name, lambda text: console.print(text, style="dim"))
    model = resolve(EmbeddingSettings().model)
    if model.directory is None:
        raise PeerFailure("the weights are not installed: the peers need them in a directory")
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with data_folder() as folder:
        machine = report.machine(file_system(folder))
        console.print(report.machine_line(machine), style="dim")
        with Progress(*columns, console=console, transient=True) as progress:
            bench = Bench(given_task, options, folder, str(model.directory), progress)
            bench.run(pythons)
        machine["load_after"] = report.load_average()
    figures = {
        "kind": "peers",
        "machine": machine,
        "turns": len(given_task.items),
        "questions": len(given_task.questions),
        "versions": {name: _version(name) for name in options.systems},
        "facts": bench.facts,
        "measured": bench.measured,
        "ratios": peers_report.ratios(bench.measured),
    }
    show: Callable[..., None] = peers_report.show
    show(console, figures, markdown=options.markdown)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    console.print(f"took {time.monotonic() - began_s:.0f} s", style="dim")
    return 0


def _version(name: str) -> str:
    """The first pin after torch: what the environment is for."""
    lines = (PROJECT / "bench" / "peers" / f"requirements-{name}.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if "==" in line and not line.startswith(("#", "torch"))]
    return pins[0]


if __name__ == "__main__":
    sys.exit(main())
