"""The orchestrator, told by the environment where it is to be killed or what it is to do wrong. For tests alone: the
product reads none of these variables.

FAULT=module:Class.function:before|after|inside:N   SIGKILL at the N-th call of that function, before it begins or when
                                                    it has ended; inside: in the midst of a step of a migration
WRONG=early_reply                                   replies leave before the commit (a negative control)
WRONG=largest_first                                 when memory is short, those go who hold the most (another)
WRONG=leak                                          10 kB are kept for each request, for good (another)
"""

from __future__ import annotations

import functools
import importlib
import os
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import orchestrator
from memory_system.connection_judge import Judge
from memory_system.connections import Connection
from memory_system.dispatch import Dispatcher
from memory_system.storage import migrations
from memory_system.storage.group import Group, GroupRunner
from memory_system.storage.writer import Writer

EARLY_S = 0.1
LEAK_BYTES = 10_000


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(fault: str) -> None:
    module, name, when, count = fault.split(":")
    owner: Any = importlib.import_module(module)
    *path, function = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    original = getattr(owner, function)
    setattr(owner, function, _inside(original) if when == "inside" else _counting(original, when, int(count)))


def _counting(original: Callable[..., Any], when: str, count: int) -> Callable[..., Any]:
    lock, calls = threading.Lock(), 0

    @functools.wraps(original)
    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        with lock:
            calls += 1
            is_it = calls == count
        if is_it and when == "before":
            die()
        result = original(*arguments, **named)
        if is_it:
            die()
        return result

    return counted


def _inside(original: Callable[..., Any]) -> Callable[..., Any]:
    """A step of a migration that ends when all of it is done, and nothing committed."""
    assert original is migrations._step, "only there"

    def step(db: sqlite3.Connection, script: str, version: int) -> Any:
        db.create_function("die", 0, die)
        return original(db, f"{script}\nSELECT die();", version)

    return step


def reply_early() -> None:
    """Acknowledge what is not committed yet, and take one's time with the commit."""
    begin, finish = Writer.__init__, GroupRunner._finish

    def made(writer: Writer, *arguments: Any, **named: Any) -> None:
        begin(writer, *arguments, **named)
        writer._runner.told = writer._deliver  # type: ignore[attr-defined]

    def finished(runner: GroupRunner, group: Group) -> int:
        logged = finish(runner, group)
        runner.told(Group(list(group.outcomes), sequences=dict(group.sequences)))  # type: ignore[attr-defined]
        time.sleep(EARLY_S)
        return logged

    Writer.__init__ = made  # type: ignore[method-assign]
    GroupRunner._finish = finished  # type: ignore[method-assign]


def close_the_largest() -> None:
    """Of those who hold something, close the fewest who hold half of it, however long they have."""

    def largest(_judge: Judge, held: dict[Connection, int], _now_s: float, _share: float) -> list[Connection]:
        half, chosen = sum(held.values()) / 2, []
        for each in sorted(held, key=lambda one: held[one], reverse=True):
            if half <= 0:
                break
            half -= held[each]
            chosen.append(each)
        return chosen

    Judge._longest = largest  # type: ignore[method-assign]


def keep_for_each_request() -> None:
    kept: list[bytes] = []
    handle = Dispatcher.handle

    def keeping(dispatcher: Dispatcher, body: bytes, *arguments: Any, **named: Any) -> None:
        kept.append(bytes(LEAK_BYTES))
        handle(dispatcher, body, *arguments, **named)

    Dispatcher.handle = keeping  # type: ignore[method-assign]


WRONG = {"early_reply": reply_early, "largest_first": close_the_largest, "leak": keep_for_each_request}

if __name__ == "__main__":
    if "WRONG" in os.environ:
        WRONG[os.environ["WRONG"]]()
    if "FAULT" in os.environ:
        arm(os.environ["FAULT"])
    sys.exit(orchestrator.main())
