"""The integrity check finds what is wrong and holds up nobody; reindex, snapshot and checkpoint do what they say."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memory_system.search import word_keeping
from memory_system.storage import integrity
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


def forget_words(service: Service, *row_ids: int) -> None:
    with service.runtime._index.reading() as view:
        assert view is not None
        for row_id in row_ids:
            slot = view.columns.slot(row_id)
            assert slot is not None and view.words.postings.has(slot)
            view.words.remove(slot)


def miscount(service: Service) -> None:
    """One posting of the index counts a term once more than it stands in the text."""
    with service.runtime._index.reading() as view:
        assert view is not None
        segment = view.words.postings.segments[0]
        segment.counts = segment.counts.copy()
        segment.counts[int(segment.docs.argmax())] += 1


@pytest.mark.parametrize("spoil", [lambda service: forget_words(service, 2), miscount], ids=["lost", "miscounted"])
@service_test()
async def test_words_that_are_not_those_of_the_text_are_found(
    service: Service, spoil: Callable[[Service], None]
) -> None:
    await some_memories(service)
    await service.settled()
    assert service.texts_with("violin") == 5
    spoil(service)
    reply = await service.ok("run_integrity_check")
    assert reply["ok"] is False
    (problem,) = reply["problems"]
    assert problem["check"] == "full_text" and problem["namespace"] == "default"
    assert reply["counts"]["problems_full_text"] == 1 and reply["counts"]["words"] == 5
    await service.ok("reindex")
    assert (await service.ok("run_integrity_check"))["ok"] is True


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
            damage()  # a start would have refused
            return await service.ok("run_integrity_check")

    def damage() -> None:
        with path.open("r+b") as file:
            file.seek((page - 1) * size)
            file.write(b"\xff" * size)

    path = asyncio.run(make())
    with contextlib.closing(sqlite3.connect(path)) as db:
        size = db.execute("PRAGMA page_size").fetchone()[0]
        page = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'memory_history'").fetchone()[0]
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
            assert go.wait(30.0)
            db.execute("ROLLBACK")

        return stopped

    for name in ("texts", "searchable"):
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


@service_test(**STEADY)
async def test_reindex_repairs_the_words(service: Service) -> None:
    await some_memories(service, 10)
    await service.session()
    await service.settled()
    assert service.texts_with("violin") == 10
    forget_words(service, *range(1, 11))
    assert (await service.ok("search_memory", query="violin"))["count"] == 0
    reply = await service.ok("reindex")
    assert reply["counts"] == {"texts": 10}
    assert (await service.ok("search_memory", query="violin"))["count"] == 10
    assert (await service.ok("run_integrity_check"))["ok"] is True


@service_test()
async def test_memories_change_while_they_are_reindexed(service: Service) -> None:
    """While the index is still to take in all of them: added, changed and deleted."""
    ids = await some_memories(service, 12)
    await service.settled()
    with mock.patch.object(word_keeping, "fill", lambda *_: False):
        assert service.runtime._index.rebuild_words()
        new = await service.add("a new violin")
        found = await service.ok("search_memory", query="new")
        assert [each["memory_id"] for each in found["results"]] == [new]
        assert (found["degraded"], found["degraded_reason"]) == (True, "index_loading")
        await service.ok("update_memory", memory_id=ids[1], update_payload={"content": "a harp"})
        await service.ok("delete_memory", memory_id=ids[0])
        assert (await service.ok("search_memory", query="harp"))["count"] == 1
        assert (await service.ok("run_integrity_check"))["problems"] == [], "what is not there yet is no damage"
    service.runtime._index.notify()
    await eventually(lambda: asyncio.sleep(0, not service.runtime._index.words_lacking))
    assert (await service.ok("search_memory", query="violin", limit=50))["count"] == 11
    assert (await service.ok("run_integrity_check"))["problems"] == []


@service_test()
async def test_what_was_found_before_a_reindex_is_not_kept(service: Service) -> None:
    await some_memories(service)
    await service.settled()
    forget_words(service, *range(1, 6))
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


@service_test(search__exact_max=3, search__graph_from=5)
async def test_a_snapshot_of_the_graph(service: Service) -> None:
    await some_memories(service, 10)
    await service.settled()
    folder = Path(f"{service.path}.index")

    async def in_the_graph() -> bool:
        with service.runtime._index.reading() as view:
            return view is not None and view.vectors is not None and view.vectors.graph.count >= 5

    await eventually(in_the_graph)
    assert not (folder / "manifest.json").exists()
    reply = await service.ok("run_snapshot")
    assert reply["saved"] is True
    assert reply["seq"] == service.runtime._index.applied_seq
    assert (folder / "manifest.json").exists()
    assert (await service.ok("run_snapshot"))["saved"] is False, "nothing changed since"


@service_test()
async def test_without_a_graph_the_words_are_saved(service: Service) -> None:
    await some_memories(service)
    await service.settled()
    folder = f"{service.path}.index"
    assert (await service.ok("run_snapshot"))["saved"] is True
    names = set(os.listdir(folder))
    assert "words.json" in names and "manifest.json" not in names
    assert (await service.ok("run_snapshot"))["saved"] is False, "nothing changed since"


@service_test()
async def test_a_checkpoint_moves_the_log(service: Service) -> None:
    await some_memories(service, 50)
    await service.settled()
    log_file = service.path.with_name(service.path.name + "-wal")
    assert log_file.stat().st_size > 0

    async def moved() -> bool:  # but for what a read that is under way still needs
        reply = await service.ok("run_checkpoint")
        return bool(reply["log_frames"] == reply["moved_frames"] > 0)

    await eventually(moved)
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
