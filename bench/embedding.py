#!/usr/bin/env python3
"""How fast is the embedding worker, and are its vectors those of the model?

    python bench/embedding.py [FILE] [--texts 128] [--repeats 5] [--backends auto,torch] [--threads N] [--recall]

FILE is in the LoCoMo format (examples/locomo.py). The yardstick is SentenceTransformer.encode in fp32 with its
defaults, in this process; each backend is the real worker process with the default settings, which gets the texts in
batches of at most `embedding.batch_texts`. A repetition runs all of them on the same texts and
questions, one after the other, so what else the machine does falls on each; a ratio is the median of the ratios within
the repetitions. Processor time is that of the process that embeds, all its threads: it suffers least from others.

`--threads N` gives the yardstick and the workers N threads each: with its defaults the yardstick has as many as there
are processors, and waits for other programs at every step of the model where these are busy.

Cosines are of each text's vector with the yardstick's. `--recall` embeds all turns and questions and prints recall@10
of the turn alone, by conversation. Exit status 1 when a cosine is below .998, or recall differs by more than .005.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "examples")]

import locomo  # noqa: E402
import numpy as np  # noqa: E402
from locomo import Conversation  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from memory_system.embedding import WorkerEmbedder, model  # noqa: E402
from memory_system.embedding.interface import Vectors  # noqa: E402
from memory_system.errors import ConfigError, VectorsUnavailable  # noqa: E402
from memory_system.settings import EmbeddingSettings  # noqa: E402

YARDSTICK: Final = "SentenceTransformer"
HEADINGS: Final = (
    "what", "texts/s", "min to max", "ratio", "CPU ms/text", "ratio", "one query ms", "ratio", "cosine least",
    "start s",
)  # fmt: skip
QUERIES_A_REPEAT: Final = 8
LEAST_COSINE: Final = 0.998
MOST_RECALL_CHANGE: Final = 0.005
BEST: Final = 10

Encode = Callable[[list[str]], Awaitable[Vectors]]
# So many ticks of processor time in a second, in /proc.
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(slots=True)
class Subject:
    """One way to embed, and what was measured of it; the lists have one value for each repetition."""

    name: str
    encode: Encode
    pid: int
    start_s: float
    per_s: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)
    query_ms: list[float] = field(default_factory=list)
    least_cosine: float = 1.0
    recall: float | None = None


def main() -> int:
    options = _options()
    try:
        path = options.file or locomo.default_file()
        return asyncio.run(_compare(locomo.load(path), options))
    except (locomo.BadFile, ConfigError, VectorsUnavailable) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure the embedding worker.")
    parser.add_argument("file", type=Path, nargs="?", help="conversations in the LoCoMo format")
    parser.add_argument("--texts", type=int, default=128, metavar="N", help="texts of one repetition")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--backends", default="auto", help="values of embedding.backend, with commas between")
    parser.add_argument("--threads", type=int, default=0, help="embedding.threads of the workers, and of the yardstick")
    parser.add_argument("--recall", action="store_true", help="embed everything, and compare recall")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    return parser.parse_args()


async def _compare(conversations: list[Conversation], options: argparse.Namespace) -> int:
    texts = [turn.content for each in conversations for session in each.sessions for turn in session.turns]
    chosen = texts[:: max(1, len(texts) // options.texts)][: options.texts]
    questions = [question.text for each in conversations for question in each.questions]
    subjects = [_yardstick(options.threads)]
    workers: list[WorkerEmbedder] = []
    try:
        for backend in options.backends.split(","):
            settings = EmbeddingSettings(backend=backend, threads=options.threads)
            workers.append(WorkerEmbedder(settings))
            subjects.append(await _worker(backend, workers[-1], settings))
        await _repeat(subjects, chosen, questions, options.repeats)
        if options.recall:
            await _measure_recall(subjects, conversations)
    finally:
        for worker in workers:
            await worker.close()
    _print(subjects, options)
    return _verdict(subjects)


def _yardstick(threads: int) -> Subject:
    started = time.monotonic()
    import torch
    from sentence_transformers import SentenceTransformer

    if threads:
        torch.set_num_threads(threads)
    source = model.resolve(EmbeddingSettings().model)
    transformer = SentenceTransformer(str(source.directory or source.name), device="cpu")

    async def encode(texts: list[str]) -> Vectors:
        return np.asarray(transformer.encode(texts, show_progress_bar=False), dtype=np.float32)

    return Subject(YARDSTICK, encode, os.getpid(), time.monotonic() - started)


async def _worker(backend: str, embedder: WorkerEmbedder, settings: EmbeddingSettings) -> Subject:
    started = time.monotonic()
    await embedder.start()
    while embedder.state != "ready":
        if embedder.state == "down":
            raise VectorsUnavailable(f"embedding.backend {backend}: {embedder.reason}")
        await asyncio.sleep(0.01)
    start_s = time.monotonic() - started

    async def encode(texts: list[str]) -> Vectors:
        size = settings.batch_texts
        return np.concatenate([await embedder.encode(texts[at : at + size]) for at in range(0, len(texts), size)])

    return Subject(backend, encode, embedder.pid or 0, start_s)


async def _repeat(subjects: list[Subject], texts: list[str], questions: list[str], repeats: int) -> None:
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("embedding", total=(repeats + 1) * len(subjects))
        for subject in subjects:
            # Not measured: the first calls find nothing warm.
            await subject.encode(texts[:8])
            progress.advance(task)
        for number in range(repeats):
            asked = [questions[(number * QUERIES_A_REPEAT + n) % len(questions)] for n in range(QUERIES_A_REPEAT)]
            expected: Vectors | None = None
            for subject in subjects:
                vectors = await _measure(subject, texts, asked)
                expected = vectors if expected is None else expected
                subject.least_cosine = min(subject.least_cosine, float((vectors * expected).sum(axis=1).min()))
                progress.advance(task)


async def _measure(subject: Subject, texts: list[str], asked: list[str]) -> Vectors:
    cpu_s, started = _cpu_s(subject.pid), time.monotonic()
    vectors = await subject.encode(texts)
    subject.per_s.append(len(texts) / (time.monotonic() - started))
    subject.cpu_ms.append((_cpu_s(subject.pid) - cpu_s) * 1000 / len(texts))
    times = []
    for question in asked:
        started = time.monotonic()
        await subject.encode([question])
        times.append((time.monotonic() - started) * 1000)
    subject.query_ms.append(statistics.median(times))
    return vectors


def _cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


async def _measure_recall(subjects: list[Subject], conversations: list[Conversation]) -> None:
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("recall", total=len(subjects) * len(conversations))
        for subject in subjects:
            shares: list[float] = []
            for conversation in conversations:
                shares += await _recalls(subject.encode, conversation)
                progress.advance(task)
            subject.recall = statistics.fmean(shares)


async def _recalls(encode: Encode, conversation: Conversation) -> list[float]:
    turns = [turn for session in conversation.sessions for turn in session.turns]
    asked = [question for question in conversation.questions if question.evidence]
    vectors = await encode([turn.content for turn in turns])
    scores = await encode([question.text for question in asked]) @ vectors.T
    best = np.argsort(-scores, axis=1)[:, :BEST]
    found = [{turns[at].dia_id for at in row} for row in best]
    return [
        len(ids & set(question.evidence)) / len(set(question.evidence))
        for ids, question in zip(found, asked, strict=True)
    ]


def _ratio(values: Sequence[float], of: Sequence[float]) -> str:
    return f"{statistics.median(value / yardstick for value, yardstick in zip(values, of, strict=True)):.2f}"


def _row(subject: Subject, yardstick: Subject) -> list[str]:
    return [
        subject.name,
        f"{statistics.median(subject.per_s):.0f}",
        f"{min(subject.per_s):.0f} to {max(subject.per_s):.0f}",
        _ratio(subject.per_s, yardstick.per_s),
        f"{statistics.median(subject.cpu_ms):.1f}",
        _ratio(subject.cpu_ms, yardstick.cpu_ms),
        f"{statistics.median(subject.query_ms):.1f}",
        _ratio(subject.query_ms, yardstick.query_ms),
        f"{subject.least_cosine:.5f}",
        f"{subject.start_s:.1f}",
    ]


def _print(subjects: list[Subject], options: argparse.Namespace) -> None:
    rows = [_row(subject, subjects[0]) for subject in subjects]
    headings = list(HEADINGS)
    if options.recall:
        headings.append("recall@10")
        rows = [[*row, f"{subject.recall:.4f}"] for row, subject in zip(rows, subjects, strict=True)]
    if options.markdown:
        for cells in (headings, ["---"] * len(headings), *rows):
            print(f"| {' | '.join(cells)} |")
        return
    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _verdict(subjects: list[Subject]) -> int:
    yardstick: Any = subjects[0]
    far = [each.name for each in subjects if each.least_cosine < LEAST_COSINE]
    if yardstick.recall is not None:
        far += [each.name for each in subjects if abs(each.recall - yardstick.recall) > MOST_RECALL_CHANGE]
    for name in far:
        print(f"bench: the vectors of {name} are not those of the model", file=sys.stderr)
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
