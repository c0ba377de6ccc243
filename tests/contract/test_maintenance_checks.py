"""The integrity check finds what is wrong and holds up nobody; reindex, snapshot and checkpoint do what they say."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memory_system.storage import integrity, reindexing
from memory_system.storage.context import Reply, WriteContext
from memory_system.storage.jobs import WriteJob
from tests.support.runs import STEADY
from tests.support.service import Service, eventually, running_service, service_test


async def write(service: Service, *statements: str) -> None:
    """Damage the store from inside."""

    def run(context: WriteContext) -> Reply:
        for statement in statements:
            context.db.execute(statement)
        return {}

    await service.runtime._writer.submit(WriteJob(run, "", counted=False))


async def some_memories(service: Service, count: int = 5) -> list[str]:
    texts = [{"content": f"a violin plays tune {number}", "tags": ["t"]} for number in range(count)]
    memory_ids: list[str] = (await service.ok("batch_add_memories", memories=texts))["memory_ids"]
    return memory_ids


# -- integrity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True])
@service_test()
async def test_a_sound_store_has_no_problems(service: Service, full: bool) -> None:
    await some_memories(service)
    await service.session()
    await service.settled()
    reply = await service.ok("run_integrity_check", full=full)
    assert reply["ok"] is True
    assert reply["problems"] == []
    expected = {"problems": 0, "stale_vectors": 0, "texts": 6, "vectors": 5}
    assert {name: reply["counts"][name] for name in expected} == expected
    assert reply["counts"]["tables"] > 10


DAMAGES = {
    "content_digest": "UPDATE memories SET content_digest = x'00' WHERE row_id = 2",
    "json": "UPDATE memories SET metadata = '{' WHERE row_id = 2",
    "foreign_keys": "INSERT INTO group_members (group_id, row_id, added_at) VALUES (77, 2, 0)",
    "vector": "UPDATE embeddings SET vector = zeroblob(length(vector)) WHERE row_id = 2",
    "full_text": "INSERT INTO memory_fts (memory_fts, rowid, content) VALUES ('delete', 2, 'violin')",
}


@pytest.mark.parametrize("check", sorted(DAMAGES))
@service_test()
async def test_what_is_damaged_is_found(service: Service, check: str, caplog: pytest.LogCaptureFixture) -> None:
    ids = await some_memories(service)
    await service.settled()
    service.runtime._writer._db.execute("PRAGMA foreign_keys = OFF")
    await write(service, DAMAGES[check])
    with caplog.at_level(logging.ERROR):
        reply = await service.ok("run_integrity_check")
    assert reply["ok"] is False
    (problem,) = reply["problems"]
    assert problem["check"] == check
    assert reply["counts"]["problems"] == reply["counts"][f"problems_{check}"] == 1
    if check in ("content_digest", "json", "vector"):
        assert (problem["memory_id"], problem["namespace"], problem["row_id"]) == (ids[1], "default", 2)
    (line,) = [record for record in caplog.records if "integrity_problem" in str(record.msg)]
    assert line.levelno == logging.ERROR
    assert "violin" not in str(line.msg)


@service_test()
async def test_a_vector_of_another_length_is_found(service: Service) -> None:
    await some_memories(service)
    await service.settled()
    await write(service, "UPDATE embeddings SET vector = substr(vector, 1, 8) WHERE row_id > 3")
    reply = await service.ok("run_integrity_check", limit=1)
    assert reply["counts"]["problems_vector"] == 2
    assert len(reply["problems"]) == 1


@service_test()
async def test_a_vector_of_an_older_text_is_counted_and_no_problem(service: Service) -> None:
    await some_memories(service)
    await service.settled()
    await write(service, "UPDATE embeddings SET digest = x'00' WHERE row_id = 2")
    reply = await service.ok("run_integrity_check")
    assert reply["ok"] is True
    assert reply["counts"]["stale_vectors"] == 1


def test_damaged_pages_are_found(tmp_path: Path) -> None:
    async def make() -> Path:
        async with running_service(tmp_path) as service:
            await some_memories(service, 200)
            return service.path

    async def check() -> dict[str, Any]:
        async with running_service(tmp_path, embedding__provider="off") as service:
            return await service.ok("run_integrity_check")

    path = asyncio.run(make())
    with contextlib.closing(sqlite3.connect(path)) as db:
        size = db.execute("PRAGMA page_size").fetchone()[0]
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'memory_history'").fetchone()[0]
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\xff" * size)
    reply = asyncio.run(check())
    assert reply["ok"] is False
    assert reply["counts"]["problems_pages"] >= 1
    assert reply["counts"]["texts"] == 200, "the other checks are made all the same"


@service_test(**STEADY)
async def test_the_check_holds_up_no_write(service: Service) -> None:
    """It stands still in each of its parts, and a write goes through."""
    await some_memories(service)
    await service.settled()
    entered, go = threading.Event(), threading.Event()

    def stopping(check: Callable[..., Any]) -> Callable[..., Any]:
        def stopped(db: sqlite3.Connection, *arguments: Any) -> Any:
            yield from check(db, *arguments)
            db.execute("BEGIN")
            db.execute("SELECT count(*) FROM memories").fetchone()
            entered.set()
            assert go.wait(10.0)
            db.execute("ROLLBACK")

        return stopped

    for name in ("texts", "full_text"):
        entered.clear()
        go.clear()
        with mock.patch.object(integrity, name, stopping(getattr(integrity, name))):
            run = asyncio.create_task(service.ok("run_integrity_check"))
            await asyncio.to_thread(entered.wait, 10.0)
            await service.add("written meanwhile")
            await service.ok("run_decay")
            go.set()
            assert (await run)["ok"] is True


@service_test()
async def test_the_full_text_is_checked_under_a_writers_lock(service: Service) -> None:
    """What the check works on is a copy of its own: the store's lock is taken, and it does not wait."""
    await some_memories(service)
    db = integrity.connect(service.path, lambda: False)
    entered, go = threading.Event(), threading.Event()

    def hold(context: WriteContext) -> Reply:
        entered.set()
        assert go.wait(10.0)
        return {}

    try:
        held = service.runtime._writer.submit(WriteJob(hold, "", counted=False))
        await asyncio.to_thread(entered.wait, 10.0)
        assert list(integrity.full_text(db)) == []
        go.set()
        await held
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            db.execute("DELETE FROM main.memories")
    finally:
        go.set()
        db.close()


