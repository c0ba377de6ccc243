#!/usr/bin/env python3
"""What consolidation costs in recall: a long conversation is stored, asked about, consolidated, and asked about again.

    python bench/consolidation.py [FILE] [--conversations N|all] [--examples N] [--set SECTION.KEY=VALUE ...]

FILE is in the LoCoMo format (examples/locomo.py). A service of its own, with the real model, holds all conversations;
its memories fade as soon as they are stored. Each question has a budget: the tokens (words and punctuation marks) of
the ten results that it had before. After consolidation the results are read in their order up to the first that would
not fit. The recall of a question is the share of its evidence that was found:

- stands for: a consolidated result finds all of its originals;
- in its words: it finds those of which at least one sentence stands in it;
- in full: it finds those of which every sentence stands in it.

The words of the answer, as far as they stand in the results' text, are counted before and after in the same way.

Exit status 1 when less than 30 % of the memories were archived, or recall (stands for) fell by more than .02.
`--examples N` prints N consolidated memories with their originals as Markdown.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

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
from memory_system.consolidation.summary import sentences  # noqa: E402
from memory_system.errors import MemorySystemError  # noqa: E402
from memory_system.search.tokens import query_words  # noqa: E402

BEFORE: Final = 10
# More results than any budget holds.
AFTER: Final = 40
MAX_FALL: Final = 0.02
MIN_ARCHIVED: Final = 0.3
CALL_MS: Final = 600_000
# A memory stays in its tier for no time at all, and is not important enough to move up.
FADING: Final = {"lifecycle.short.max_age_days": "0", "lifecycle.short.promote_importance": "0.9"}
KINDS: Final = ("stands for", "in its words", "in full")

_TOKEN: Final = re.compile(r"\w+|[^\w\s]")
_WORD: Final = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, its recall and budget before, and its recall after by each way to count."""

    sample_id: str
    before: float
    budget: int
    after: tuple[float, ...]
    results: int
    answer_before: float
    answer_after: float


def tokens(text: str) -> int:
    return len(_TOKEN.findall(text))


