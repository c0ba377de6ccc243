"""What the orchestrator reports to the error bus: its errors, the loss and the return of its parts, that it lives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memory_system.reporting import bus_endpoint
from memory_system.runtime import Runtime
from memory_system.settings import load_settings
from tests.support.fake_bus import FakeBus
from tests.support.process import Orchestrator, free_port, running_orchestrator, wait_until
from tests.support.service import running_service
from tests.support.valkey import running_valkey
from tests.support.wire import environment, request_id

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

SECRET = "the-text-that-nobody-else-may-read"


@pytest.fixture
def bus() -> Iterator[FakeBus]:
    with FakeBus() as bus:
        yield bus


def reporting_to(bus: FakeBus, **overrides: Any) -> dict[str, Any]:
    return {"error_bus__enabled": True, "error_bus__address": bus.address, "health__heartbeat_s": 0.5, **overrides}


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_an_internal_error_is_reported_with_its_request_and_without_content(tmp_path: Path, bus: FakeBus) -> None:
    async def scenario() -> None:
        async with running_service(tmp_path, **reporting_to(bus)) as service:
            memory_id = await service.add(SECRET)

            def broken(_call: Any, params: Any) -> dict[str, Any]:
                raise RuntimeError(f"cannot handle {params.memory_id}: {SECRET}")

            service.runtime.dispatcher._handlers["get_memory"] = broken  # type: ignore[index]
            number = request_id()
            await service.fails("internal_error", "get_memory", {"request_id": number}, memory_id=memory_id)
            (event,) = await asyncio.to_thread(bus.wait, "internal_error")
            assert event["agent"] == "orchestrator"
            assert event["severity"] == "error"
            assert event["request_id"] == number
            assert event["details"]["action"] == "get_memory"
            assert event["details"]["error"] == "RuntimeError"
            assert SECRET not in json.dumps(bus.events())

    asyncio.run(scenario())


def test_a_defect_in_a_write_is_an_internal_error_too(
    tmp_path: Path, bus: FakeBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError(SECRET)

    async def scenario() -> None:
        async with running_service(tmp_path, **reporting_to(bus)) as service:
            monkeypatch.setattr("memory_system.storage.memories.insert", broken)
            number = request_id()
            await service.fails("internal_error", "add_memory", {"request_id": number}, content=SECRET)
            (event,) = await asyncio.to_thread(bus.wait, "internal_error")
            assert (event["request_id"], event["details"]["error"]) == (number, "ValueError")
            assert SECRET not in json.dumps(bus.events())

    asyncio.run(scenario())


def test_what_nobody_caught_is_reported(tmp_path: Path, bus: FakeBus) -> None:
    def broken() -> None:
        raise RuntimeError(SECRET)

    async def scenario() -> None:
        async with running_service(tmp_path, **reporting_to(bus)):
            asyncio.get_running_loop().call_soon(broken)
            (event,) = await asyncio.to_thread(bus.wait, "unhandled_exception")
            assert (event["severity"], event["details"]["error"]) == ("error", "RuntimeError")
            assert SECRET not in json.dumps(bus.events())

    asyncio.run(scenario())


def test_a_failed_sync_is_critical_and_still_told(
    tmp_path: Path, bus: FakeBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program ends then, and what it has to say leaves it before."""

    async def scenario() -> None:
        fatal = asyncio.Event()
        settings = load_settings(environ={**environment(tmp_path, reporting_to(bus)), "MEMORY_CONFIG": os.devnull})
        runtime = Runtime(settings, on_fatal=lambda _: fatal.set(), health=dict)
        try:
            await runtime.start()
            monkeypatch.setattr(runtime._writer._runner, "run", _failing_sync)
            body = b'{"action": "add_memory", "data": {"content": "x"}}'
            reply = json.loads(await runtime.dispatcher.answer(body))
            assert reply["error_code"] == "shutting_down"
            await fatal.wait()
        finally:
            await runtime.close()
        (event,) = bus.events("writer_stopped")
        assert event["severity"] == "critical"
        assert event["details"]["error"] == "OperationalError"

    asyncio.run(scenario())


def _failing_sync(_waiting: Any) -> Any:
    raise sqlite3.OperationalError("disk I/O error")


def test_what_stands_in_the_way_of_a_start_is_reported(tmp_path: Path, bus: FakeBus) -> None:
    (tmp_path / "memory.db").write_bytes(b"no database, and longer than a header of one" * 10)
    with running_orchestrator(tmp_path, start=False, **reporting_to(bus)) as orchestrator:
        with orchestrator.launch() as process:
            assert process.wait(45) == 1
        (event,) = bus.events("cannot_start")
        assert event["severity"] == "critical"
        assert "memory.db" in event["message"]


