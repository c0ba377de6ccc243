"""A run of maintenance happens once for its request_id, is noted in the store, and can be watched and joined."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memory_system import protocol
from memory_system.errors import StorageFull
from memory_system.protocol import ADMIN_ACTIONS
from memory_system.router import Sender
from memory_system.service.run import Run
from memory_system.service.runs import Asker
from memory_system.storage import runs as stored_runs
from tests.support.runs import DAY_S, DECAY, STEADY, Held, held, is_held, old_memories, reported
from tests.support.service import Reply, Service, decode, encode, envelope, request_id, running_service, service_test

REQUESTS: dict[str, dict[str, Any]] = {
    "undo_consolidation": {"memory_id": "mem-1"},
    "import_memories": {"records": []},
}


async def from_address(service: Service, action: str, address: str) -> Reply:
    answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    body = encode(envelope(action, REQUESTS.get(action, {})), service.encoding)
    service.runtime.dispatcher.handle(body, answered.set_result, b"peer", Sender(address, None))
    return decode(await answered, service.encoding)


@service_test()
async def test_admin_actions_are_for_this_machine(service: Service) -> None:
    for action in sorted(ADMIN_ACTIONS):
        for address in ("198.51.100.3", "2001:db8::7", "::ffff:198.51.100.3", "unknown"):
            reply = await from_address(service, action, address)
            assert reply["error_code"] == "access_denied", reply
            assert action in reply["message"]
    assert service.count("maintenance_runs") == 0
    for address in ("", "127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"):
        assert (await from_address(service, "list_runs", address))["status"] == "success"
    assert (await from_address(service, "add_memory", "198.51.100.3"))["error_code"] == "invalid_field"
    assert (await from_address(service, "stats", "198.51.100.3"))["status"] == "success"


@service_test(**STEADY)
async def test_a_run_is_a_row(service: Service) -> None:
    key = request_id()
    reply = await service.ok("run_decay", {"request_id": key, "agent_id": "me"}, dry_run=True, namespaces=["default"])
    (run,) = (await service.ok("list_runs"))["results"]
    asked = {"namespaces": ["default"], "as_of": None, "dry_run": True}
    assert {name: run[name] for name in ("job", "request_id", "asked", "asked_by", "dry_run", "state", "error")} == {
        "job": "decay",
        "request_id": key,
        "asked": asked,
        "asked_by": "me",
        "dry_run": True,
        "state": "done",
        "error": None,
    }
    for name in ("run_id", "as_of", "started_at", "finished_at", "counts", "changes", "digest"):
        assert run[name] == reply[name], name
    assert run["started_at"] <= run["finished_at"]
    assert "results" not in run
    assert "progress" not in run


@service_test(**DECAY)
async def test_a_repeated_request_gets_the_stored_result(service: Service) -> None:
    await old_memories(service, [0.15, 0.15, 1.0])
    key = {"request_id": request_id()}
    first = await service.ok("run_decay", key)
    assert first["changes"] == 3
    assert "replayed" not in first
    service.clock.ahead_s += DAY_S
    await old_memories(service, [0.15])
    again = await service.ok("run_decay", key)
    assert again["replayed"] is True
    assert reported(again) == reported(first)
    assert again["run_id"] == first["run_id"]
    assert (again["started_at"], again["finished_at"]) == (first["started_at"], first["finished_at"])
    assert (await service.ok("list_runs"))["count"] == 1


@service_test(**STEADY)
async def test_a_request_id_is_for_one_run(service: Service) -> None:
    key = {"request_id": request_id()}
    await service.ok("run_decay", key, dry_run=True)
    await service.fails("idempotency_mismatch", "run_decay", key)
    await service.fails("idempotency_mismatch", "run_decay", key, dry_run=True, namespaces=["default"])
    await service.fails("idempotency_mismatch", "run_cleanup", key, dry_run=True)
    await service.ok("run_decay", key, dry_run=True, limit=7)  # how much is shown is not what is done
    assert service.count("maintenance_runs") == 1


@service_test(**STEADY)
async def test_a_repeated_request_joins_the_run_under_way(service: Service) -> None:
    async with held(service) as job:
        key = {"request_id": request_id()}
        callers = [asyncio.create_task(service.ok("run_decay", key)) for _ in range(3)]
        await is_held(job)
        await service.fails("idempotency_mismatch", "run_decay", key, dry_run=True)
        await service.fails("idempotency_mismatch", "run_cleanup", key)
        late = asyncio.create_task(service.ok("run_decay", key))
        await asyncio.sleep(0.01)
        job.go.set()
        replies = await asyncio.gather(*callers, late)
    assert len(job.runs) == 1
    assert sorted(reply.get("joined", False) for reply in replies) == [False, True, True, True]
    assert all(reported(reply) == reported(replies[0]) for reply in replies)
    assert service.count("maintenance_runs") == 1


@service_test(**STEADY)
async def test_of_one_job_there_is_one_run_at_a_time(service: Service) -> None:
    done = {"request_id": request_id()}
    await service.ok("run_decay", done)
    async with held(service) as job:
        first = asyncio.create_task(service.ok("run_decay"))
        await is_held(job)
        refused = await service.fails("busy", "run_decay", dry_run=True)
        assert refused["details"] == {"run_id": job.runs[0].run_id, "retry_after_ms": 1000}
        assert refused["retryable"]
        assert (await service.ok("run_decay", done))["replayed"], "a result is given out all the same"
        await service.ok("run_cleanup")
        await service.ok("run_checkpoint")
        job.go.set()
        await first
    await service.ok("run_decay")


@service_test(**STEADY)
async def test_two_at_the_same_instant(service: Service) -> None:
    async with held(service) as job:
        both = [asyncio.create_task(service.ask("run_decay")) for _ in range(2)]
        await is_held(job)
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        job.go.set()
        outcomes = sorted(reply.get("error_code", "done") for reply in await asyncio.gather(*both))
    assert outcomes == ["busy", "done"]
    assert len(job.runs) == 1


@service_test(**STEADY)
async def test_progress_can_be_watched(service: Service) -> None:
    async with held(service) as job:
        caller = asyncio.create_task(service.ok("run_decay"))
        await is_held(job)
        (run,) = (await service.ok("list_runs", run_state="running"))["results"]
        assert run["progress"] == {"part": "waiting", "done": 1, "total": 2}
        assert run["finished_at"] is None
        assert "counts" not in run
        figures = (await service.ok("health_check"))["maintenance"]
        assert figures == {"decay": {"run_id": run["run_id"], "part": "waiting", "done": 1, "total": 2}}
        job.runs[0].progress("waiting", 2, 2)
        assert (await service.ok("list_runs"))["results"][0]["progress"]["done"] == 2
        job.go.set()
        await caller
    assert (await service.ok("health_check"))["maintenance"] == {}
    assert (await service.ok("list_runs", run_state="running"))["count"] == 0


@service_test(**STEADY)
async def test_a_run_goes_on_without_its_caller(service: Service) -> None:
    async with held(service) as job:
        key = {"request_id": request_id()}
        caller = asyncio.create_task(service.ok("run_decay", key))
        await is_held(job)
        caller.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await caller
        assert (await service.ok("list_runs"))["results"][0]["state"] == "running"
        again = asyncio.create_task(service.ok("run_decay", key))
        await asyncio.sleep(0.01)
        job.go.set()
        reply = await again
    assert reply["changes"] == 1
    assert len(job.runs) == 1


@service_test(**STEADY)
async def test_a_run_that_fails_is_told_and_taken_up_again(service: Service) -> None:
    key = {"request_id": request_id()}

    async def broken(_namespaces: Any, run: Run) -> None:
        raise RuntimeError("a defect with the secret words of a memory")

    sweeps = service.runtime._maintaining._sweeps
    sweeps.decay = broken  # type: ignore[method-assign]
    try:
        failed = await service.fails("internal_error", "run_decay", key)
        assert "secret" not in json.dumps(failed)
        (run,) = (await service.ok("list_runs"))["results"]
        assert run["state"] == "failed"
        assert run["error"]["error_code"] == "internal_error"
        assert run["finished_at"] is not None
    finally:
        del sweeps.decay
    service.clock.ahead_s += 100.0
    reply = await service.ok("run_decay", key)
    assert (reply["run_id"], reply["as_of"]) == (run["run_id"], run["as_of"])
    (run,) = (await service.ok("list_runs"))["results"]
    assert (run["state"], run["error"]) == ("done", None)


def test_a_service_that_stops_interrupts_its_runs(tmp_path: Path) -> None:
    key = {"request_id": request_id()}

    async def first() -> tuple[Reply, float]:
        async with running_service(tmp_path, **STEADY) as service, held(service) as job:
            caller = asyncio.create_task(service.ask("run_decay", key))
            await is_held(job)
            service.runtime.stop_writing_after(1.0)
            reply = await caller
            await service.fails("shutting_down", "run_decay")
            return reply, job.runs[0].as_of_s

    async def second() -> tuple[Reply, Reply]:
        async with running_service(tmp_path, **STEADY) as service:
            (run,) = (await service.ok("list_runs"))["results"]
            service.clock.ahead_s = 50.0
            return run, await service.ok("run_decay", key)

    stopped, as_of = asyncio.run(first())
    assert stopped["error_code"] == "shutting_down"
    assert stopped["retryable"]
    run, reply = asyncio.run(second())
    assert run["state"] == "interrupted"
    assert run["finished_at"] is not None
    assert (reply["run_id"], reply["as_of"]) == (run["run_id"], as_of)
    assert "replayed" not in reply


def test_closing_alone_interrupts_too(tmp_path: Path) -> None:
    async def first() -> Reply:
        async with running_service(tmp_path, **STEADY) as service, held(service) as job:
            caller = asyncio.create_task(service.ask("run_decay"))
            await is_held(job)
            await service.runtime.close()
            return await caller

    async def second() -> list[str]:
        async with running_service(tmp_path, **STEADY) as service:
            return [run["state"] for run in (await service.ok("list_runs"))["results"]]

    assert asyncio.run(first())["error_code"] == "shutting_down"
    assert asyncio.run(second()) == ["interrupted"]


@service_test(**STEADY)
async def test_whoever_waits_for_a_run_may_be_cancelled(service: Service) -> None:
    runs, job = service.runtime._runs, Held()
    asker = Asker("me", request_id(), service.clock.time(), None)

    def ask() -> asyncio.Task[Reply]:
        return asyncio.create_task(runs.perform(asker, "decay", partial(job.work, None), asked={}))

    first = ask()
    await is_held(job)
    second = ask()
    await asyncio.sleep(0)
    for each in (second, first):
        each.cancel()
        with pytest.raises(asyncio.CancelledError):
            await each
    third = ask()
    await asyncio.sleep(0)
    job.go.set()
    assert (await third)["joined"]
    assert len(job.runs) == 1


@service_test(**STEADY)
async def test_a_run_that_ends_while_it_is_looked_up_is_not_done_twice(service: Service) -> None:
    key = {"request_id": request_id()}
    first = await service.ok("run_decay", key)

    async def not_yet(*_: Any) -> None:
        return None

    with mock.patch.object(stored_runs, "by_request_id", not_yet):
        again = await service.ok("run_decay", key)
        await service.fails("idempotency_mismatch", "run_cleanup", key)
    assert again["replayed"]
    assert again["finished_at"] == first["finished_at"]


def test_a_process_that_was_killed_leaves_an_interrupted_run(tmp_path: Path) -> None:
    """The row as kill -9 leaves it."""
    key = request_id()

    async def make() -> Path:
        async with running_service(tmp_path, **STEADY) as service:
            await service.ok("run_decay", {"request_id": key})
            await service.ok("run_cleanup")
            return service.path

    async def again() -> None:
        async with running_service(tmp_path, **STEADY) as service:
            cleanup, decay = (await service.ok("list_runs"))["results"]
            assert (decay["state"], cleanup["state"]) == ("interrupted", "done")
            reply = await service.ok("run_decay", {"request_id": key})
            assert reply["run_id"] == decay["run_id"]
            assert reply["as_of"] == 1.7e9
            assert [run["state"] for run in (await service.ok("list_runs"))["results"]] == ["done", "done"]

    path = asyncio.run(make())
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(
            "UPDATE maintenance_runs SET state = 'running', finished_at = NULL, result = NULL, as_of = 1.7e9 "
            "WHERE job = 'decay'"
        )
    asyncio.run(again())


@service_test(**STEADY)
async def test_list_runs_finds_and_pages(service: Service) -> None:
    for _ in range(3):
        await service.ok("run_decay")
        await service.ok("run_checkpoint")
    everything = await service.walk("list_runs", limit=2)
    assert [run["run_id"] for run in everything] == [6, 5, 4, 3, 2, 1]
    assert [run["run_id"] for run in await service.walk("list_runs", limit=1, job="decay")] == [5, 3, 1]
    assert (await service.ok("list_runs", job="decay", limit=1))["results"][0]["run_id"] == 5
    assert (await service.ok("list_runs", run_state="failed"))["results"] == []
    (one,) = (await service.ok("list_runs", run_id=4))["results"]
    assert one["job"] == "checkpoint"
    assert one["results"] == []
    assert "log_frames" in one
    page = await service.ok("list_runs", limit=2)
    await service.fails("invalid_cursor", "list_runs", job="decay", cursor=page["next_cursor"])


@service_test(**STEADY)
async def test_legacy_callers_can_run_too(service: Service) -> None:
    """Their request_id is echoed and names no run."""
    for _ in range(2):
        reply = await service.send({"action": "run_decay", "request_id": "short", "data": {"unknown": 1}})
        assert reply["status"] == "success"
        assert reply["request_id"] == "short"
    assert service.count("maintenance_runs") == 2


# -- the clock ---------------------------------------------------------------------------------------------------------

IRREVERSIBLE = ("run_decay", "run_cleanup", "run_consolidation")


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
@service_test()
async def test_nothing_irreversible_while_the_clock_is_unsettled(service: Service, jump_s: float) -> None:
    await service.add("due", importance=0.05, expires_at=service.clock.time() + 3000.0)
    service.clock.ahead_s = jump_s
    for action in IRREVERSIBLE:
        refused = await service.fails("clock_unsettled", action)
        assert refused["retryable"]
        assert 590_000 < refused["details"]["retry_after_ms"] <= 600_000
        assert (await service.ok(action, dry_run=True))["dry_run"]
    for action in ("run_checkpoint", "run_integrity_check", "run_snapshot"):
        await service.ok(action)
    assert {run["dry_run"] for run in (await service.ok("list_runs"))["results"] if run["job"] == "decay"} == {True}
    assert service.count("memories") == 1
    assert service.rows("SELECT state FROM memories") == [("active",)]


@service_test(storage__idempotency_ttl_h=0)
async def test_keys_are_kept_while_the_clock_is_unsettled(service: Service) -> None:
    """Otherwise a retried write could happen twice."""
    await service.add("a memory")
    service.clock.ahead_s = 3600.0
    await service.runtime._housekeeping.prune()
    assert service.count("idempotency") == 1
    service.runtime._runs.guard._settled_at_s = 0.0
    await service.runtime._housekeeping.prune()
    assert service.count("idempotency") == 0


@service_test(clock__settle_s=0.2)
async def test_the_clock_settles(service: Service) -> None:
    service.clock.ahead_s = 3600.0
    await service.fails("clock_unsettled", "run_decay")
    await asyncio.sleep(0.25)
    await service.ok("run_decay")
    service.clock.ahead_s = 0.0
    await service.fails("clock_unsettled", "run_decay")


@service_test(lifecycle__short__promote_importance=0.4, maintenance__slice_rows=1)
async def test_a_jump_stops_a_run_between_two_slices(service: Service) -> None:
    await service.ok("batch_add_memories", memories=[{"content": "x", "importance": 0.05}] * 5)

    untouched = Run.progress

    def progress(run: Run, part: str, done: int, total: int | None = None) -> None:
        if done == 2:
            service.clock.ahead_s = 3600.0
        untouched(run, part, done, total)

    Run.progress = progress  # type: ignore[method-assign]
    try:
        await service.fails("clock_unsettled", "run_decay")
    finally:
        Run.progress = untouched  # type: ignore[method-assign]
    assert service.rows("SELECT count(*) FROM memories WHERE state = 'archived'") == [(2,)]
    assert (await service.ok("list_runs"))["results"][0]["error"]["error_code"] == "clock_unsettled"


@service_test(**STEADY)
async def test_a_run_whose_end_could_not_be_noted_does_not_stand_as_running_for_ever(service: Service) -> None:
    with mock.patch.object(stored_runs, "finish", side_effect=StorageFull("the disk is full")):
        await service.fails("storage_full", "run_decay")
    states = [run["state"] for run in (await service.ok("list_runs"))["results"]]
    assert states == ["running"]
    await service.ok("run_cleanup")
    await service.ok("run_decay")
    states = [run["state"] for run in (await service.ok("list_runs", job="decay"))["results"]]
    assert states == ["done", "interrupted"]


@service_test()
async def test_only_a_dry_run_looks_ahead(service: Service) -> None:
    ahead = service.clock.time() + 30 * DAY_S
    await service.add("fades", importance=0.15)
    for action in IRREVERSIBLE:
        refused = await service.fails("invalid_field", action, as_of=ahead)
        assert refused["details"]["field"] == "as_of"
    seen = await service.ok("run_decay", as_of=ahead, dry_run=True)
    assert seen["as_of"] == ahead
    assert seen["counts"] == {"archived": 1}
    assert (await service.ok("run_decay", dry_run=True))["changes"] == 0


def test_every_admin_action_is_known_to_the_tests() -> None:
    assert set(IRREVERSIBLE) < ADMIN_ACTIONS
    assert ADMIN_ACTIONS < protocol.ACTIONS
    assert not ADMIN_ACTIONS & (protocol.READ_ACTIONS | protocol.WRITE_ACTIONS)
