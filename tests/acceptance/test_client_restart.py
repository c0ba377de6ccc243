"""A killed and restarted orchestrator costs a client nothing but time, and each write is done once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memory_client import AsyncMemoryClient, MemoryClient
from tests.support.process import free_port

PROJECT = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 60.0
# How long the service is away.
AWAY_S = 1.0

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


class Orchestrator:
    """The real program on a free port, with its data in a folder of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        self._log_path = folder / "output.txt"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
        self._environ = {
            **kept,
            "MEMORY__NETWORK__PORT": str(self.port),
            "MEMORY__STORAGE__PATH": str(folder / "memory.db"),
            "MEMORY__LOG__DIR": str(folder / "logs"),
            "MEMORY__EMBEDDING__PROVIDER": "stub",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log_path.open("ab") as output:
            command = [sys.executable, "orchestrator.py"]
            self._process = subprocess.Popen(
                command, cwd=PROJECT, env=self._environ, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_until_healthy(self) -> None:
        with MemoryClient(self.endpoint, timeout_ms=START_TIMEOUT_S * 1000.0) as client:
            reply = client.health_check()
        assert reply["status"] == "success", (reply, self._log_path.read_text(errors="replace"))

    def freeze(self) -> None:
        """It accepts what is sent, as the kernel does for it, and answers nothing."""
        self._signal(signal.SIGSTOP)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait(30)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._signal(signal.SIGCONT)
            self._signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Orchestrator]:
    orchestrator = Orchestrator(tmp_path)
    try:
        orchestrator.start()
        orchestrator.wait_until_healthy()
        yield orchestrator
    finally:
        orchestrator.stop()


def restart_under_a_call(service: Orchestrator) -> None:
    time.sleep(0.3)  # for the call to reach the frozen service
    service.kill()
    time.sleep(AWAY_S)
    service.start()


def stored(service: Orchestrator) -> Counter[str]:
    """How many times each content is there."""
    contents: Counter[str] = Counter()
    with MemoryClient(service.endpoint, timeout_ms=30_000) as client:
        page: dict[str, Any] = {}
        while not page or page.get("next_cursor"):
            page = client.list_memories(limit=1000, cursor=page.get("next_cursor"))
            assert page["status"] == "success", page
            contents.update(memory["content"] for memory in page["results"])
    return contents


def test_a_call_in_flight_succeeds_once(service: Orchestrator) -> None:
    with MemoryClient(service.endpoint, timeout_ms=60_000) as client:
        assert client.add_memory("before")["status"] == "success"
        service.freeze()
        restarting = threading.Thread(target=restart_under_a_call, args=(service,))
        restarting.start()
        reply = client.add_memory("in flight")
        restarting.join()
        assert reply["status"] == "success", reply
        assert client.get_circuit_breaker_status()["failure_count"] == 0
        assert client.get_memory(reply["memory_id"])["memory"]["content"] == "in flight"
    assert stored(service) == {"before": 1, "in flight": 1}


def test_pipelined_calls_in_flight_succeed_once(service: Orchestrator) -> None:
    async def main() -> list[dict[str, Any]]:
        async with AsyncMemoryClient(service.endpoint, timeout_ms=60_000) as client:
            await client.stats()
            service.freeze()
            restarting = asyncio.create_task(asyncio.to_thread(restart_under_a_call, service))
            replies = await asyncio.gather(*(client.add_memory(f"memory {number}") for number in range(20)))
            await restarting
            return list(replies)

    replies = asyncio.run(main())
    assert [reply["status"] for reply in replies] == ["success"] * 20, replies
    assert stored(service) == {f"memory {number}": 1 for number in range(20)}


def test_writers_through_two_kills_store_everything_once(service: Orchestrator) -> None:
    """The kill comes at any point of a write, also between its commit and its reply."""
    stop = threading.Event()
    done: Counter[str] = Counter()
    failed: list[dict[str, Any]] = []

    with MemoryClient(service.endpoint, timeout_ms=60_000) as client:

        def write(number: int) -> None:
            turn = 0
            while not stop.is_set():
                text = f"{number}/{turn}"
                reply = client.add_memory(text)
                if reply["status"] == "success":
                    done[text] += 1
                else:
                    failed.append(reply)
                turn += 1

        writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for writer in writers:
            writer.start()
        for _ in range(2):
            seen = len(done)
            wait_until(lambda seen=seen: len(done) > seen + 50)  # type: ignore[misc]
            service.kill()
            service.start()
        seen = len(done)
        wait_until(lambda: len(done) > seen + 50)
        stop.set()
        for writer in writers:
            writer.join()
    assert failed == []
    assert stored(service) == done


def wait_until(condition: Any, timeout_s: float = 60.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)
