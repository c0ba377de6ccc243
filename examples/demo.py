#!/usr/bin/env python3
"""Stores a long conversation through MemoryClient, asks about it, and shows what comes back.

    python examples/demo.py [FILE] [--conversations N|all] [--questions N|all] [--ask QUESTION ...] [--show N]

FILE is in the LoCoMo format (see locomo.py). Everything goes to the namespace `demo`; running it again stores only
what is not there yet. Exit status: 0 done, 1 the service failed, 2 the file or an argument is of no use.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "scripts")]

import locomo  # noqa: E402
import store  # noqa: E402
from locomo import Conversation, Question  # noqa: E402
from report import Answer, Report  # noqa: E402
from service import NoService, connect  # noqa: E402

from memory_client import MemoryClient  # noqa: E402
from memory_system.errors import ConfigError, MemorySystemError  # noqa: E402

NAMESPACE = "demo"
MEASURED = 10
QUESTIONS = 6
# Beyond this many questions their tables are left out, unless --show asks for them.
TABLES = 20


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    report = Report()
    try:
        path = options.file or locomo.default_file()
        conversations = locomo.load(path)[: options.conversations]
        with connect(report, NAMESPACE) as client:
            _run(client, conversations, path, options, report)
    except (locomo.BadFile, ConfigError) as error:
        return report.fail(str(error), 2)
    except NoService as error:
        return report.fail(str(error), 1)
    except MemorySystemError as error:
        return report.fail(f"{error.message} ({error.code})", 1)
    except KeyboardInterrupt:
        return report.fail("interrupted; run it again to go on: nothing is stored twice", 130)
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Store a long conversation and ask about it.")
    parser.add_argument("file", type=Path, nargs="?", help="conversations in the LoCoMo format")
    parser.add_argument("--conversations", type=_number, default=1, metavar="N|all", help="how many of the file")
    parser.add_argument("--questions", type=_number, default=QUESTIONS, metavar="N|all", help="how many to ask")
    parser.add_argument("--ask", action="append", default=[], metavar="QUESTION", help="ask this instead")
    parser.add_argument("--show", type=int, metavar="N", help="memories shown for each question (5)")
    options = parser.parse_args(arguments)
    if options.show is not None and not 0 <= options.show <= MEASURED:
        parser.error(f"--show takes 0 to {MEASURED}")
    if any(not question.strip() for question in options.ask):
        parser.error("--ask takes a question")
    return options


def _number(text: str) -> int | None:
    """A positive number, None for all."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor all")
    return int(text)


def _run(
    client: MemoryClient,
    conversations: list[Conversation],
    path: Path,
    options: argparse.Namespace,
    report: Report,
) -> None:
    report.opening(path, conversations, NAMESPACE, client.endpoint)
    store.store_all(client, conversations, report)
    store.wait_for_vectors(client, report)
    asked = _choose(conversations, options)
    show = options.show if options.show is not None else 5 if len(asked) <= TABLES else 0
    hits_before = store.cached_answers(client)
    answers = []
    with report.bar("asking", len(asked), visible=not show) as advance:
        for sample_id, question in asked:
            answers.append(_ask(client, sample_id, question))
            advance(1)
            if show:
                report.answer(answers[-1], show)
    report.summary(answers, MEASURED, store.cached_answers(client) - hits_before)


def _choose(conversations: list[Conversation], options: argparse.Namespace) -> list[tuple[str, Question]]:
    """Questions of the user's own, or a sample spread evenly over those of the conversations."""
    if options.ask:
        own = [Question(text, "", ()) for text in options.ask]
        return [(conversation.sample_id, question) for conversation in conversations for question in own]
    pool = [(conversation.sample_id, question) for conversation in conversations for question in conversation.questions]
    wanted = options.questions
    if wanted is None or wanted >= len(pool):
        return pool
    return [pool[(2 * index + 1) * len(pool) // (2 * wanted)] for index in range(wanted)]


def _ask(client: MemoryClient, sample_id: str, question: Question) -> Answer:
    began = time.perf_counter()
    reply = client.semantic_search(question.text, k=MEASURED, filters={"user_id": sample_id}, touch=False)
    return Answer(sample_id, question, reply, (time.perf_counter() - began) * 1000.0)


if __name__ == "__main__":
    sys.exit(main())
