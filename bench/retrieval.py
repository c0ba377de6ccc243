#!/usr/bin/env python3
"""How much of what a question needs the searches find, and how long a caller waits.

    python bench/retrieval.py [FILE] [--conversations N|all] [--flat] [--set SECTION.KEY=VALUE ...]

FILE is in the LoCoMo format (examples/locomo.py). A service of its own, with the real model, holds all conversations in
one namespace: a memory for each turn, a session as its parent, in order. Each question is asked in the modes dense,
keyword and hybrid (the default), and filtered by its conversation. With `--flat` no turn has a parent: so the searches
know of no conversation. Evidence are the turns that hold the answer:

- recall@k: the share of a question's evidence among the first k results, its mean over the questions;
- hit@10: the share of questions of which any evidence is among the first ten;
- MRR: the mean of 1 / the place of the first evidence among the first twenty, 0 when it is not there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "examples")]

import locomo  # noqa: E402
import store  # noqa: E402
from locomo import Conversation, Question  # noqa: E402
from report import Report  # noqa: E402
from rich import box  # noqa: E402
from rich.table import Table  # noqa: E402
from servers import ServerFailure, data_folder, start_service, wait_for_embedder  # noqa: E402

from memory_client import MemoryClient  # noqa: E402
from memory_system.errors import MemorySystemError  # noqa: E402

MODES: Final = ("dense", "keyword", "hybrid")
CATEGORIES: Final = {1: "several turns", 2: "time", 3: "world knowledge", 4: "one turn", 5: "misleading"}
RESULTS: Final = 20
CALL_MS: Final = 600_000
FIGURES: Final = ("recall@5", "recall@10", "recall@20", "hit@10", "MRR")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question in one mode: the places (from 0) where its evidence was found, and how long that took."""

    mode: str
    sample_id: str
    question: Question
    places: tuple[int, ...]
    waited_ms: float
    degraded: bool

    def recall(self, k: int) -> float:
        return sum(place < k for place in self.places) / len(self.question.evidence)


def main() -> int:
    options = _options()
    report = Report()
    try:
        path = options.file or locomo.default_file()
        conversations = locomo.load(path)[: options.conversations]
        with data_folder() as folder:
            settings = dict(pair.split("=", 1) for pair in options.set)
            with start_service(folder, "service", "sentence-transformers", settings=settings) as server:
                wait_for_embedder(server)
                with MemoryClient(
                    server.endpoint, namespace="bench", timeout_ms=CALL_MS, raise_on_error=True
                ) as client:
                    keep = _store_flat if options.flat else store.store_all
                    keep(client, conversations, report)
                    return _measure(client, conversations, report)
    except (locomo.BadFile, ServerFailure, MemorySystemError) as error:
        return report.fail(str(error), 2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what the searches find.")
    parser.add_argument("file", type=Path, nargs="?", help="conversations in the LoCoMo format")
    parser.add_argument("--conversations", type=_number, default=None, metavar="N|all", help="how many of the file")
    parser.add_argument("--flat", action="store_true", help="store the turns without parents")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting to try")
    options = parser.parse_args()
    if any("=" not in pair for pair in options.set):
        parser.error("--set takes SECTION.KEY=VALUE")
    return options


def _number(text: str) -> int | None:
    return None if text == "all" else int(text)


def _store_flat(client: MemoryClient, conversations: list[Conversation], report: Report) -> None:
    turns = [
        {"content": turn.content, "user_id": each.sample_id, "metadata": {"dia_id": turn.dia_id}}
        for each in conversations
        for session in each.sessions
        for turn in session.turns
    ]
    with report.bar("storing turns", len(turns)) as advance:
        for start in range(0, len(turns), store.BATCH):
            advance(client.batch_add_memories(turns[start : start + store.BATCH])["count"])


def _measure(client: MemoryClient, conversations: list[Conversation], report: Report) -> int:
    store.wait_for_vectors(client, report)
    questions = [(each.sample_id, question) for each in conversations for question in each.questions]
    if not questions:
        return report.fail("the file has no question with evidence", 2)
    with report.bar("asking", len(MODES) * len(questions)) as advance:
        asked = list(_ask_all(client, questions, advance))
    _show(asked, report)
    degraded = sum(answer.degraded for answer in asked)
    return report.fail(f"{degraded} answers were degraded", 1) if degraded else 0


def _ask_all(
    client: MemoryClient, questions: list[tuple[str, Question]], advance: Callable[..., None]
) -> Iterator[Asked]:
    for mode in MODES:
        for sample_id, question in questions:
            began = time.perf_counter()
            reply = client.semantic_search(
                question.text, k=RESULTS, mode=mode, filters={"user_id": sample_id}, touch=False
            )
            waited_ms = 1000.0 * (time.perf_counter() - began)
            found = [result["metadata"].get("dia_id") for result in reply["results"]]
            places = tuple(found.index(dia_id) for dia_id in question.evidence if dia_id in found)
            advance(1)
            yield Asked(mode, sample_id, question, places, waited_ms, bool(reply["degraded"]))


def figures(asked: list[Asked]) -> list[float]:
    """The values of FIGURES."""
    first = [min(answer.places, default=RESULTS) for answer in asked]
    return [
        *(statistics.mean(answer.recall(k) for answer in asked) for k in (5, 10, 20)),
        statistics.mean(place < 10 for place in first),
        statistics.mean(1.0 / (place + 1) if place < RESULTS else 0.0 for place in first),
    ]


def _show(asked: list[Asked], report: Report) -> None:
    table = Table("mode", "questions", "", *FIGURES, "p50 ms", "p95 ms", box=box.MARKDOWN)
    for mode in MODES:
        answers = [answer for answer in asked if answer.mode == mode]
        groups = [("all", answers)]
        for number in sorted({answer.question.category or 0 for answer in answers} - {0}):
            some = [answer for answer in answers if answer.question.category == number]
            groups.append((f"{number} {CATEGORIES.get(number, '')}".strip(), some))
        for name in dict.fromkeys(answer.sample_id for answer in answers):
            groups.append((name, [answer for answer in answers if answer.sample_id == name]))
        for title, some in groups:
            waits = sorted(answer.waited_ms for answer in some)
            p95 = waits[min(len(waits) - 1, int(0.95 * len(waits)))]
            cells = [f"{value:.3f}" for value in figures(some)]
            table.add_row(mode, title, str(len(some)), *cells, f"{statistics.median(waits):.1f}", f"{p95:.1f}")
    report.console.print(table)


if __name__ == "__main__":
    sys.exit(main())
