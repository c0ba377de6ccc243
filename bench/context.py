#!/usr/bin/env python3
"""Measures the contexts that the context manager builds of long conversations, and what its cache is worth.

    python bench/context.py FILE [--only SAMPLE_ID,...] [--budget TOKENS] [--questions N] [--json FILE]

FILE has conversations in the LoCoMo format (examples/locomo.py), each question with the turns that hold its answer. A
service and two agents are started; every conversation goes through the session memory turn by turn, and every question
to the context manager, within the budget, by each method. Reported is how much of the evidence is in the context:

    recall     mean over the questions of the share of their evidence turns that are in it
    complete   the share of the questions all of whose evidence is in it

Then a trace of questions, some asked far more often than others, with a turn said now and then in between, is played to
a context manager with its cache and to one without. Exit status: 0 measured, 1 a program or a request failed, 2 bad
arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parent.parent / "examples"))

import report
import servers
from locomo import BadFile, Conversation, Question, load
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from memory_client import MemoryClient
from memory_system.errors import MemorySystemError

METHODS: Final = ("dense", "hybrid", "full")
BUDGET: Final = 1000
# The trace: so many requests for so many questions, the k-th asked 1/k as often as the first; a turn after so many.
REQUESTS: Final = 400
TRACED: Final = 60
SAID_EVERY: Final = 20
VECTORS_S: Final = 1800.0
_CALL_MS: Final = 30_000.0
_WIDTH: Final = 110


@dataclass(frozen=True, slots=True)
class Outcome:
    """One question by one method. `waited_ms`: what its caller waited."""

    sample_id: str
    method: str
    recall: float
    items: int
    tokens: int
    waited_ms: float


@dataclass(frozen=True, slots=True)
class Traced:
    """The trace, played to one context manager."""

    cache: str
    hit_rate: float
    p50_ms: float
    p95_ms: float
    mean_ms: float
    hit_p50_ms: float | None


class Mesh:
    """The programs under measurement."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self.service = stack.enter_context(servers.start_service(folder, "service", "sentence-transformers"))
        self.sessions = self._agent("session_memory")
        self.contexts = self._agent("context_manager")

    def uncached(self) -> MemoryClient:
        """A context manager that keeps nothing."""
        return self._agent("context_manager", {"cache_entries": "0"})

    def _agent(self, agent: str, settings: dict[str, str] | None = None) -> MemoryClient:
        server = self._stack.enter_context(servers.start_agent(self._folder, agent, self.service, settings))
        client = MemoryClient(server.endpoint, timeout_ms=_CALL_MS, raise_on_error=True, agent_id="bench", error_bus="")
        return self._stack.enter_context(client)


def tell(sessions: MemoryClient, conversation: Conversation) -> Iterator[None]:
    """Have the session memory told a conversation, turn by turn."""
    for session in conversation.sessions:
        opened = sessions.call("create_session", {"user_id": conversation.sample_id})
        for turn in session.turns:
            data = {"role": turn.speaker, "content": turn.text, "occurred_at": turn.occurred_at}
            about = {"session_id": opened["session_id"], "metadata": {"dia_id": turn.dia_id}}
            sessions.call("add_interaction", data | about)
            yield


def wait_for_vectors(service: servers.Server) -> None:
    end_s = time.monotonic() + VECTORS_S
    with servers.Asker(service.endpoint) as asker:
        while asker.ask("stats", {}, namespace="default")["pending"]:
            if time.monotonic() > end_s:
                raise servers.ServerFailure(f"vectors are still missing after {VECTORS_S:.0f} s")
            time.sleep(0.2)


def ask(contexts: MemoryClient, conversation: Conversation, question: Question, method: str, budget: int) -> Outcome:
    began_s = time.monotonic()
    reply = contexts.call("get_context", asked(conversation, question, budget) | {"method": method})
    waited_ms = (time.monotonic() - began_s) * 1000.0
    if reply["degraded"] or reply["pending"] or reply["tokens"] > budget:
        how = {name: reply[name] for name in ("degraded", "pending", "tokens")}
        raise servers.ServerFailure(f"a context is not what was asked for: {question.text!r}, {how}")
    there = {result["metadata"].get("dia_id") for result in reply["results"]}
    recall = sum(dia_id in there for dia_id in question.evidence) / len(question.evidence)
    return Outcome(conversation.sample_id, method, recall, reply["count"], reply["tokens"], waited_ms)


def asked(conversation: Conversation, question: Question, budget: int) -> dict[str, Any]:
    return {"query": question.text, "user_id": conversation.sample_id, "token_budget": budget, "max_items": 200}


def trace(conversations: Sequence[Conversation], budget: int, seed: int) -> list[dict[str, Any] | None]:
    """The requests of a trace; None: somebody says something."""
    rng = random.Random(seed)
    everything = [asked(each, question, budget) for each in conversations for question in each.questions]
    chosen = rng.sample(everything, min(TRACED, len(everything)))
    weights = [1.0 / rank for rank in range(1, len(chosen) + 1)]
    found: list[dict[str, Any] | None] = []
    for number, request in enumerate(rng.choices(chosen, weights, k=REQUESTS), 1):
        found.append(request)
        if number % SAID_EVERY == 0:
            found.append(None)
    return found