def main() -> int:
    options = _options()
    report = Report()
    try:
        path = options.file or locomo.default_file()
        conversations = locomo.load(path)[: options.conversations]
        with data_folder() as folder:
            settings = FADING | dict(pair.split("=", 1) for pair in options.set)
            with start_service(folder, "service", "sentence-transformers", settings=settings) as server:
                wait_for_embedder(server)
                with MemoryClient(
                    server.endpoint, namespace="bench", timeout_ms=CALL_MS, raise_on_error=True
                ) as client:
                    return _measure(client, conversations, options.examples, report)
    except (locomo.BadFile, ServerFailure, MemorySystemError) as error:
        return report.fail(str(error), 2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure what consolidation costs in recall.")
    parser.add_argument("file", type=Path, nargs="?", help="conversations in the LoCoMo format")
    parser.add_argument("--conversations", type=_number, default=None, metavar="N|all", help="how many of the file")
    parser.add_argument("--examples", type=int, default=0, metavar="N", help="print N merges as Markdown")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting to try")
    options = parser.parse_args()
    if any("=" not in pair for pair in options.set):
        parser.error("--set takes SECTION.KEY=VALUE")
    return options


def _number(text: str) -> int | None:
    return None if text == "all" else int(text)


def _measure(client: MemoryClient, conversations: list[Conversation], examples: int, report: Report) -> int:
    store.store_all(client, conversations, report)
    store.wait_for_vectors(client, report)
    questions = [(each.sample_id, question) for each in conversations for question in each.questions]
    before = [_search(client, *asked, BEFORE) for asked in questions]
    share = _consolidate(client, report)
    store.wait_for_vectors(client, report)
    texts = {
        (each.sample_id, turn.dia_id): turn.content
        for each in conversations
        for session in each.sessions
        for turn in session.turns
    }
    answers = [
        _compare(asked, old, _search(client, *asked, AFTER), texts)
        for asked, old in zip(questions, before, strict=True)
    ]
    _show(answers, share, report)
    if examples:
        _show_examples(client, texts, examples, report)
    fall = -statistics.mean(answer.after[0] - answer.before for answer in answers)
    return 0 if fall <= MAX_FALL and share >= MIN_ARCHIVED else 1


def _search(client: MemoryClient, sample_id: str, question: Question, k: int) -> list[dict[str, Any]]:
    reply = client.semantic_search(question.text, k=k, filters={"user_id": sample_id}, touch=False)
    return list(reply["results"])


def _consolidate(client: MemoryClient, report: Report) -> float:
    """Run it; the share of the memories that it archived."""
    total = client.stats()["memories"]
    began = time.monotonic()
    reply = client.call("run_consolidation", {"limit": 1})
    counts = reply["counts"]
    report.say(
        f"{counts.get('archived', 0)} of {total} memories became {counts.get('summary', 0)} summaries and "
        f"{counts.get('duplicates', 0)} folded duplicates in {time.monotonic() - began:.1f} s"
    )
    return float(counts["archived"] / total)


def _compare(
    asked: tuple[str, Question],
    before: list[dict[str, Any]],
    after: list[dict[str, Any]],
    texts: dict[tuple[str, str], str],
) -> Asked:
    sample_id, question = asked
    budget = sum(tokens(result["content"]) for result in before)
    fitting = list(_fitting(after, budget))
    found: tuple[set[str], ...] = (set(), set(), set())
    for result in fitting:
        for dia_id in _dia_ids(result):
            found[0].add(dia_id)
            told = [sentence in result["content"] for sentence in _own(texts[sample_id, dia_id])]
            if any(told):
                found[1].add(dia_id)
            if all(told):
                found[2].add(dia_id)
    return Asked(
        sample_id,
        before=_recall(question, {dia_id for result in before for dia_id in _dia_ids(result)}),
        budget=budget,
        after=tuple(_recall(question, ids) for ids in found),
        results=len(fitting),
        answer_before=_told(question, before),
        answer_after=_told(question, fitting),
    )


def _told(question: Question, results: list[dict[str, Any]]) -> float:
    """The share of the answer's words that stand in the results; NaN for a question without an answer."""
    asked = {word.lower() for word in query_words(question.answer)}
    told = {word for result in results for word in _WORD.findall(result["content"].lower())}
    return len(asked & told) / len(asked) if asked else math.nan


def _fitting(results: list[dict[str, Any]], budget: int) -> Iterator[dict[str, Any]]:
    for result in results:
        budget -= tokens(result["content"])
        if budget < 0:
            return
        yield result


def _dia_ids(result: dict[str, Any]) -> list[str]:
    found = result["metadata"]["dia_id"]
    return found if isinstance(found, list) else [found]


def _own(text: str) -> list[str]:
    """The sentences of a turn as they can stand in a summary, where the speaker is told once."""
    speaker, _, said = text.partition(": ")
    assert speaker
    return sentences(said)


def _recall(question: Question, found: set[str]) -> float:
    return sum(dia_id in found for dia_id in question.evidence) / len(question.evidence)


def _show(answers: list[Asked], share: float, report: Report) -> None:
    table = Table(title=f"{share:.1%} of the memories archived", title_justify="left", box=box.MARKDOWN)
    for name in ("conversation", "questions", "budget", "results", "recall before", *KINDS, "words of the answer"):
        table.add_column(name, justify="left" if name == "conversation" else "right")
    names = dict.fromkeys(answer.sample_id for answer in answers)
    for name in names:
        table.add_row(name, *_row([answer for answer in answers if answer.sample_id == name]))
    table.add_row("all", *_row(answers))
    report.console.width = max(report.console.width, 170)
    report.console.print(table)


def _row(answers: list[Asked]) -> list[str]:
    told = [answer for answer in answers if not math.isnan(answer.answer_before)]
    return [
        str(len(answers)),
        f"{statistics.mean(answer.budget for answer in answers):.0f}",
        f"{statistics.mean(answer.results for answer in answers):.1f}",
        f"{statistics.mean(answer.before for answer in answers):.3f}",
        *(_change([(answer.before, answer.after[kind]) for answer in answers]) for kind in range(len(KINDS))),
        _change([(answer.answer_before, answer.answer_after) for answer in told]),
    ]


def _change(pairs: list[tuple[float, float]]) -> str:
    """The mean after, and by how much it changed, with the standard error of the mean change."""
    changes = [after - before for before, after in pairs]
    error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else 0.0
    return f"{statistics.mean(after for _, after in pairs):.3f} ({statistics.mean(changes):+.3f} ± {error:.3f})"


def _show_examples(client: MemoryClient, texts: dict[tuple[str, str], str], count: int, report: Report) -> None:
    found, cursor = [], None
    while True:
        page = client.list_memories({"memory_type": "consolidated"}, limit=200, sort_order="asc", cursor=cursor)
        found += page["results"]
        cursor = page.get("next_cursor")
        if cursor is None:
            break
    for at in range(count):
        memory = found[(2 * at + 1) * len(found) // (2 * count)]
        report.console.out(f"{at + 1}. **{memory['content']}**", highlight=False)
        for dia_id in _dia_ids(memory):
            report.console.out(f"   - {texts[memory['user_id'], dia_id]}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
