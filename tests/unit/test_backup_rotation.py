"""Which backups are kept, and how they are named."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from memory_system.storage.backup import Backup, backups, name_of, spent

NOW = datetime(2026, 3, 10, 15, 0, tzinfo=UTC)
STORE = Path("/store/memory.db")


def at(**ago: float) -> Backup:
    taken_at_s = (NOW - timedelta(**ago)).timestamp()
    return Backup(Path(name_of(STORE, taken_at_s)), taken_at_s, 1)


def kept(found: list[Backup], keep: int, keep_days: int) -> list[Backup]:
    going = spent(found, keep, keep_days, NOW.timestamp())
    return [each for each in found if each not in going]


def test_the_newest_are_kept_and_one_of_each_day() -> None:
    found = [at(hours=hours) for hours in range(0, 24 * 10, 4)]
    assert kept(found, 3, 0) == found[:3]
    # 15:00 less 0, 4, 8, 12 hours is today; the last of each day before was taken at 23:00.
    last_of_days = [at(hours=hours) for hours in (0, 16, 40, 64)]
    assert kept(found, 1, 4) == last_of_days
    assert kept(found, 3, 4) == [*found[:3], *last_of_days[1:]]
    assert kept(found, 1000, 0) == found


def test_a_day_is_one_of_utc_and_todays_counts() -> None:
    found = [at(minutes=1), at(hours=15, minutes=-1), at(hours=15, minutes=1)]
    assert kept(found, 1, 1) == found[:1]
    assert kept(found, 1, 2) == [found[0], found[2]]


@given(st.lists(st.integers(0, 60 * 86_400_000), unique=True, max_size=40), st.integers(1, 10), st.integers(0, 40))
def test_rotation_keeps_the_newest_and_repeated_changes_nothing(ages_ms: list[int], keep: int, keep_days: int) -> None:
    found = [at(milliseconds=age_ms) for age_ms in sorted(ages_ms)]
    left = kept(found, keep, keep_days)
    assert left[:keep] == found[:keep]
    assert len(left) <= keep + keep_days
    assert kept(left, keep, keep_days) == left


def test_only_backups_of_this_store_count(tmp_path: Path) -> None:
    store = tmp_path / "memory.db"
    mine = [name_of(store, NOW.timestamp() + seconds) for seconds in (0.0, 0.25, 3600.0)]
    others = [
        *("memory.db", "memory-backup.db", "memory-20261399T000000.000Z.db", "notes-20260310T150000.000Z.db"),
        *(f"{mine[0]}.partial", f"{mine[0]}-wal", "memory-two-20260310T150000.000Z.db"),
    ]
    for name in (*mine, *others):
        (tmp_path / name).write_bytes(b"x" * 7)
    found = backups(tmp_path, store)
    assert [each.path.name for each in found] == mine[::-1]
    assert [each.taken_at_s - NOW.timestamp() for each in found] == [3600.0, 0.25, 0.0]
    assert {each.size_bytes for each in found} == {7}
    assert mine[0] == "memory-20260310T150000.000Z.db"
    assert backups(tmp_path / "missing", store) == []
