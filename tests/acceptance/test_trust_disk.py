"""A disk that is slow, or whose every sync may fail: nothing is acknowledged that is not there, and reads go on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.test_disk import WrappedOrchestrator, contents, must_work
from tests.support.fake_bus import FakeBus
from tests.support.service import Reply

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

WRITES = 30


def injecting(log: Path, calls: str, what: str) -> list[str]:
    """A wrapper under which these system calls of the program it becomes meet with something."""
    command = ["strace", "-D", "-f", "--seccomp-bpf", "-qq", "-o", str(log), "-e", f"trace={calls}"]
    return [*command, "-e", f"inject={calls}:{what}"]


@contextlib.contextmanager
def faulty_disk(folder: Path, calls: str, what: str, **overrides: object) -> Iterator[WrappedOrchestrator]:
    wrapper = injecting(folder / "strace", calls, what)
    must_work([*wrapper, "true"], "no fault can be injected")
    orchestrator = WrappedOrchestrator(folder, wrapper, **overrides)
    try:
        yield orchestrator
    finally:
        orchestrator.close()


# -- a sync that fails ------------------------------------------------------------------------------------------------


def failed_sync(folder: Path, call: int) -> str:
    """What became of a service whose fdatasync fails from the `call`-th of a thread on: `refused to start`, `ended`, or
    `went on` where so many never came."""
    with faulty_disk(folder, "fdatasync", f"error=EIO:when={call}+") as orchestrator:
        orchestrator.start(wait=False)
        told = replies(orchestrator)
        process = orchestrator.process
        assert process is not None
        if len(told) == WRITES and all(reply and reply["status"] == "success" for reply in told.values()):
            orchestrator.kill()
            outcome = "went on"
        else:
            assert process.wait(15) == 1
            outcome = "ended" if told else "refused to start"
            assert outcome == "ended" or "disk I/O error" in orchestrator.errors()
        stored = contents(orchestrator.database) if told else []
        for content, reply in told.items():
            if reply is not None:
                assert (content in stored) == (reply["status"] == "success"), (content, reply)
        orchestrator.wrapper = []  # started anew, on a disk that works
        orchestrator.restart()
        assert orchestrator.ask("add_memory", content="after")["status"] == "success"
        assert orchestrator.ask("stats")["memories"] == len(stored) + 1
    return outcome


def replies(orchestrator: WrappedOrchestrator) -> dict[str, Reply | None]:
    """What the service said to each write, until it said nothing more; None: no answer."""
    told: dict[str, Reply | None] = {}
    deadline_s = time.monotonic() + 30.0
    with contextlib.suppress(AssertionError):  # it ended
        orchestrator.wait_ready(30.0)
        for number in range(WRITES):
            content = f"written {number}"
            told[content] = None
            while orchestrator.alive and told[content] is None and time.monotonic() < deadline_s:
                with contextlib.suppress(TimeoutError):
                    around = {"request_id": f"request-{number:08d}"}
                    told[content] = orchestrator.ask("add_memory", around, content=content, timeout_s=2.0)
            if told[content] is None:
                break
    return told


@pytest.mark.parametrize(("call", "outcome"), [(3, "refused to start"), (16, "ended"), (28, "ended")])
def test_wherever_a_sync_fails_nothing_acknowledged_is_lost(tmp_path: Path, call: int, outcome: str) -> None:
    assert failed_sync(tmp_path, call) == outcome


# -- a sync that takes its time ---------------------------------------------------------------------------------------


def slow_disk(folder: Path, delay_ms: int, writes: int) -> tuple[int, float]:
    """Write while each sync takes so long: reads answered meanwhile, and the longest of them in seconds."""
    bus = FakeBus()
    settings = {"error_bus__enabled": True, "error_bus__address": bus.address, "health__heartbeat_s": 0.5}
    what = f"delay_enter={delay_ms * 1000}"
    with bus, faulty_disk(folder, "fdatasync,fsync", what, **settings) as orchestrator:
        orchestrator.start(wait=False)
        orchestrator.wait_ready(60.0)
        memory_id = orchestrator.ask("add_memory", content="the first", timeout_s=60)["memory_id"]
        ended = threading.Event()
        statuses: list[str] = []

        def write() -> None:
            for number in range(writes):
                statuses.append(orchestrator.ask("add_memory", content=f"number {number}", timeout_s=60)["status"])
            ended.set()

        writing = threading.Thread(target=write)
        beats = len(bus.heartbeats())
        began_s = time.monotonic()
        writing.start()
        reads, longest_s = 0, 0.0
        while not ended.is_set():
            asked_s = time.monotonic()
            assert orchestrator.ask("get_memory", memory_id=memory_id, touch=False)["status"] == "success"
            longest_s = max(longest_s, time.monotonic() - asked_s)
            reads += 1
        writing.join()
        took_s = time.monotonic() - began_s
        assert statuses == ["success"] * writes
        assert took_s > writes * delay_ms / 1000.0, "the disk was not slow"
        assert len(bus.heartbeats()) - beats >= int(took_s / 0.5) - 2
    return reads, longest_s


def test_reads_and_heartbeats_go_on_while_a_sync_takes_its_time(tmp_path: Path) -> None:
    writes = 6
    reads, _ = slow_disk(tmp_path, 300, writes)
    assert reads > 2 * writes  # were they to wait for the syncs, there would be about one for each