def play(name: str, contexts: MemoryClient, mesh: Mesh, requests: Sequence[dict[str, Any] | None], step: Any) -> Traced:
    waited_ms: list[float] = []
    hits_ms: list[float] = []
    session_id = mesh.sessions.call("create_session", {"user_id": "somebody"})["session_id"]
    for request in requests:
        if request is None:
            said = {"session_id": session_id, "role": "user", "content": f"It is {len(waited_ms)} o'clock."}
            mesh.sessions.call("add_interaction", said)
            wait_for_vectors(mesh.service)
            continue
        began_s = time.monotonic()
        reply = contexts.call("get_context", request)
        waited_ms.append((time.monotonic() - began_s) * 1000.0)
        if reply["cached"]:
            hits_ms.append(waited_ms[-1])
        step()
    ordered = sorted(waited_ms)
    return Traced(
        name,
        len(hits_ms) / len(waited_ms),
        statistics.median(ordered),
        ordered[int(0.95 * len(ordered))],
        statistics.mean(ordered),
        statistics.median(hits_ms) if hits_ms else None,
    )


def show(console: Console, outcomes: list[Outcome], traced: list[Traced], budget: int) -> None:
    table = Table(title=f"evidence in a context of {budget} tokens", title_justify="left")
    for column in ("method", "questions", "recall", "complete", "items", "tokens", "p50 ms", "p95 ms"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for method in METHODS:
        rows = [each for each in outcomes if each.method == method]
        waits = sorted(each.waited_ms for each in rows)
        table.add_row(
            method,
            str(len(rows)),
            f"{statistics.mean(each.recall for each in rows):.3f}",
            f"{statistics.mean(each.recall == 1.0 for each in rows):.3f}",
            f"{statistics.mean(each.items for each in rows):.1f}",
            f"{statistics.mean(each.tokens for each in rows):.0f}",
            f"{statistics.median(waits):.1f}",
            f"{waits[int(0.95 * len(waits))]:.1f}",
        )
    console.print(table)
    table = Table(title=f"{REQUESTS} requests, a turn said after every {SAID_EVERY}", title_justify="left")
    for column in ("cache", "hit rate", "p50 ms", "p95 ms", "mean ms", "p50 ms of hits"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for each in traced:
        hit = "-" if each.hit_p50_ms is None else f"{each.hit_p50_ms:.1f}"
        figures = (f"{each.p50_ms:.1f}", f"{each.p95_ms:.1f}", f"{each.mean_ms:.1f}", hit)
        table.add_row(each.cache, f"{each.hit_rate:.2f}", *figures)
    console.print(table)


def measure(conversations: list[Conversation], options: argparse.Namespace) -> tuple[list[Outcome], list[Traced]]:
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with servers.data_folder() as folder, contextlib.ExitStack() as stack:
        mesh = Mesh(folder, stack)
        servers.wait_for_embedder(mesh.service)
        progress = stack.enter_context(Progress(*columns, console=Console(stderr=True)))
        telling = progress.add_task("turns told", total=sum(each.turns for each in conversations))
        for conversation in conversations:
            for _ in tell(mesh.sessions, conversation):
                progress.advance(telling)
        wait_for_vectors(mesh.service)
        pairs = [(each, question) for each in conversations for question in each.questions]
        pairs = pairs[: options.questions or len(pairs)]
        asking = progress.add_task("questions", total=len(pairs) * len(METHODS))
        outcomes = []
        for conversation, question in pairs:
            for method in METHODS:
                outcomes.append(ask(mesh.contexts, conversation, question, method, options.budget))
                progress.advance(asking)
        requests = trace(conversations, options.budget, seed=1)
        playing = progress.add_task("requests of the trace", total=2 * REQUESTS)
        clients = (("kept", mesh.contexts), ("off", mesh.uncached()))
        traced = [play(name, client, mesh, requests, lambda: progress.advance(playing)) for name, client in clients]
    return outcomes, traced


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measures the contexts that the context manager builds.")
    parser.add_argument("file", type=Path, help="conversations in the LoCoMo format")
    parser.add_argument("--only", default="", metavar="SAMPLE_ID,...", help="only these conversations")
    parser.add_argument("--budget", type=int, default=BUDGET, metavar="TOKENS", help="tokens of a context")
    parser.add_argument("--questions", type=int, default=0, metavar="N", help="only the first so many questions")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every outcome there")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = _WIDTH
    try:
        conversations = load(options.file)
        wanted = set(filter(None, options.only.split(",")))
        conversations = [each for each in conversations if not wanted or each.sample_id in wanted]
        if not conversations:
            raise BadFile(f"{options.file} has no conversation {options.only}")
    except BadFile as error:
        print(f"context: {error}", file=sys.stderr)
        return 2
    load_before = report.load_average()
    try:
        outcomes, traced = measure(conversations, options)
    except (servers.ServerFailure, MemorySystemError) as error:
        print(f"context: {error}", file=sys.stderr)
        return 1
    console.print(f"{', '.join(each.sample_id for each in conversations)}; load before {load_before}")
    show(console, outcomes, traced, options.budget)
    if options.json is not None:
        facts = {"outcomes": [asdict(each) for each in outcomes], "trace": [asdict(each) for each in traced]}
        options.json.write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