@service_test()
async def test_a_check_is_stopped_with_the_service(service: Service) -> None:
    await some_memories(service, 1000)
    run = asyncio.create_task(service.ask("run_integrity_check"))

    def resting(self: Any, rows: int) -> None:
        self._stop.wait(30.0)
        raise sqlite3.OperationalError("interrupted")

    with mock.patch("memory_system.service.checking._Pace.slice", resting):

        async def begun() -> bool:
            figures = (await service.ok("health_check"))["maintenance"]
            return bool(figures.get("integrity_check", {}).get("part"))

        await eventually(begun)
        service.runtime.stop_writing_after(1.0)
        assert (await run)["error_code"] == "shutting_down"


# -- reindex -----------------------------------------------------------------------------------------------------------


def triggers(service: Service) -> list[tuple[Any, ...]]:
    return service.rows("SELECT name, sql FROM sqlite_master WHERE type = 'trigger' ORDER BY name")


@service_test(**STEADY, maintenance__slice_rows=3)
async def test_reindex_repairs_the_full_text(service: Service) -> None:
    await some_memories(service, 10)
    await service.session()
    before = triggers(service)
    await write(service, "INSERT INTO memory_fts (memory_fts) VALUES ('delete-all')")
    assert (await service.ok("search_memory", query="violin"))["count"] == 0
    assert (await service.ok("run_integrity_check"))["ok"] is False
    reply = await service.ok("reindex")
    assert reply["counts"] == {"texts": 10}
    assert (await service.ok("search_memory", query="violin"))["count"] == 10
    assert (await service.ok("run_integrity_check"))["ok"] is True
    assert triggers(service) == before
    assert service.rows("SELECT key FROM meta WHERE key = ?", reindexing.KEY) == []


@service_test(maintenance__slice_rows=2)
async def test_memories_change_while_they_are_reindexed(service: Service) -> None:
    """Between any two slices: added, changed and deleted, on both sides of where the index is."""
    ids = await some_memories(service, 12)
    writer = service.runtime._writer
    await writer.submit(WriteJob(reindexing.begin, "", counted=False))
    added = 1
    while added:
        new = await service.add("a new violin")
        assert new in [each["memory_id"] for each in (await service.ok("search_memory", query="new"))["results"]]
        await service.ok("update_memory", memory_id=ids[added], update_payload={"content": f"a harp {added}"})
        await service.ok("update_memory", memory_id=ids[-1], update_payload={"content": f"a late harp {added}"})
        if len(ids) > 6:
            await service.ok("delete_memory", memory_id=ids.pop(0))
            await service.ok("delete_memory", memory_id=ids.pop(-2))

        def take(context: WriteContext) -> Reply:
            return reindexing.add_slice(context, limit=2, max_chars=1000)

        added = (await writer.submit(WriteJob(take, "", counted=False)))["added"]
        assert (await service.ok("run_integrity_check"))["problems"] == [], "what is not there yet is no damage"
    assert (await service.ok("run_integrity_check"))["problems"] == []
    await service.ok("delete_memory", memory_id=ids[0])
    assert (await service.ok("run_integrity_check"))["problems"] == []


