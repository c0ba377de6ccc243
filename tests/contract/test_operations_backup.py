"""The action `backup`: a run like any other, whose copy is whole or not there."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memory_system.storage import backup
from tests.support.service import Service, eventually, running_service, service_test
from tests.support.stores import holdings


def folder(service: Service) -> Path:
    return service.path.parent / "backups"


@service_test()
async def test_a_backup_is_a_run_and_tells_what_it_holds(service: Service) -> None:
    await service.add("first")
    await service.session()
    around = {"request_id": "scheduled-backup-0001", "agent_id": "memory_scheduler"}
    reply = await service.ok("backup", around)
    assert (reply["job"], reply["dry_run"], reply["schema_version"]) == ("backup", False, 6)
    assert reply["contents"] == {"memories": 1, "sessions": 1, "relationships": 0, "context_groups": 0}
    (made,) = folder(service).iterdir()
    assert (reply["path"], reply["size_bytes"]) == (str(made), made.stat().st_size)
    assert holdings(made) == holdings(service.path)
    assert reply["store_epoch"] == holdings(made).epoch
    assert await service.ok("backup", around) == {**reply, "replayed": True}
    (run,) = (await service.ok("list_runs", job="backup"))["results"]
    assert (run["state"], run["asked_by"]) == ("done", "memory_scheduler")
    assert list(folder(service).iterdir()) == [made]


@service_test()
async def test_a_dry_run_tells_what_a_backup_needs_and_takes_none(service: Service) -> None:
    await service.add("first")
    reply = await service.ok("backup", dry_run=True)
    assert 0 < reply["needed_bytes"] < reply["free_bytes"]
    assert list(folder(service).iterdir()) == []


@service_test()
async def test_without_room_it_is_refused_and_the_store_goes_on(service: Service) -> None:
    with mock.patch.object(backup, "disk_free_bytes", lambda _: 1000):
        refused = await service.fails("storage_full", "backup")
    assert refused["details"]["free_bytes"] == 1000
    assert "there is no room in" in refused["message"]
    await service.add("first")
    await service.ok("backup")


@pytest.mark.parametrize("encoding", ["msgpack"])
def test_a_stop_of_the_service_ends_it_and_leaves_no_thread(tmp_path: Path, encoding: str) -> None:
    begun, ended = threading.Event(), threading.Event()

    def endless(*_: Any, stopped: backup.Stopped) -> Any:
        begun.set()
        while not stopped():
            ended.wait(0.01)
        ended.set()
        raise backup.StorageFailed("broken off")

    async def scenario() -> None:
        with mock.patch.object(backup, "back_up", endless):
            async with running_service(tmp_path, encoding) as service:
                reply = asyncio.create_task(service.ask("backup"))

                async def is_begun() -> bool:
                    return begun.is_set()

                await eventually(is_begun)
                (run,) = (await service.ok("list_runs", job="backup"))["results"]
                assert run["state"] == "running"
                service.runtime.stop_writing_after(1.0)
                assert (await reply)["error_code"] == "shutting_down"
                assert ended.is_set()

    asyncio.run(scenario())
