"""What the demo prints, on a terminal and into a file."""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from locomo import Conversation, Question
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

FILE_WIDTH = 120
FOUND = "●"


@dataclass(frozen=True, slots=True)
class Answer:
    """A reply of semantic_search to a question, and how long the caller waited for it."""

    sample_id: str
    question: Question
    reply: dict[str, Any]
    waited_ms: float

    @property
    def ids(self) -> list[str]:
        return [str(result["metadata"].get("dia_id")) for result in self.reply["results"]]

    @property
    def missed(self) -> list[str]:
        return [dia_id for dia_id in self.question.evidence if dia_id not in self.ids]

    @property
    def recall(self) -> float:
        """The share of the evidence that was found."""
        return 1.0 - len(self.missed) / len(self.question.evidence)


class Report:
    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console.width = FILE_WIDTH

    def say(self, text: str) -> None:
        self.console.print(text)

    def fail(self, text: str, status: int) -> int:
        """One line on stderr; returns the exit status."""
        print(f"demo: {text}", file=sys.stderr)
        return status

    def opening(self, path: Path, conversations: list[Conversation], namespace: str, endpoint: str) -> None:
        self.say(f"[bold]{escape(_short(path))}[/bold] → {endpoint}, namespace {namespace}")
        for conversation in conversations:
            first, last = conversation.sessions[0].started_at, conversation.sessions[-1].started_at
            self.say(
                f"  {escape(conversation.sample_id)}: {escape(' and '.join(conversation.speakers))}, "
                f"{len(conversation.sessions)} sessions, {conversation.turns} turns, {_day(first)} to {_day(last)}"
            )

    @contextlib.contextmanager
    def bar(self, title: str, total: int, *, visible: bool = True) -> Iterator[Callable[..., None]]:
        """A progress bar; what is yielded moves it on. Where there is no terminal there is no bar."""
        columns = (TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        shown = visible and self.console.is_terminal
        with Progress(*columns, console=self.console, disable=not shown, transient=True) as progress:
            task = progress.add_task(title, total=total or None)
            yield lambda count, total=None: progress.update(task, advance=count, total=total)

    def stored(self, new: int, present: int, seconds: float) -> None:
        parts = [f"{new} turns stored in {seconds:.1f} s ({new / seconds:,.0f} per second)"] if new else []
        parts += [f"{present} turns already stored"] if present else []
        self.say(f"[green]✓[/green] {', '.join(parts)}")

    def vectors(self, left: int | None, seconds: float) -> None:
        if left == 0:
            self.say(f"[green]✓[/green] every memory has its vector, {seconds:.1f} s later")
        else:
            self.say("[yellow]![/yellow] some memories have no vector: the answers lean on keywords")

    def answer(self, answer: Answer, show: int) -> None:
        question, reply = answer.question, answer.reply
        self.say("")
        self.say(f"[bold cyan]{escape(question.text)}[/bold cyan]  [dim]{answer.waited_ms:.1f} ms[/dim]")
        expected = [f"expected: {escape(question.answer)}"] if question.answer else []
        evidence = [f"evidence {FOUND}: {', '.join(question.evidence)}"] if question.evidence else []
        if expected or evidence:
            self.say(f"[dim]{' · '.join(expected + evidence)}[/dim]")
        if not reply["results"]:
            self.say("nothing found")
            return
        self.console.print(_table(answer, show))
        if answer.missed:
            self.say(f"[yellow]not among the first {len(answer.ids)}: {', '.join(answer.missed)}[/yellow]")
        if reply["degraded"]:
            self.say(f"[yellow]by keywords alone: {reply['degraded_reason']}[/yellow]")

    def summary(self, answers: list[Answer], measured: int, from_cache: int) -> None:
        judged = [answer.recall for answer in answers if answer.question.evidence]
        parts = [f"{len(answers)} question{'s' * (len(answers) != 1)}"]
        if judged:
            parts.append(f"recall of evidence@{measured} {statistics.mean(judged):.2f}")
        if answers:
            parts.append(f"p50 {statistics.median(answer.waited_ms for answer in answers):.1f} ms")
        if from_cache:
            parts.append(f"{from_cache} answered from the cache")
        if degraded := sum(answer.reply["degraded"] for answer in answers):
            parts.append(f"{degraded} by keywords alone")
        self.say("")
        self.say(f"[bold]{' · '.join(parts)}[/bold]")


def _table(answer: Answer, show: int) -> Table:
    """The first `show` memories, and below them the evidence that came later."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("#", justify="right")
    table.add_column("")
    for name in ("score", "similarity", "keyword"):
        table.add_column(name, justify="right")
    table.add_column("when", no_wrap=True)
    table.add_column("turn", no_wrap=True)
    table.add_column("memory", overflow="fold")
    for rank, result in enumerate(answer.reply["results"], 1):
        dia_id = str(result["metadata"].get("dia_id"))
        found = dia_id in answer.question.evidence
        if rank <= show or found:
            table.add_row(
                str(rank),
                f"[green]{FOUND}[/green]" if found else "",
                *(_figure(result[name]) for name in ("score", "similarity", "keyword")),
                _day(result["occurred_at"]),
                escape(dia_id),
                escape(result["content"]),
                style="bold" if found else None,
            )
    return table


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _day(seconds: float | None) -> str:
    return "-" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _short(path: Path) -> str:
    return min(str(path), os.path.relpath(path), key=len)
