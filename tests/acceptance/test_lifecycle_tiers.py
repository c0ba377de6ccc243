"""From tier to tier, into the archive and back, and out of the store: with the real process over weeks and years."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memory_client import MemoryClient
from tests.support.lifecycle import DAY_S, Ageing, ageing_orchestrator, faded

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

NEAR = 1e-4


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Ageing]:
    with ageing_orchestrator(tmp_path) as running:
        yield running


def near(value: float) -> Any:
    return pytest.approx(value, abs=NEAR)


def changes(reply: dict[str, Any]) -> list[tuple[str, str, str]]:
    return sorted((change["memory_id"], change["from"], change["to"]) for change in reply["results"])


def upkeep(service: Ageing) -> None:
    """What the scheduler has done in a night."""
    for action in ("run_decay", "run_consolidation", "run_cleanup"):
        service.ok(action)


# -- promotion --------------------------------------------------------------------------------------------------


def test_what_stays_important_goes_from_short_to_medium_to_long(tmp_path: Path) -> None:
    thresholds = {"lifecycle__short__promote_importance": 0.4, "lifecycle__medium__promote_importance": 0.1}
    with ageing_orchestrator(tmp_path, **thresholds, lifecycle__medium__archive_threshold=0.05) as service:
        memory_id = service.add("worth keeping", importance=1.0)
        service.clock.advance(6.9 * DAY_S)
        assert service.ok("run_decay")["changes"] == 0

        service.clock.advance(0.2 * DAY_S)
        before = service.record(memory_id)
        assert changes(service.ok("run_decay")) == [(memory_id, "short", "medium")]
        after = service.record(memory_id)
        assert after["memory_tier"] == "medium"
        assert after["importance"] == near(before["importance"]) == near(faded(1.0, 0.1, 7.1))  # continuous
        assert after["version"] == before["version"]
        assert service.ok("run_decay")["changes"] == 0

        service.restart()
        service.clock.advance(31 * DAY_S)
        fading = faded(before["importance"], 0.05, 31)
        assert service.record(memory_id)["importance"] == near(fading)
        assert changes(service.ok("run_decay")) == [(memory_id, "medium", "long")]
        assert service.record(memory_id)["importance"] == near(fading)

        service.clock.advance(40 * DAY_S)
        assert service.record(memory_id)["importance"] == near(faded(fading, 0.01, 40))
        assert service.ok("run_decay")["changes"] == 0
        assert service.record(memory_id)["memory_tier"] == "long"


def test_what_is_not_important_enough_at_its_age_stays_and_fades(service: Ageing) -> None:
    memory_id = service.add("on the way out", importance=0.5)
    service.clock.advance(8 * DAY_S)
    for _ in range(3):
        upkeep(service)
    assert service.record(memory_id)["memory_tier"] == "short"
    assert service.record(memory_id)["importance"] == near(faded(0.5, 0.1, 8))
    service.clock.advance(8.2 * DAY_S)  # ln(0.5 / 0.1) / 0.1 = 16.09 days
    assert changes(service.ok("run_decay")) == [(memory_id, "active", "archived")]


def test_what_was_due_when_the_service_was_down_is_done_at_its_next_run(service: Ageing) -> None:
    memory_id = service.add("nobody there at its time", importance=0.9, memory_tier="long")
    service.orchestrator.kill()
    service.clock.advance(500 * DAY_S)
    service.orchestrator.start()
    assert service.record(memory_id)["importance"] == near(faded(0.9, 0.01, 500))
    assert changes(service.ok("run_decay")) == [(memory_id, "active", "archived")]


def test_many_reads_promote_before_the_time(service: Ageing) -> None:
    read, unread = service.add("read all the time"), service.add("never read")
    for _ in range(10):
        service.ok("get_memory", memory_id=read)
    service.accesses_written(read, 10)
    assert changes(service.ok("run_decay")) == [(read, "short", "medium")]
    assert service.record(unread)["memory_tier"] == "short"
    for _ in range(9):
        service.ok("get_memory", memory_id=read)
    service.accesses_written(read, 19)
    assert service.ok("run_decay")["changes"] == 0  # those since its promotion count
    service.ok("get_memory", memory_id=read)
    service.accesses_written(read, 20)
    assert changes(service.ok("run_decay")) == [(read, "medium", "long")]


def test_reinforcing_to_the_top_promotes_before_the_time(service: Ageing) -> None:
    high, low = service.add("reinforced", importance=0.8), service.add("a little", importance=0.6)
    born = service.add("important from the start", importance=0.95)
    service.ok("reinforce_memory", memory_id=high)
    service.ok("reinforce_memory", memory_id=low)
    assert changes(service.ok("run_decay")) == [(high, "short", "medium")]
    assert service.record(high)["importance"] == near(0.96)
    assert service.record(born)["memory_tier"] == "short"


def test_early_promotion_can_be_switched_off(tmp_path: Path) -> None:
    off = {"lifecycle__early_promote_accesses": 0, "lifecycle__early_promote_importance": 0}
    with ageing_orchestrator(tmp_path, **off) as service:
        memory_id = service.add("used a lot", importance=0.5)
        for _ in range(12):
            service.ok("get_memory", memory_id=memory_id)
        service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=10)
        service.accesses_written(memory_id, 13)
        assert service.ok("run_decay")["changes"] == 0
        assert service.record(memory_id)["memory_tier"] == "short"


# -- the archive ------------------------------------------------------------------------------------------------


class Places:
    """Where a memory can be met: everywhere but by its id it is gone while it is archived."""

    def __init__(self, service: Ageing) -> None:
        self.service = service
        self.parent_id = service.add("above", importance=1.0, memory_tier="long")
        self.memory_id = service.add("the lighthouse keeper", importance=0.2, parent_id=self.parent_id)
        self.other_id = service.add("a lighthouse", importance=0.9, memory_tier="long")
        self.group_id = service.ok("create_context_group", name="coast")["group_id"]
        service.ok("add_to_group", memory_id=self.memory_id, group_id=self.group_id)
        service.vectors_ready()

    def seen(self, **options: Any) -> set[str]:
        """The reads in which the memory turns up."""
        ok, query = self.service.ok, {"query": "lighthouse keeper", "touch": False, **options}
        replies = {
            "search_memory": ok("search_memory", **query),
            "semantic_search": ok("semantic_search", **query),
            "dense": ok("semantic_search", mode="dense", **query),
            "search_similar": ok("search_similar", memory_id=self.other_id, touch=False, **options),
            "batch_search": ok("batch_search", queries=[query])["results"][0],
            "list_memories": ok("list_memories", **options),
            "get_children": ok("get_children", parent_id=self.parent_id, **options),
            "get_memories_by_group": ok("get_memories_by_group", group_id=self.group_id, **options),
        }
        return {
            name
            for name, reply in replies.items()
            if self.memory_id in {memory["memory_id"] for memory in reply["results"]}
        }

    def archive(self) -> None:
        self.service.clock.advance(8 * DAY_S)
        assert changes(self.service.ok("run_decay")) == [(self.memory_id, "active", "archived")]


@pytest.fixture
def places(service: Ageing) -> Places:
    return Places(service)


def test_archived_memories_are_out_of_everything_unless_asked_for(service: Ageing, places: Places) -> None:
    everywhere = places.seen()
    assert len(everywhere) == 8
    places.archive()
    assert places.seen() == set()
    assert places.seen(include_archived=True) == everywhere
    service.restart()
    assert places.seen() == set()
    assert places.seen(include_archived=True) == everywhere
    record = service.record(places.memory_id)
    assert (record["state"], record["version"]) == ("archived", 1)
    assert service.ok("list_context_groups")["results"][0]["members"] == 0
    assert places.memory_id in service.listed(filters={"state": "archived"})


@pytest.mark.parametrize("way", ["update_memory", "reinforce_memory", "client"])
def test_an_archived_memory_comes_back(service: Ageing, places: Places, way: str) -> None:
    everywhere = places.seen()
    places.archive()
    if way == "update_memory":
        service.ok("update_memory", memory_id=places.memory_id, update_payload={"state": "active"})
    elif way == "reinforce_memory":
        assert service.ok("reinforce_memory", memory_id=places.memory_id)["new_importance"] == near(0.3)
    else:
        with MemoryClient(service.orchestrator.address, raise_on_error=True) as client:
            client.update_memory(places.memory_id, {"state": "active", "importance": 0.8})
    assert places.seen() == everywhere
    record = service.record(places.memory_id)
    assert record["state"] == "active"
    assert record["importance"] == near(0.8 if way == "client" else 0.3)
    upkeep(service)
    assert service.record(places.memory_id)["state"] == "active"  # important enough to stay for a while
    service.clock.advance(40 * DAY_S)
    reply = service.ok("run_decay")
    assert (places.memory_id, "active", "archived") in changes(reply)


def test_archiving_by_hand_is_the_same(service: Ageing, places: Places) -> None:
    service.ok("update_memory", memory_id=places.memory_id, update_payload={"state": "archived"})
    assert places.seen() == set()
    service.clock.advance(50 * DAY_S)
    assert service.ok("run_decay")["changes"] == 0
    assert service.record(places.memory_id)["state"] == "archived"


def test_reading_an_archived_memory_does_not_bring_it_back(service: Ageing, places: Places) -> None:
    places.archive()
    for _ in range(3):
        service.ok("get_memory", memory_id=places.memory_id)
    service.accesses_written(places.memory_id, 3)
    upkeep(service)
    assert service.record(places.memory_id)["state"] == "archived"
    assert places.seen() == set()


# -- deletion ---------------------------------------------------------------------------------------------------


def test_the_archive_keeps_for_ever_unless_deletion_is_enabled(service: Ageing, places: Places) -> None:
    places.archive()
    service.clock.advance(4000 * DAY_S)
    upkeep(service)
    assert service.record(places.memory_id)["state"] == "archived"


def test_deletion_when_it_is_enabled(tmp_path: Path) -> None:
    with ageing_orchestrator(tmp_path, lifecycle__delete_enabled="true", lifecycle__delete_after_days=30) as service:
        places = Places(service)
        child_id = service.add("below", parent_id=places.memory_id, importance=1.0, memory_tier="long")
        places.archive()
        service.clock.advance(29 * DAY_S)
        upkeep(service)
        assert service.record(places.memory_id)["state"] == "archived"
        service.clock.advance(2 * DAY_S)
        expected = [(places.memory_id, "archived", "deleted"), (child_id, places.memory_id, places.parent_id)]
        assert changes(service.ok("run_cleanup")) == sorted(expected)
        service.fails("memory_not_found", "get_memory", memory_id=places.memory_id)
        assert places.seen(include_archived=True) == set()
        assert service.record(child_id)["parent_id"] == places.parent_id


def test_cleanup_deletes_what_has_expired(service: Ageing) -> None:
    gone = service.add("for a day", expires_at=service.clock.time() + DAY_S)
    stays = service.add("for long", expires_at=service.clock.time() + 90 * DAY_S)
    service.clock.advance(2 * DAY_S)
    assert service.listed() == [stays]
    upkeep(service)
    assert {memory_id for memory_id in service.rows()} == {stays}
    assert service.query("SELECT count(*) FROM embeddings")[0][0] <= 1
    assert service.ok("search_memory", query="day", include_archived=True)["count"] == 0
    assert gone not in service.rows()


def test_cleanup_drops_old_keys_of_requests(tmp_path: Path) -> None:
    with ageing_orchestrator(tmp_path, storage__idempotency_ttl_h=1000) as service:
        for number in range(250):
            service.add(f"memory {number}", importance=1.0, memory_tier="long")
        service.restart_with(storage__idempotency_ttl_h=24)
        service.clock.advance(2 * DAY_S)
        fresh = service.add("the only one of today", importance=1.0)
        dry = service.ok("run_cleanup", dry_run=True)
        assert dry["counts"]["idempotency_keys"] == 250
        assert service.ok("run_cleanup", as_of=dry["as_of"])["counts"] == dry["counts"]
        assert service.query("SELECT count(*) FROM idempotency") == [(1,)]
        assert fresh in service.rows()
