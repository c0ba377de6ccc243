"""Contexts that are kept: as long as nothing was changed, for so long, and so many."""

from __future__ import annotations

from agents.context_cache import ContextCache

KEY = ("default", "trains?")


def cache(
    entries: int = 10, max_bytes: float = 1000.0, ttl_s: float = 60.0, stale_s: float = 600.0
) -> ContextCache[str]:
    return ContextCache(entries, max_bytes, ttl_s, stale_s)


def test_the_same_question_at_the_same_commit() -> None:
    kept = cache()
    assert kept.current(KEY, 5, 0.0) is None
    kept.put(KEY, "context", 5, 0.0, lasts_s=1000.0, size=10)
    found = kept.current(KEY, 5, 59.0)
    assert found is not None
    assert found.value == "context"
    assert kept.current(("other", "trains?"), 5, 1.0) is None
    assert kept.counts == {"hit": 1, "miss": 2}
    assert kept.hit_rate == 1 / 3


def test_a_commit_ends_it_whatever_its_number() -> None:
    kept = cache()
    kept.put(KEY, "context", 5, 0.0, lasts_s=1000.0, size=10)
    assert kept.current(KEY, 6, 1.0) is None
    assert kept.current(KEY, 4, 1.0) is None
    assert kept.hit_rate == 0.0


def test_time_ends_it_as_well() -> None:
    kept = cache(ttl_s=60.0)
    kept.put(KEY, "context", 5, 0.0, lasts_s=1000.0, size=10)
    assert kept.current(KEY, 5, 60.0) is None
    kept.put(KEY, "context", 5, 0.0, lasts_s=3.0, size=10)
    assert kept.current(KEY, 5, 2.9) is not None
    assert kept.current(KEY, 5, 3.0) is None


def test_what_lasts_no_time_is_there_for_bad_days_only() -> None:
    kept = cache(stale_s=600.0)
    kept.put(KEY, "context", 5, 0.0, lasts_s=0.0, size=10)
    assert kept.current(KEY, 5, 0.0) is None
    last = kept.last(KEY, 600.0)
    assert last is not None
    assert (last.value, last.commit_seq, last.made_s) == ("context", 5, 0.0)
    assert kept.last(KEY, 600.1) is None
    assert kept.counts["stale"] == 1


def test_the_one_used_least_lately_makes_room() -> None:
    kept = cache(entries=2)
    for name in ("a", "b"):
        kept.put(("n", name), name, 1, 0.0, lasts_s=9.0, size=1)
    assert kept.current(("n", "a"), 1, 1.0) is not None
    kept.put(("n", "c"), "c", 1, 1.0, lasts_s=9.0, size=1)
    assert [kept.last(("n", name), 1.0) is not None for name in ("a", "b", "c")] == [True, False, True]


def test_size_is_bounded_and_counted() -> None:
    kept = cache(max_bytes=100.0)
    for number in range(30):
        kept.put(("n", number % 15), "x", 1, 0.0, lasts_s=9.0, size=30)
        assert kept.megabytes <= 100.0 / 2**20
    assert len(kept) == 3
    kept.put(("n", "huge"), "x", 1, 0.0, lasts_s=9.0, size=101)
    assert len(kept) == 3
    kept.drop("n", 0.5)
    assert (len(kept), kept.megabytes) == (0, 0.0)


def test_nothing_is_kept_when_nothing_may_be() -> None:
    kept = cache(entries=0)
    kept.put(KEY, "context", 5, 0.0, lasts_s=1000.0, size=10)
    assert kept.current(KEY, 5, 0.0) is None
    assert kept.last(KEY, 0.0) is None


def test_dropping_a_namespace_leaves_the_others() -> None:
    kept = cache()
    for namespace in ("a", "b"):
        kept.put((namespace, "q"), namespace, 1, 0.0, lasts_s=9.0, size=1)
    kept.drop("a", 0.5)
    assert kept.last(("a", "q"), 0.0) is None
    assert kept.last(("b", "q"), 0.0) is not None


def test_what_is_too_old_even_for_bad_days_does_not_stay_in_memory() -> None:
    kept = cache(ttl_s=60.0, stale_s=100.0)
    kept.put(("n", "old"), "x", 1, 1000.0, lasts_s=9.0, size=1)
    kept.put(("n", "new"), "x", 1, 1101.0, lasts_s=9.0, size=1)
    assert len(kept) == 1


def test_what_was_being_built_when_its_like_was_dropped_is_not_kept() -> None:
    """It may have been read before the deletion, and must not be given as stale after it."""
    kept = cache()
    kept.drop("default", 5.0)
    kept.put(KEY, "context", 5, 4.9, lasts_s=9.0, size=1)
    assert kept.last(KEY, 6.0) is None
    kept.put(KEY, "context", 6, 5.1, lasts_s=9.0, size=1)
    assert kept.last(KEY, 6.0) is not None