def test_a_killed_embedding_worker_and_its_return_are_reported(tmp_path: Path, bus: FakeBus) -> None:
    settings = reporting_to(bus, embedding__provider="sentence-transformers", embedding__threads=1)
    with running_orchestrator(tmp_path, **settings) as orchestrator:
        wait_until(lambda: orchestrator.ask("health_check")["state"] == "healthy", "the model and the index", 60.0)
        assert bus.events() == []  # the first start is no recovery
        (worker,) = children(orchestrator.pid)
        os.kill(worker, signal.SIGKILL)
        (lost,) = bus.wait("embedding_worker_down", 45.0)
        assert lost["severity"] == "error"
        bus.wait_for_heartbeat(45.0, component="orchestrator", state="degraded")
        (back,) = bus.wait("embedding_worker_ready", 60.0)
        assert back["severity"] == "info"
        assert back["timestamp"] > lost["timestamp"]
        assert readiness(orchestrator)["embedding"] == "ready"


def test_redis_that_dies_and_returns_is_reported_once_each(tmp_path: Path, bus: FakeBus) -> None:
    port = free_port()
    with running_valkey(tmp_path / "valkey", password="hush") as redis:
        patient = {"redis__reset_timeout_s": 0.2, "redis__timeout_ms": 5000}
        settings = reporting_to(bus, redis__url=redis.url, metrics__orchestrator_port=port, **patient)
        with running_orchestrator(tmp_path, **settings) as orchestrator:
            wait_until(lambda: readiness(orchestrator)["redis"] == "ready", "Redis")
            assert orchestrator.ask("health_check")["breakers"] == {"redis": "closed"}
            for times in (1, 2):
                redis.kill()
                wait_until(lambda: _uses_redis(orchestrator)["redis"] == "unavailable", "the loss is noticed")
                lost = bus.wait("redis_unavailable", count=times)[-1]
                assert lost["severity"] == "warning"
                assert orchestrator.ask("health_check")["breakers"]["redis"] in ("open", "half_open")
                redis.start()
                back = bus.wait("redis_ready", count=times)[-1]
                assert back["severity"] == "info"
            assert [event["error_type"] for event in bus.events()] == ["redis_unavailable", "redis_ready"] * 2
            assert "hush" not in json.dumps(bus.events())
            errors = 'memory_system_errors_total{error_type="redis_unavailable",severity="warning"} 2.0'
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as reply:
                assert errors in reply.read().decode()


def test_it_says_that_it_lives_and_when_it_stops(tmp_path: Path, bus: FakeBus) -> None:
    with running_orchestrator(tmp_path, **reporting_to(bus)) as orchestrator:
        beat = bus.wait_for_heartbeat(component="orchestrator", state="healthy")
        assert beat["pid"] == orchestrator.pid
        assert abs(beat["timestamp"] - time.time()) < 30
        assert beat["memory_bytes"] == pytest.approx(orchestrator.resident_mb() * 2**20, rel=0.3)
        assert beat["index_lag"] == beat["in_flight"] == 0
        number = len(bus.heartbeats())
        wait_until(lambda: len(bus.heartbeats()) >= number + 3, "further heartbeats")
        assert orchestrator.terminate() == 0
        bus.wait_for_heartbeat(component="orchestrator", state="stopped")


def test_without_a_bus_it_works_and_ends_as_fast(tmp_path: Path) -> None:
    nobody = f"tcp://127.0.0.1:{free_port()}"
    with running_orchestrator(tmp_path, error_bus__enabled=True, error_bus__address=nobody) as orchestrator:
        for number in range(50):
            assert orchestrator.ask("add_memory", content=f"{number}")["status"] == "success"
        begun_s = time.monotonic()
        assert orchestrator.terminate() == 0
        assert time.monotonic() - begun_s < 15.0


def test_it_reports_to_the_managers_port_on_this_host_by_default(tmp_path: Path) -> None:
    settings = load_settings(environ={"MEMORY_CONFIG": os.devnull})
    assert bus_endpoint(settings) == "tcp://127.0.0.1:7152"
    for overrides, expected in (
        ({"network__bind": "::1", "health__report_port": 9}, "tcp://[::1]:9"),
        ({"error_bus__address": "tcp://10.0.0.2:7152"}, "tcp://10.0.0.2:7152"),
        ({"error_bus__enabled": False, "error_bus__address": "tcp://10.0.0.2:7152"}, ""),
    ):
        environ = {f"MEMORY__{name.upper()}": str(value) for name, value in overrides.items()}
        assert bus_endpoint(load_settings(environ={"MEMORY_CONFIG": os.devnull, **environ})) == expected


def _uses_redis(orchestrator: Orchestrator) -> dict[str, str]:
    """A search asks Redis for its result, so that its loss is noticed."""
    orchestrator.ask("semantic_search", query=f"query {time.monotonic()}")
    return readiness(orchestrator)


def readiness(orchestrator: Orchestrator) -> dict[str, str]:
    found: dict[str, str] = orchestrator.ask("health_check")["readiness"]
    return found
