"""Below which similarity is a fact no answer: measured on questions that have one and questions that have none.

    python bench/knowledge_floor.py [--locomo FILE] [--rows N]

It starts an orchestrator and a knowledge base agent of its own with the real model, in a temporary folder. Questions go
to `search_facts` without a floor; what a floor would have let through follows from the similarities.

- `own`: bench/knowledge_facts.py. Questions without an answer are near misses, and ten about other things.
- `locomo`: the turns of each conversation of a file in the LoCoMo format are the facts. Questions without an answer are
  those of the other conversations, which are about other people.

"right": the best fact that reaches the floor is the one with the answer; "wrong": it is another; "none": no fact
reaches it. "invented": share of the questions without an answer for which a fact reaches the floor. With --rows it
also times the agent on that many facts.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.knowledge_facts import ANSWERED, FACTS, UNANSWERED
from examples.locomo import load
from memory_client import MemoryClient
from tests.support.agents import Agent, running_agent
from tests.support.process import Orchestrator, running_orchestrator, wait_until

FLOORS = (0.30, 0.35, 0.40, 0.45, 0.50, 0.55, 0.60, 0.65)
SEED = 5
PER_CONVERSATION = 100

Shares = dict[float, tuple[float, ...]]  # by floor: right, wrong, none, invented


@dataclass(frozen=True)
class Case:
    """One knowledge base: its facts, questions with the places of their answers, questions without."""

    name: str
    facts: Sequence[tuple[str, str]]
    answered: Sequence[tuple[str, frozenset[int]]]
    unanswered: Sequence[str]


def own() -> Case:
    return Case("own", FACTS, [(text, frozenset({place})) for text, place in ANSWERED], UNANSWERED)


def locomo(path: Path) -> Iterator[Case]:
    """Turns as facts of one topic for each speaker; a sample of the questions."""
    chosen = random.Random(SEED)
    conversations = load(path)
    for mine in conversations:
        turns = [turn for session in mine.sessions for turn in session.turns]
        place = {turn.dia_id: number for number, turn in enumerate(turns)}
        asked = [(each.text, frozenset(place[turn] for turn in each.evidence)) for each in mine.questions]
        others = [each.text for other in conversations if other is not mine for each in other.questions]
        yield Case(
            f"locomo {mine.sample_id}",
            [(turn.speaker, turn.content) for turn in turns],
            chosen.sample(asked, min(PER_CONVERSATION, len(asked))),
            chosen.sample(others, PER_CONVERSATION),
        )


def filled(case: Case, client: MemoryClient, orchestrator: Orchestrator) -> None:
    for start in range(0, len(case.facts), 200):
        rows = [{"topic": topic, "content": content} for topic, content in case.facts[start : start + 200]]
        client.call("import_facts", {"records": rows})
    around = {"namespace": client.namespace}
    wait_until(lambda: orchestrator.ask("stats", around)["pending"] == 0, "every fact has its vector", 600)


def first_above(found: Sequence[dict[str, Any]], floor: float) -> dict[str, Any] | None:
    return next((fact for fact in found if fact["similarity"] >= floor), None)


def measure(case: Case, client: MemoryClient) -> Shares:
    """floor -> shares right, wrong, none of the questions with an answer, and invented of those without."""
    texts = [content for _, content in case.facts]
    with_answer = [(asked(client, question), {texts[place] for place in places}) for question, places in case.answered]
    without = [asked(client, question) for question in case.unanswered]
    shares = {}
    for floor in FLOORS:
        tops = [(first_above(found, floor), answers) for found, answers in with_answer]
        right = sum(top is not None and top["content"] in answers for top, answers in tops)
        none = sum(top is None for top, _ in tops)
        invented = sum(first_above(found, floor) is not None for found in without)
        total = len(tops)
        shares[floor] = (right / total, (total - right - none) / total, none / total, invented / len(without))
    return shares


def asked(client: MemoryClient, question: str) -> list[dict[str, Any]]:
    reply = client.call("search_facts", {"query": question, "min_similarity": -1.0, "limit": 20})
    return [fact for fact in reply["results"] if fact["similarity"] is not None]


def show(name: str, shares: Shares) -> None:
    print(f"\n{name}\n\n| floor | right | wrong | none | invented |\n| --- | --- | --- | --- | --- |")
    for floor, figures in shares.items():
        print(f"| {floor:.2f} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")


def average(tables: Sequence[Shares]) -> Shares:
    return {
        floor: tuple(statistics.fmean(table[floor][column] for table in tables) for column in range(4))
        for floor in FLOORS
    }


def timings(client: MemoryClient, rows: int) -> None:
    """Medians and 95th percentiles of the actions on that many facts, vectors aside."""
    records = [
        {"topic": f"topic {row % 200}", "content": f"Thing {row} of kind {row % 977} is noted."} for row in range(rows)
    ]
    began_s = time.perf_counter()
    for start in range(0, rows, 200):
        client.call("import_facts", {"records": records[start : start + 200]})
    print(f"\n{rows} facts imported in {time.perf_counter() - began_s:.1f} s")
    asks: dict[str, Any] = {
        "add_fact": lambda number: {"topic": f"topic {number}", "content": f"A new word{number} came."},
        "get_fact": lambda number: {"topic": f"topic {number}"},
        "search_facts": lambda number: {"query": f"what is thing {number}"},
        "list_topics": lambda number: {},
    }
    for action, fields in asks.items():
        took = []
        for number in range(30):
            began_s = time.perf_counter()
            client.call(action, fields(number))
            took.append((time.perf_counter() - began_s) * 1000.0)
        print(f"{action}: p50 {statistics.median(took):.1f} ms, p95 {sorted(took)[28]:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--locomo", type=Path)
    parser.add_argument("--rows", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(options, Path(folder))


def run(options: argparse.Namespace, folder: Path) -> None:
    with (
        running_orchestrator(folder, embedding__provider="sentence-transformers") as orchestrator,
        running_agent(folder, "knowledge_base", orchestrator.address) as agent,
    ):
        wait_until(lambda: ready(orchestrator), "the model is loaded", 120)
        tables = []
        for case in [own(), *(locomo(options.locomo) if options.locomo else ())]:
            with client_of(agent, case.name) as client:
                filled(case, client, orchestrator)
                shares = measure(case, client)
            show(f"{case.name}: {len(case.facts)} facts", shares)
            if case.name != "own":
                tables.append(shares)
        if len(tables) > 1:
            show("locomo, mean", average(tables))
        if options.rows:
            with client_of(agent, "timings") as client:
                timings(client, options.rows)


def client_of(agent: Agent, namespace: str) -> MemoryClient:
    return MemoryClient(agent.address, namespace=namespace, timeout_ms=60_000, raise_on_error=True, error_bus="")


def ready(orchestrator: Orchestrator) -> bool:
    return bool(orchestrator.ask("health_check")["readiness"]["search_index"] == "ready")


if __name__ == "__main__":
    main()
