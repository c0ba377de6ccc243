"""The health manager as a whole, in this process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from memory_system.errors import CannotStart
from memory_system.health_settings import ErrorBusSettings, HealthSettings
from memory_system.settings import Settings
from system_health_manager import HealthManager
from tests.support.process import free_port


def settings(folder: Path) -> Settings:
    ports = HealthSettings(free_port(), free_port(), free_port(), free_port())
    return Settings(health=ports, error_bus=ErrorBusSettings(history_path=str(folder / "health.db")))


@contextlib.asynccontextmanager
async def running(folder: Path) -> AsyncIterator[HealthManager]:
    manager = HealthManager(settings(folder))
    task = asyncio.create_task(manager.run())
    try:
        for _ in range(200):
            if manager.watch.picture():
                break
            await asyncio.sleep(0.05)
        yield manager
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def test_a_port_in_use_ends_the_start_and_leaves_nothing_open(tmp_path: Path) -> None:
    """Sockets that were left to the garbage collector would warn, which pytest turns into an error."""

    async def use() -> None:
        chosen = settings(tmp_path)
        with socket.create_server(("127.0.0.1", chosen.health.publish_port)), pytest.raises(CannotStart):
            await HealthManager(chosen).run()

    asyncio.run(use())
    gc.collect()


def test_a_failure_of_the_history_does_not_report_itself_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(rows: Any) -> None:
        raise ValueError("a listener that fails at every commit, that of its own failure too")

    async def use() -> None:
        async with running(tmp_path) as manager:
            manager.bus.history.on_commit = failing
            caplog.clear()
            manager.bus.report("second", "its commit fails to be told")
            await asyncio.sleep(1.0)

    with caplog.at_level(logging.WARNING, "memory_system"):
        asyncio.run(use())
    told = [record for record in caplog.records if "commit_listener_failed" in str(record.msg)]
    assert 1 <= len(told) <= 10


def test_states_are_told_in_the_name_of_the_component_and_what_was_asked_for_is_no_alarm(tmp_path: Path) -> None:
    told: list[tuple[str, str, str]] = []

    async def use() -> None:
        async with running(tmp_path) as manager:
            manager.bus.report = lambda error_type, _message, severity, *, agent, details: told.append(  # type: ignore[method-assign, misc, assignment]
                (agent, error_type, severity)
            )
            for cause in ("died", "stopped"):
                manager._announce("planner", {"state": "down", "cause": cause, "reason": "it ended"})
            manager._announce("planner", {"state": "healthy", "cause": "", "reason": "it answers"})

    asyncio.run(use())
    assert told == [
        ("planner", "component_down", "critical"),
        ("planner", "component_stopped", "info"),
        ("planner", "component_recovered", "info"),
    ]


Told = list[tuple[str, str, str]]


def listening(manager: HealthManager, told: Told) -> None:
    manager.bus.report = lambda error_type, _message, severity, *, agent=None, details: told.append(  # type: ignore[method-assign, misc, assignment]
        (agent, error_type, severity)
    )


def test_a_hang_and_the_end_that_follows_it_are_one_alarm(tmp_path: Path) -> None:
    told: Told = []

    async def use() -> None:
        async with running(tmp_path) as manager:
            listening(manager, told)
            for state, cause in (("down", "hang"), ("down", "died"), ("starting", "starting"), ("down", "died")):
                manager._announce("planner", {"state": state, "cause": cause, "reason": "r"})
            manager._announce("planner", {"state": "down", "cause": "given_up", "reason": "r"})

    asyncio.run(use())
    assert told == [("planner", "component_down", "critical")] * 3


def test_a_planned_stop_is_no_alarm(tmp_path: Path) -> None:
    told: Told = []

    async def use() -> None:
        async with running(tmp_path) as manager:
            listening(manager, told)
            for state, cause in (("degraded", "stopping"), ("down", "stopped"), ("down", "stopped")):
                manager._announce("planner", {"state": state, "cause": cause, "reason": "r"})

    asyncio.run(use())
    assert told == [("planner", "component_stopping", "info"), ("planner", "component_stopped", "info")]


def test_trouble_is_remembered_over_a_restart_of_the_manager(tmp_path: Path) -> None:
    told: Told = []
    beat = {"component": "planner", "pid": 7, "state": "healthy", "interval_s": 60.0}

    async def before() -> None:
        async with running(tmp_path) as manager:
            manager._on_heartbeat(beat, "")
            manager._on_heartbeat({**beat, "component": "archiver", "state": "down"}, "")
            manager._on_heartbeat({**beat, "component": "scout", "state": "stopped"}, "")
            await asyncio.sleep(0.1)
            await manager._note()

    async def after() -> None:
        async with running(tmp_path) as manager:
            found = {each["component"]: each for each in manager.watch.picture()}
            assert found["planner"]["state"] == "starting"
            assert found["planner"]["last_heartbeat_at"] is not None
            assert (found["archiver"]["state"], found["archiver"]["cause"]) == ("down", "silent")
            assert "scout" not in found, "it signed off"
            listening(manager, told)
            manager._on_heartbeat({**beat, "component": "archiver"}, "")
            manager._on_heartbeat(beat, "")

    asyncio.run(before())
    asyncio.run(after())
    assert told == [("archiver", "component_recovered", "info")]
