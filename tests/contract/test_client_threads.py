"""MemoryClient among threads and processes."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from memory_client import MemoryClient
from tests.contract.fake_orchestrator import FakeOrchestrator, descriptors, drop, ok

ROOT = Path(__file__).resolve().parents[2]


def test_many_threads_share_a_client(server: FakeOrchestrator) -> None:
    failures: list[Any] = []

    with MemoryClient(server.endpoint, timeout_ms=30_000) as client:
        server.default = lambda request: ok(echo=request["data"]["content"])(request)

        def work(number: int) -> None:
            for turn in range(50):
                text = f"{number}/{turn}"
                if (reply := client.add_memory(text)).get("echo") != text:
                    failures.append(reply)

        before = descriptors()
        threads = [threading.Thread(target=work, args=(number,)) for number in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(server.requests) == 32 * 50
        end_s = time.monotonic() + 30.0
        while descriptors() > before + 12:  # the sockets of ended threads are closed, without close()
            assert time.monotonic() < end_s, (before, descriptors())
            time.sleep(0.01)


def test_close_ends_calls_of_other_threads(server: FakeOrchestrator) -> None:
    server.default = drop
    replies: list[dict[str, Any]] = []
    client = MemoryClient(server.endpoint, timeout_ms=50_000)
    thread = threading.Thread(target=lambda: replies.append(client.add_memory("x")))
    thread.start()
    server.wait_for(1)
    started_s = time.monotonic()
    client.close()
    thread.join()
    assert time.monotonic() - started_s < 10.0
    assert [(reply["error_code"], reply["outcome"]) for reply in replies] == [("client_closed", "unknown")]


def test_an_interrupted_call_leaves_a_usable_client(server: FakeOrchestrator) -> None:
    script = f"""
import os, signal, threading
from memory_client import MemoryClient
client = MemoryClient({server.endpoint!r}, timeout_ms=20_000)
threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    client.add_memory("x")
except KeyboardInterrupt:
    assert client.stats()["status"] == "success"
    client.close()
    os.write(1, b"fine")
"""
    server.script.append(drop)
    assert run_python(script) == "fine"


def test_a_forked_child_uses_a_socket_of_its_own(server: FakeOrchestrator) -> None:
    script = f"""
import os, sys
from memory_client import MemoryClient
client = MemoryClient({server.endpoint!r}, timeout_ms=20_000)
assert client.add_memory("parent")["status"] == "success"
child = os.fork()
if child == 0:
    fine = all(client.add_memory("child")["status"] == "success" for _ in range(20))
    client.close()
    os._exit(0 if fine else 1)
for _ in range(20):
    assert client.add_memory("parent")["status"] == "success"
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert client.add_memory("parent")["status"] == "success"
client.close()
os.write(1, b"fine")
"""
    assert run_python(script) == "fine"
    assert len(server.bodies_by_id) == 42


def test_a_child_that_ends_as_usual_is_quiet(server: FakeOrchestrator) -> None:
    script = f"""
import os, sys
from memory_client import MemoryClient
client = MemoryClient({server.endpoint!r})
client.stats()
child = os.fork()
client.stats()
if child:
    assert os.waitpid(child, 0)[1] == 0
    os.write(1, b"fine")
"""
    assert run_python(script, warnings="default") == "fine"


def test_importing_the_client_stays_light() -> None:
    heavy = ["asyncio", "yaml", "structlog", "tenacity", "msgspec", "numpy", "torch", "aiosqlite", "redis", "hnswlib"]
    script = f"""
import sys, os
import memory_client
os.write(1, " ".join(name for name in {heavy!r} if name in sys.modules).encode())
"""
    assert run_python(script) == ""


def run_python(script: str, warnings: str = "error") -> str:
    """The script's standard output. A warning or a word on standard error fails the test."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


FORGOTTEN = """
import asyncio, gc, sys
from memory_client import AsyncMemoryClient, MemoryClient

memory = MemoryClient(sys.argv[1], timeout_ms=2000)


def ask():
    return memory.stats()  # the function knows the module, the module the client: a cycle that nobody closes


class Agent:
    def __init__(self, client):
        self.client, self.me = client, self


async def asynchronous():
    await Agent(AsyncMemoryClient(sys.argv[1], timeout_ms=2000)).client.stats()
    gc.collect()


ask()
Agent(MemoryClient(sys.argv[1], timeout_ms=2000)).client.stats()
gc.collect()
asyncio.run(asynchronous())
print("done")
"""


def test_clients_that_nobody_closed_hold_up_nothing(server: FakeOrchestrator) -> None:
    """A context that is collected before its sockets waits for them for ever."""
    done = subprocess.run(
        [sys.executable, "-c", FORGOTTEN, server.endpoint], cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