def test_a_reindex_that_was_killed_is_finished_by_the_next_start(tmp_path: Path) -> None:
    async def cut_off() -> None:
        async with running_service(tmp_path, maintenance__slice_rows=2) as service:
            await some_memories(service, 10)
            submit = service.runtime._writer.submit
            await submit(WriteJob(reindexing.begin, "", counted=False))
            await submit(WriteJob(lambda context: reindexing.add_slice(context, 4, 1000), "", counted=False))
            assert (await service.ok("search_memory", query="violin"))["count"] == 4

    async def again() -> None:
        async with running_service(tmp_path, maintenance__slice_rows=2) as service:

            async def whole() -> bool:
                return (await service.ok("list_runs", job="reindex", run_state="done"))["count"] == 1

            await eventually(whole)
            assert (await service.ok("search_memory", query="violin"))["count"] == 10
            assert (await service.ok("run_integrity_check"))["ok"] is True
            (run,) = (await service.ok("list_runs", job="reindex"))["results"]
            assert run["asked_by"] == "orchestrator"

    asyncio.run(cut_off())
    asyncio.run(again())


@service_test()
async def test_what_was_found_during_a_reindex_is_not_kept(service: Service) -> None:
    await some_memories(service)
    await service.settled()
    submit = service.runtime._writer.submit
    await submit(WriteJob(reindexing.begin, "", counted=False))
    search = {"query": "violin", "mode": "keyword"}
    assert (await service.ok("semantic_search", **search))["count"] == 0
    await service.ok("reindex")
    assert (await service.ok("semantic_search", **search))["count"] == 5


@service_test()
async def test_reindex_makes_vectors_anew(service: Service) -> None:
    await some_memories(service)
    await service.settled()
    whole = service.rows("SELECT row_id, vector FROM embeddings ORDER BY row_id")
    await write(service, "UPDATE embeddings SET vector = zeroblob(length(vector))")
    assert (await service.ok("run_integrity_check"))["counts"]["problems_vector"] == 5
    reply = await service.ok("reindex", keywords=False, vectors=True)
    assert reply["counts"] == {"vectors": 5}

    async def stored() -> bool:
        return service.rows("SELECT row_id, vector FROM embeddings ORDER BY row_id") == whole

    await eventually(stored)
    assert (await service.ok("run_integrity_check"))["ok"] is True


@service_test(embedding__provider="off")
async def test_no_vectors_without_a_model(service: Service) -> None:
    await some_memories(service)
    await service.fails("vectors_unavailable", "reindex", vectors=True)
    (run,) = (await service.ok("list_runs"))["results"]
    assert run["state"] == "failed"
    await service.ok("reindex")


# -- snapshot and checkpoint -------------------------------------------------------------------------------------------


@service_test(search__exact_max=3)
async def test_a_snapshot_of_the_graph(service: Service) -> None:
    await some_memories(service, 10)
    await service.settled()
    folder = Path(f"{service.path}.index")

    async def in_the_graph() -> bool:
        with service.runtime._index.reading() as view:
            return view is not None and view.vectors is not None and bool(view.vectors.in_graph.sum() == 10)

    await eventually(in_the_graph)
    assert not (folder / "manifest.json").exists()
    reply = await service.ok("run_snapshot")
    assert reply["saved"] is True
    assert reply["seq"] == service.runtime._index.applied_seq
    assert (folder / "manifest.json").exists()
    assert (await service.ok("run_snapshot"))["saved"] is False, "nothing changed since"


@service_test()
async def test_without_a_graph_there_is_no_snapshot(service: Service) -> None:
    await some_memories(service)
    await service.settled()
    assert (await service.ok("run_snapshot"))["saved"] is False


@service_test()
async def test_a_checkpoint_moves_the_log(service: Service) -> None:
    await some_memories(service, 50)
    await service.settled()
    log_file = service.path.with_name(service.path.name + "-wal")
    assert log_file.stat().st_size > 0
    reply = await service.ok("run_checkpoint")
    assert reply["log_frames"] == reply["moved_frames"] > 0
    assert log_file.stat().st_size < 100_000  # what the run noted of itself since
    with contextlib.closing(sqlite3.connect(f"file:{service.path}?immutable=1", uri=True)) as db:
        assert db.execute("SELECT count(*) FROM memories").fetchone() == (50,)


@service_test()
async def test_a_reader_does_not_hold_up_a_checkpoint(service: Service) -> None:
    await some_memories(service)
    with contextlib.closing(sqlite3.connect(f"file:{service.path}?mode=ro", uri=True)) as db:
        db.execute("BEGIN")
        db.execute("SELECT count(*) FROM memories").fetchone()
        await some_memories(service)
        async with asyncio.timeout(2.0):
            reply = await service.ok("run_checkpoint")
        assert 0 <= reply["moved_frames"] < reply["log_frames"]
        db.execute("ROLLBACK")
    await service.add("and on it goes")
