#!/usr/bin/env python3
"""Where a request's microseconds go: get_memory and add_memory, taken apart in one process.

    python bench/stages.py [--requests N] [--group N] [--json FILE]

The service runs here without its socket, with embedding off; requests come in groups (as from so many clients), and a
group is sent when the one before is answered. The functions that a request passes through are timed, each without the
time of those that it calls in turn; a function's time is that which a tenth of its calls undercut, times how often it
is called for a request, and these are summed up by stage. So what other programs take away does not count. In the
writer's thread it is processor time: what the disk takes for the commit is not in it. `the threads` is what the
processor clocks of the service's threads say of the same requests: that is a mean, and has also what lies between the
functions, the making of the requests, and the timing itself. The wire is the processor time of bench/echo.py for a
request of as many clients, in processes of their own.

Exit status: 0 measured, 1 a server failed, 2 bad arguments, 130 interrupted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final

PROJECT: Final = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))

import msgpack  # noqa: E402
import report  # noqa: E402
from clients import Load, LoadFailure, process_count  # noqa: E402
from rich import box  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from run import INTERRUPTS, interrupt  # noqa: E402
from servers import ServerFailure, data_folder, start_echo  # noqa: E402
from workloads import BY_NAME, Job, Request  # noqa: E402

from memory_system.cache.records import RecordCache  # noqa: E402
from memory_system.decoding import Encoding  # noqa: E402
from memory_system.dispatch import Dispatcher  # noqa: E402
from memory_system.errors import MemorySystemError  # noqa: E402
from memory_system.runtime import Runtime  # noqa: E402
from memory_system.service.reading import ReadingService  # noqa: E402
from memory_system.service.writing import WritingService  # noqa: E402
from memory_system.settings import load_settings  # noqa: E402
from memory_system.storage import idempotency, memories  # noqa: E402
from memory_system.storage.group import GroupRunner  # noqa: E402
from memory_system.storage.rows import RecordView  # noqa: E402
from memory_system.storage.writer import Writer  # noqa: E402

ACTIONS: Final = ("get_memory", "add_memory")
STAGES: Final = {
    "wire": "ZeroMQ and the event loop: bench/echo.py",
    "decode": "bytes to the envelope and to the typed fields",
    "validate": "metadata opened and bounded, the content's digest",
    "dispatch": "which operation, the call, its fingerprint, futures",
    "cache": "the record cache, accesses, what follows a commit",
    "hand over": "to the writer's thread and back",
    "store": "the writer: the row, ageing, SQLite, COMMIT",
    "idempotency": "the writer: the key looked for, and kept with the reply",
    "encode": "the record of the reply, and its bytes",
}
# The functions of each stage; the rest of what each does belongs to its own stage, what it calls to theirs.
TIMED: Final[tuple[tuple[Any, str, str], ...]] = (
    (Dispatcher, "handle", "dispatch"),
    (Dispatcher, "_finished", "dispatch"),
    (Dispatcher, "_envelope", "decode"),
    (Encoding, "decode", "decode"),
    (WritingService, "_new", "validate"),
    (Writer, "submit", "hand over"),
    (Writer, "_finish_jobs", "hand over"),
    (Runtime, "_on_commit", "cache"),
    (RecordCache, "get", "cache"),
    (ReadingService, "_touch", "cache"),
    (RecordView, "record", "encode"),
    (Dispatcher, "_success", "encode"),
    (GroupRunner, "run", "store"),
    (memories, "insert", "store"),
    (idempotency.Keys, "look_up", "idempotency"),
    (idempotency.Keys, "replay", "idempotency"),
    (idempotency.Keys, "keep", "idempotency"),
    (idempotency.Keys, "write", "idempotency"),
)
# Stages of the writer's thread, which waits for the disk.
WRITERS: Final = ("store", "idempotency")
WARM_UP: Final = 2048


class Timer:
    """The exclusive times of functions in ns, by (stage, function); one stack of callers for each thread."""

    def __init__(self) -> None:
        self.times: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._local = threading.local()

    def wrapped(self, function: Callable[..., Any], key: tuple[str, str]) -> Callable[..., Any]:
        clock = time.thread_time_ns if key[0] in WRITERS else time.perf_counter_ns
        local, times = self._local, self.times[key]

        def timed(*arguments: Any, **named: Any) -> Any:
            outer, local.inner = getattr(local, "inner", 0), 0
            began = clock()
            try:
                return function(*arguments, **named)
            finally:
                whole = clock() - began
                times.append(whole - local.inner)
                local.inner = outer + whole

        return timed

    @contextmanager
    def installed(self) -> Iterator[None]:
        before = [(owner, name, vars(owner)[name]) for owner, name, _ in TIMED]
        for owner, name, stage in TIMED:
            setattr(owner, name, self.wrapped(vars(owner)[name], (stage, f"{owner.__name__}.{name}")))
        try:
            yield
        finally:
            for owner, name, function in before:
                setattr(owner, name, function)

    def clear(self) -> None:
        for times in self.times.values():
            times.clear()

    def stages_us(self, requests: int) -> dict[str, float]:
        """Microseconds of a request in each stage, of its fastest tenth."""
        found: dict[str, float] = dict.fromkeys(STAGES, 0.0)
        for (stage, _), times in self.times.items():
            if times:
                typical_ns = sorted(times)[len(times) // 10]
                found[stage] += typical_ns * len(times) / requests / 1000.0
        return found


def thread_times_s() -> dict[str, float]:
    """Processor time so far of the threads of this process, by name."""
    found: dict[str, float] = defaultdict(float)
    for thread in threading.enumerate():
        if thread.ident is not None:
            found[thread.name] += time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return found


async def _groups(dispatcher: Dispatcher, bodies: Iterator[bytes], requests: int, group: int) -> None:
    """Have so many requests answered, `group` at a time."""
    left, answered = 0, asyncio.Event()

    def reply(body: bytes) -> None:
        nonlocal left
        left -= 1
        if not left:
            answered.set()

    for _ in range(requests // group):
        left = group
        answered.clear()
        for number, body in enumerate(islice(bodies, group)):
            dispatcher.handle(body, reply, b"%d" % number)
        await answered.wait()


def _bodies(action: str, memory_ids: list[str]) -> Iterator[bytes]:
    """The requests of the benchmark, encoded."""
    made: Iterator[Request] = BY_NAME[action].requests(Job(action, "", 1, 0.0, 0.0, 3, memory_ids))
    return (msgpack.packb(one) for one in made)


async def measure(folder: Path, requests: int, group: int) -> dict[str, dict[str, Any]]:
    """Action -> `stages`: us by stage; `threads`: us by thread."""
    environ = {
        "MEMORY__STORAGE__PATH": str(folder / "stages" / "memory.db"),
        "MEMORY__EMBEDDING__PROVIDER": "off",
        "MEMORY__ERROR_BUS__ENABLED": "false",
    }
    timer, found = Timer(), {}
    answered = requests // group * group
    with timer.installed():
        runtime = Runtime(load_settings(environ=environ), on_fatal=_fail, health=dict)
        await runtime.start()
        try:
            added = msgpack.unpackb(await runtime.dispatcher.answer(next(_bodies("batch_add_memories", []))))
            for action in ACTIONS:
                bodies = _bodies(action, added["memory_ids"])
                await _groups(runtime.dispatcher, bodies, WARM_UP, group)
                timer.clear()
                before = thread_times_s()
                await _groups(runtime.dispatcher, bodies, requests, group)
                after = thread_times_s()
                found[action] = {
                    "stages": timer.stages_us(answered),
                    "threads": {name: 1e6 * (after[name] - before.get(name, 0.0)) / answered for name in after},
                }
        finally:
            await runtime.close()
    return found


def _fail(error: Exception) -> None:
    raise error


def wire_us(folder: Path, clients: int) -> float:
    """Processor time of the echo for a request."""
    with start_echo(folder) as echo, Load(process_count(clients)) as load:
        before_s = echo.cpu_s() or 0.0
        sample = load.measure("echo", echo.endpoint, clients, 2.0, 1, [])
        return 1e6 * ((echo.cpu_s() or 0.0) - before_s) / sample.calls


def show(console: Console, found: dict[str, dict[str, Any]]) -> None:
    table = Table("stage", *ACTIONS, "what", box=box.MARKDOWN)
    for stage, what in STAGES.items():
        values = [found[action]["stages"][stage] for action in ACTIONS]
        table.add_row(stage, *(f"{value:.1f}" if value else "-" for value in values), what)
    sums = [sum(found[action]["stages"].values()) for action in ACTIONS]
    table.add_row("all stages", *(f"{value:.0f}" for value in sums), "microseconds of one request")
    names = dict.fromkeys(name for action in ACTIONS for name in found[action]["threads"])
    for name in names:
        values = [found[action]["threads"].get(name, 0.0) for action in ACTIONS]
        if max(values) >= 1.0:
            table.add_row(f"the threads: {name}", *(f"{value:.0f}" for value in values), "processor time, without wire")
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description="Take a request's time apart.")
    parser.add_argument("--requests", type=int, default=6400, metavar="N", help="of each action (%(default)s)")
    parser.add_argument("--group", type=int, default=64, metavar="N", help="requests at a time (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args()
    if not 1 <= options.group <= options.requests:
        parser.error("--group is at least 1 and at most --requests")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    try:
        return take_apart(options, console)
    except (ServerFailure, LoadFailure) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1
    except MemorySystemError as error:
        console.print(f"error: {error.message}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


def take_apart(options: argparse.Namespace, console: Console) -> int:
    with data_folder() as folder:
        before = report.load_average()
        wire = wire_us(folder, options.group)
        found = asyncio.run(measure(folder, options.requests, options.group))
        for action in ACTIONS:
            found[action]["stages"]["wire"] = wire
    console.print(f"load average {before}; {options.group} requests at a time")
    show(console, found)
    if options.json is not None:
        figures = {"kind": "stages", "load_before": before, "group": options.group, "measured": found}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
