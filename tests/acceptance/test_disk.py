"""A disk that is full, and one that fails: what was acknowledged is there, what was refused is not, reads go on."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memory_client import MemoryClient
from tests.acceptance.test_crash import damage_of_copy
from tests.support.service import PROJECT, Orchestrator, Reply, environment, free_port, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

SIZE = "12m"
TEXT = "a memory that takes up some room " * 600


class WrappedOrchestrator(Orchestrator):
    """An orchestrator that another program starts; that program becomes it, so that the pid is the service's."""

    def __init__(self, folder: Path, wrapper: list[str], **overrides: Any) -> None:
        port = free_port()
        overrides = {"storage__synchronous": "full", "network__port": port, **overrides}
        super().__init__(folder, port, environment(folder, overrides))
        self.wrapper = wrapper

    def launch(self) -> subprocess.Popen[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
        return subprocess.Popen(
            [*self.wrapper, sys.executable, str(PROJECT / "orchestrator.py")],
            env={**kept, "MEMORY_CONFIG": os.devnull, **self.environ},
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )


def must_work(command: list[str], purpose: str) -> None:
    """Skip where a command cannot be run; root in CI has to be able to."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=90)
        problem = done.stderr.strip() if done.returncode else None
    except FileNotFoundError as error:
        problem = str(error)
    if problem is None:
        return
    if os.environ.get("CI") and os.geteuid() == 0:
        pytest.fail(f"{purpose}: {problem}")
    pytest.skip(f"{purpose}: {problem}")


# -- full -----------------------------------------------------------------------------------------------------------


class SmallDisk:
    """The file system that only the service sees, reached through its process."""

    def __init__(self, orchestrator: Orchestrator) -> None:
        self.folder = Path(f"/proc/{orchestrator.pid}/root{orchestrator.database.parent}")
        self.database = self.folder / orchestrator.database.name
        self._pid = orchestrator.pid

    def fill(self) -> None:
        """Take all room there is."""
        with (self.folder / "ballast").open("ab", buffering=0) as file:
            for size in (1 << 20, 4096, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(b"x" * size)

    def free(self) -> None:
        (self.folder / "ballast").unlink()

    def damage(self, copy: Path) -> list[str]:
        """Check a copy of the database that is taken while the service stands still."""
        os.kill(self._pid, signal.SIGSTOP)
        try:
            return damage_of_copy(self.database, copy)
        finally:
            os.kill(self._pid, signal.SIGCONT)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Orchestrator, SmallDisk]]:
    """A service whose store lies on a file system of its own, which goes away with it."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={SIZE} tmpfs "{folder}" && exec "$@"'
    wrapper = ["unshare", "--mount", "--propagation", "private", "sh", "-c", mount, "sh"]
    must_work([*wrapper, "true"], "no file system of one's own can be mounted")
    orchestrator = WrappedOrchestrator(
        tmp_path, wrapper, storage__path=folder / "memory.db", storage__access_flush_s=0.05, log__level="debug"
    )
    try:
        orchestrator.start()
        yield orchestrator, SmallDisk(orchestrator)
    finally:
        orchestrator.close()


def add(orchestrator: Orchestrator, number: int) -> Reply:
    return orchestrator.ask("add_memory", content=f"number{number} {TEXT}")


def write_until(orchestrator: Orchestrator, status: str, start: int, limit: int = 1000) -> tuple[dict[int, str], Reply]:
    """Add memories until one ends so: {number: memory_id} of those stored, and the last reply."""
    stored: dict[int, str] = {}
    for number in range(start, start + limit):
        reply = add(orchestrator, number)
        if reply["status"] == "success":
            stored[number] = reply["memory_id"]
        if reply["status"] == status:
            return stored, reply
    raise AssertionError(f"no {status} in {limit} writes")


def check_reads(orchestrator: Orchestrator, stored: dict[int, str]) -> None:
    """Every read works, and sees what was acknowledged and nothing else."""
    number, memory_id = next(iter(stored.items()))
    assert orchestrator.ask("get_memory", memory_id=memory_id)["memory"]["content"].startswith(f"number{number} ")
    assert orchestrator.ask("search_memory", query=f"number{number}")["results"][0]["memory_id"] == memory_id
    for action, data in (
        ("semantic_search", {"query": "room"}),
        ("list_memories", {"limit": 5}),
        ("batch_get_memories", {"memory_ids": [memory_id]}),
        ("health_check", {}),
    ):
        assert orchestrator.ask(action, **data)["status"] == "success"
    assert orchestrator.ask("stats")["memories"] == len(stored)


def test_a_full_disk_refuses_writes_only_and_needs_no_restart(
    small_disk: tuple[Orchestrator, SmallDisk], tmp_path: Path
) -> None:
    orchestrator, disk = small_disk
    stored = {number: add(orchestrator, number)["memory_id"] for number in range(5)}
    for round_ in range(2):
        disk.fill()
        more, refusal = write_until(orchestrator, "error", start=len(stored) + 1000 * round_)
        stored |= more
        assert refusal["error_code"] == "storage_full"
        assert refusal["retryable"]
        check_reads(orchestrator, stored)
        # Long enough for what the service does by itself: flushing accesses, storing vectors, an idle checkpoint.
        end_s = time.monotonic() + 3.0
        while time.monotonic() < end_s:
            check_reads(orchestrator, stored)
            time.sleep(0.2)
        assert add(orchestrator, 10_000 + round_)["error_code"] == "storage_full"
        check_reads(orchestrator, stored)
        assert disk.damage(tmp_path / "copy") == []

        disk.free()
        reply = add(orchestrator, 20_000 + round_)
        assert reply["status"] == "success", reply
        stored[20_000 + round_] = reply["memory_id"]
        check_reads(orchestrator, stored)
        assert disk.damage(tmp_path / "copy") == []
    wait_until(lambda: orchestrator.ask("stats")["pending"] == 0, "vectors of everything, once there is room", 90.0)
    assert orchestrator.alive
    assert orchestrator.ask("health_check")["pid"] == orchestrator.pid


def test_a_client_is_told_that_the_disk_is_full(small_disk: tuple[Orchestrator, SmallDisk]) -> None:
    """It does not wait for room: the caller decides."""
    orchestrator, disk = small_disk
    disk.fill()
    with MemoryClient(orchestrator.address, timeout_ms=10_000) as client:
        began_s = time.monotonic()
        replies = [client.add_memory(f"number{number} {TEXT}") for number in range(100)]
        assert time.monotonic() - began_s < 30.0
        refused = [reply for reply in replies if reply["status"] == "error"]
        assert {(reply["error_code"], reply["outcome"]) for reply in refused} == {("storage_full", "failed")}
        stored = len(replies) - len(refused)
        assert client.call("stats")["memories"] == stored
        assert client.get_circuit_breaker_status()["failure_count"] == 0


# -- failing --------------------------------------------------------------------------------------------------------


def failing_sync(log: Path, call: int) -> list[str]:
    """A wrapper under which each thread's fdatasync fails from its `call`-th on."""
    inject = f"inject=fdatasync:error=EIO:when={call}+"
    return ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-o", str(log), "-e", "trace=fdatasync", "-e", inject]


@pytest.fixture
def failing_disk(tmp_path: Path) -> Iterator[Callable[[int], Orchestrator]]:
    must_work([*failing_sync(tmp_path / "probe", 1000), "true"], "no fault can be injected")
    made: list[Orchestrator] = []

    def make(call: int) -> Orchestrator:
        made.append(WrappedOrchestrator(tmp_path, failing_sync(tmp_path / "strace", call)))
        return made[-1]

    yield make
    for orchestrator in made:
        orchestrator.close()


def contents(database: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(database)) as db:
        return [content for (content,) in db.execute("SELECT content FROM memories")]


@pytest.mark.parametrize("call", [10, 25])
def test_after_a_failed_sync_nothing_more_is_acknowledged_and_the_service_ends(
    failing_disk: Callable[[int], Orchestrator], tmp_path: Path, call: int
) -> None:
    orchestrator = failing_disk(call)
    orchestrator.start()
    told: dict[str, Reply | None] = {}
    with contextlib.suppress(TimeoutError):
        for number in range(100):
            content = f"written {number}"
            told[content] = None
            told[content] = orchestrator.ask("add_memory", content=content, timeout_s=10.0)
            if told[content]["status"] == "error":  # type: ignore[index]
                break
    assert orchestrator.process is not None
    assert orchestrator.process.wait(45) == 1
    assert "EIO" in (tmp_path / "strace").read_text()
    stored = contents(orchestrator.database)
    acknowledged = [content for content, reply in told.items() if reply is not None and reply["status"] == "success"]
    refused = [content for content, reply in told.items() if reply is not None and reply["status"] == "error"]
    assert 0 < len(acknowledged) < 100
    assert [content for content in acknowledged if content not in stored] == []
    assert [content for content in refused if content in stored] == []

    # Supervisor starts it anew, on a disk that works.
    orchestrator.wrapper = []  # type: ignore[attr-defined]
    orchestrator.restart()
    assert orchestrator.ask("add_memory", content="after")["status"] == "success"
    assert orchestrator.ask("stats")["memories"] == len(stored) + 1


@pytest.mark.parametrize("call", [1, 7, 8])
def test_a_sync_that_fails_at_the_start_is_one_clear_line(
    failing_disk: Callable[[int], Orchestrator], call: int
) -> None:
    orchestrator = failing_disk(call)
    process = orchestrator.launch()
    try:
        _, told = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "disk I/O error" in told
    assert "Traceback" not in told


def test_a_call_survives_a_failed_sync_and_is_done_once(failing_disk: Callable[[int], Orchestrator]) -> None:
    """The client repeats the call under its request_id until the service is back, whatever became of the first try."""
    orchestrator = failing_disk(10)
    orchestrator.start()
    replies: list[Reply] = []

    def write() -> None:
        with MemoryClient(orchestrator.address, timeout_ms=90_000, attempt_timeout_ms=3_000) as client:
            replies.extend(client.add_memory(f"written {number}") for number in range(20))

    writing = threading.Thread(target=write)
    writing.start()
    try:
        assert orchestrator.process is not None
        orchestrator.process.wait(60)
        orchestrator.wrapper = []  # type: ignore[attr-defined]
        orchestrator.restart()
    finally:
        writing.join(150)
    assert [reply["status"] for reply in replies] == ["success"] * 20
    orchestrator.kill()
    assert sorted(contents(orchestrator.database)) == sorted(f"written {number}" for number in range(20))
