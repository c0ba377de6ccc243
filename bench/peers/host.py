"""Runs one memory system in its own environment, and does what the benchmark says: a line of JSON each way.

    PYTHON host.py STORE MODEL_DIRECTORY

STORE names a module beside this one, with a class `Store`, and with what a reader has to know in `FACTS`: what an
acknowledged add means (durable), when its vector is made (embeds), and what a client is (clients):

    Store(folder, model)           opens an empty store there; `model` is the directory of the weights
    add(item) / add_many(items)    return when the system says that they are kept
    settle()                       returns when all that was added can be found by its meaning
    search(question, user, k)      the `key`s of the k best items of this user
    pids()                         further processes that belong to it
    close()

An item is a dict with key, text, user, session and occurred_at (epoch seconds). Clients are threads of this process,
each of which asks when it has been answered.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

Answer = dict[str, Any]


def closed_loop(clients: int, work: Iterable[Any], call: Callable[[Any], Any], seconds: float | None) -> Answer:
    """Have `clients` threads take from `work` until it or the time is up: waits in ms, and what the calls gave."""
    lock = threading.Lock()
    numbered: Iterator[tuple[int, Any]] = iter(enumerate(work))
    began_s = time.perf_counter()

    def client(_: int) -> list[tuple[int, float, Any]]:
        done = []
        while seconds is None or time.perf_counter() - began_s < seconds:
            with lock:
                number, one = next(numbered, (-1, None))
            if number < 0:
                break
            asked_s = time.perf_counter()
            given = call(one)
            done.append((number, 1000.0 * (time.perf_counter() - asked_s), given))
        return done

    with ThreadPoolExecutor(clients) as pool:
        done = sorted((each for part in pool.map(client, range(clients)) for each in part), key=lambda each: each[0])
    elapsed_s = time.perf_counter() - began_s
    return {"elapsed_s": elapsed_s, "waits_ms": [each[1] for each in done], "given": [each[2] for each in done]}


def resident_bytes(pids: Iterable[int]) -> int:
    """What these processes and their children keep in memory; 0 where there is no /proc."""
    total, left = 0, list(pids)
    while left:
        folder = Path(f"/proc/{left.pop()}")
        try:
            lines = (folder / "status").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) * 1024
            for task in (folder / "task").iterdir():
                left += map(int, (task / "children").read_text().split())
        except (OSError, StopIteration):
            continue
    return total


class Host:
    """The system under measurement, and the commands."""

    def __init__(self, module: str, model: str) -> None:
        self._module = importlib.import_module(module)
        self._model = model
        self._store: Any = None

    def open(self, folder: str) -> Answer:
        began_s = time.perf_counter()
        Path(folder).mkdir(parents=True)
        self._store = self._module.Store(folder, self._model)
        return {"elapsed_s": time.perf_counter() - began_s, "facts": self._module.FACTS}

    def add(self, clients: int, items: list[Answer], seconds: float) -> Answer:
        """`elapsed_s` until the last was acknowledged, `settled_s` until the last can be found by its meaning."""
        result = closed_loop(clients, items, self._store.add, seconds)
        return self._settled(result, len(result.pop("given")))

    def batch(self, items: list[Answer], size: int) -> Answer:
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        result = closed_loop(1, parts, self._store.add_many, None)
        del result["given"]
        return self._settled(result, len(items))

    def _settled(self, result: Answer, items: int) -> Answer:
        began_s = time.perf_counter()
        self._store.settle()
        settled_s = result["elapsed_s"] + time.perf_counter() - began_s
        return {**result, "items": items, "settled_s": settled_s}

    def search(self, clients: int, questions: list[list[str]], k: int, seconds: float | None = None) -> Answer:
        """`questions`: [text, user]; `given`: the keys that each found, in the order of the questions."""
        return closed_loop(clients, questions, lambda one: self._store.search(one[0], one[1], k), seconds)

    def memory(self) -> Answer:
        return {"bytes": resident_bytes([*self._store.pids()])}

    def close(self) -> Answer:
        self._store.close()
        self._store = None
        return {}


def main() -> int:
    # What libraries print must not stand between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    host = Host(sys.argv[1], sys.argv[2])
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(host, command.pop("do"))(**command)
        except Exception as error:  # noqa: BLE001  whatever a system raises is told to the benchmark, which stops
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
