"""Quotas at the store: the figures are those that counting gives, whatever changed memories, and across restarts."""

from __future__ import annotations

import contextlib
import random
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import UNSET

from memory_system.digest import content_digest
from memory_system.errors import MemorySystemError, QuotaExceeded
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.limits_settings import LimitsSettings
from memory_system.models import UpdatePayload
from memory_system.storage import database, memories, removal, sessions, usage
from memory_system.storage.context import WriteContext
from memory_system.storage.rows import RecordView
from memory_system.storage.usage import Quota

LARGE = Quota(10**6, 10**9)
NOTHING: dict[str, tuple[int, int]] = {}


@contextlib.contextmanager
def opened(path: Path, quota: Quota | None) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(database.open_store(path, "normal")) as db:
        usage.bring_up(db, quota)
        yield db


def counted(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    return {owner: (number, size) for owner, number, size in db.execute(usage.COUNTED)}


def kept(db: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    return {
        owner: (number, size)
        for owner, number, size in db.execute("SELECT owner, memories, bytes FROM usage")
        if number or size
    }


def context_of(db: sqlite3.Connection, owner: str = "ada", quota: Quota | None = LARGE) -> WriteContext:
    settings = LifecycleSettings()
    return WriteContext(db, time.time(), "home", settings, RecordView(settings), owner=owner, quota=quota)


def new(content: str, parent_id: str | None = None, **fields: object) -> memories.NewMemory:
    values = {
        "content": content, "content_digest": content_digest(content), "memory_type": "general", "memory_tier": None,
        "importance": None, "metadata": {}, "tags": [], "parent_id": parent_id, "session_id": None, "user_id": None,
        "occurred_at": None, "expires_at": None, "created_by": "", **fields,
    }  # fmt: skip
    return memories.NewMemory(**values)  # type: ignore[arg-type]


def changed(memory_id: str, content: str) -> memories.Update:
    return memories.Update(
        memory_id=memory_id, payload=UpdatePayload(content=content), metadata=UNSET, replace_metadata=False,
        content_digest=content_digest(content), expected_version=None, updated_by="",
    )  # fmt: skip


class Life:
    """Random writes of some owners, some of them taken back."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.ids: list[str] = []

    def step(self, db: sqlite3.Connection, quota: Quota | None) -> None:
        made: list[str] = []
        context = context_of(db, self.chance.choice(["ada", "ben", "@10.0.0.7/cy", ""]), quota)
        back = self.chance.random() < 0.25
        db.execute("BEGIN IMMEDIATE")
        db.execute("SAVEPOINT request")
        with contextlib.suppress(MemorySystemError):
            self._write(context, made)
        if back:
            db.execute("ROLLBACK TO request")
        db.execute("RELEASE request")
        db.execute("COMMIT")
        self.ids += [] if back else made

    def _write(self, context: WriteContext, made: list[str]) -> None:
        text = self.chance.choice(["ä", "x", "語"]) * self.chance.randrange(1, 400)
        some = self.chance.choice(self.ids) if self.ids else None
        kind = self.chance.choice(["add", "add", "many", "session", "update", "update", "delete", "leave", "forget"])
        if kind == "add" or some is None:
            fields = {"metadata": {"k": text[:20]}, "tags": ["ü", "t"], "user_id": self.chance.choice(["u1", "u2"])}
            parent_id = some if self.chance.random() < 0.5 else None
            made.append(memories.insert(context, new(text, parent_id, **fields)).memory_id)
        elif kind == "many":
            made += memories.add_many(context, [new(text), new("b", some)])["memory_ids"]
        elif kind == "session":
            reply = sessions.create(context, user_id="u1", session_type="talk", metadata={"a": "é"}, created_by="")
            made.append(reply["session_id"])
        elif kind == "update":
            memories.update(context, changed(some, text))
        elif kind == "forget":
            if self.chance.random() < 0.1:
                removal.forget(context, user_id="u2", session_id=None)
        else:
            removal.delete(context, some, cascade=kind == "delete")


@pytest.mark.parametrize("seed", range(4))
def test_the_figures_are_those_that_counting_gives(tmp_path: Path, seed: int) -> None:
    life, path = Life(seed), tmp_path / "memory.db"
    for quota in (LARGE, LARGE, None, LARGE):
        with opened(path, quota) as db:
            for _ in range(120):
                life.step(db, quota)
                assert kept(db) == (NOTHING if quota is None else counted(db))
            assert len(counted(db)) >= 2
            assert db.execute("PRAGMA foreign_key_check").fetchall() == []


def test_without_the_triggers_the_figures_are_wrong(tmp_path: Path) -> None:
    """The comparison above sees what is not kept up."""
    with opened(tmp_path / "memory.db", LARGE) as db:
        db.execute("DROP TRIGGER temp.usage_of_deleted")
        memory_id = memories.insert(context_of(db), new("one")).memory_id
        removal.delete(context_of(db), memory_id, cascade=True)
        assert kept(db) != counted(db)


def test_nothing_is_made_where_there_are_no_quotas(tmp_path: Path) -> None:
    assert Quota.of(LimitsSettings()) is None
    with opened(tmp_path / "memory.db", None) as db:
        memories.insert(context_of(db, quota=None), new("one"))
        assert kept(db) == NOTHING
        assert db.execute("SELECT count(*) FROM sqlite_temp_master").fetchone() == (0,)
        assert db.execute("SELECT owner FROM memories").fetchall() == [("ada",)]
    with opened(tmp_path / "memory.db", LARGE) as db:
        assert kept(db) == counted(db) == {"ada": (1, usage.size_of("one", {}, []))}


def test_a_count_goes_to_the_last_memory_and_no_further(tmp_path: Path) -> None:
    with opened(tmp_path / "memory.db", quota := Quota(3, 0)) as db:
        for number in range(3):
            memories.insert(context_of(db, quota=quota), new(str(number)))
        with pytest.raises(QuotaExceeded) as refused:
            memories.insert(context_of(db, quota=quota), new("four"))
        assert refused.value.details == {"quota": "memories", "used": 3, "wanted": 1, "limit": 3}
        memories.insert(context_of(db, "ben", quota), new("of another"))
        memories.insert(context_of(db, "", quota), new("of nobody"))
        (first,) = db.execute("SELECT memory_id FROM memories WHERE content = '0'").fetchone()
        memories.update(context_of(db, quota=quota), changed(first, "more"))
        removal.delete(context_of(db, quota=quota), first, cascade=True)
        memories.insert(context_of(db, quota=quota), new("four"))


def test_a_batch_is_refused_before_any_of_it_is_written(tmp_path: Path) -> None:
    with opened(tmp_path / "memory.db", quota := Quota(3, 0)) as db:
        before = db.total_changes
        with pytest.raises(QuotaExceeded):
            memories.add_many(context_of(db, quota=quota), [new(str(number)) for number in range(4)])
        assert db.total_changes == before
        memories.add_many(context_of(db, quota=quota), [new(str(number)) for number in range(3)])


def test_a_size_is_exact_in_bytes_and_counts_earlier_versions(tmp_path: Path) -> None:
    size = usage.size_of("ä" * 100, {}, [])
    with opened(tmp_path / "memory.db", quota := Quota(0, size)) as db:
        memory_id = memories.insert(context_of(db, quota=quota), new("ä" * 100)).memory_id
        assert kept(db) == {"ada": (1, size)}
        with pytest.raises(QuotaExceeded) as refused:
            memories.update(context_of(db, quota=quota), changed(memory_id, "short"))
        assert (refused.value.details["quota"], refused.value.details["used"]) == ("bytes", size)
        with pytest.raises(QuotaExceeded):
            memories.insert(context_of(db, quota=quota), new("b"))
        # Somebody else's update counts against whose memory it is.
        with pytest.raises(QuotaExceeded, match="who added this memory") as refused:
            memories.update(context_of(db, "ben", quota), changed(memory_id, "longer" * 40))
        assert refused.value.details == {"quota": "bytes"}, "and nothing of how much that one keeps"
        removal.delete(context_of(db, quota=quota), memory_id, cascade=True)
        assert kept(db) == NOTHING
        memories.insert(context_of(db, quota=quota), new("b"))


def test_reading_and_fading_change_no_figure(tmp_path: Path) -> None:
    with opened(tmp_path / "memory.db", LARGE) as db:
        memories.insert(context_of(db), new("one"))
        before = kept(db)
        db.execute("UPDATE memories SET access_count = 7, importance = 0.1, state = 'archived', parent_id = NULL")
        assert kept(db) == before == counted(db)
