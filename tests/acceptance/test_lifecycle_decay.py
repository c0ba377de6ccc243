"""Importance fades as time goes by: in reads, sorts and filters, through use and restarts, with nothing swept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from memory_client import MemoryClient
from tests.support.lifecycle import DAY_S, Ageing, ageing_orchestrator, faded

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

# Rates of the tiers as the documents give them, and how far two reads of one test may lie apart.
SHORT, MEDIUM, LONG = 0.1, 0.05, 0.01
NEAR = 1e-4


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Ageing]:
    with ageing_orchestrator(tmp_path) as running:
        yield running


def near(value: float) -> Any:
    return pytest.approx(value, abs=NEAR)


def readings(service: Ageing, parent_id: str, memory_id: str) -> dict[str, float]:
    """The importance of one memory as each read gives it."""
    filters = {"memory_id": memory_id}
    lists = {
        "get_memory": [service.record(memory_id)],
        "batch_get_memories": service.ok("batch_get_memories", memory_ids=[memory_id], touch=False)["results"],
        "get_children": service.ok("get_children", parent_id=parent_id)["results"],
        "list_memories": service.ok("list_memories", filters=filters)["results"],
        "search_memory": service.ok("search_memory", query="harbour", filters=filters, touch=False)["results"],
        "semantic_search": service.ok("semantic_search", query="harbour", filters=filters, touch=False)["results"],
        "get_memories_by_group": service.ok("get_memories_by_group", group_id=1)["results"],
    }
    found = {}
    for action, memories in lists.items():
        [memory] = [each for each in memories if each["memory_id"] == memory_id]
        found[action] = memory["importance"]
    return found


def test_every_read_gives_the_importance_of_now_also_after_a_kill(service: Ageing) -> None:
    parent_id = service.add("what stands above")
    memory_id = service.add("the harbour in the evening", importance=0.8, parent_id=parent_id)
    group_id = service.ok("create_context_group", name="places")["group_id"]
    service.ok("add_to_group", memory_id=memory_id, group_id=group_id)
    service.vectors_ready()
    before = service.rows()
    for days in (0, 1, 3, 6):
        service.clock.advance(days * DAY_S - service.clock.ahead_s)
        for _ in range(2):
            read = readings(service, parent_id, memory_id)
            assert read == dict.fromkeys(read, near(faded(0.8, SHORT, days)))
            service.restart()
    assert service.rows() == before  # computed, not swept


@pytest.mark.parametrize(("tier", "rate"), [("short", SHORT), ("medium", MEDIUM), ("long", LONG)])
def test_each_tier_has_its_rate(service: Ageing, tier: str, rate: float) -> None:
    memory_id = service.add("slow or fast", memory_tier=tier, importance=0.9)
    service.clock.advance(5 * DAY_S)
    assert service.record(memory_id)["importance"] == near(faded(0.9, rate, 5))


def test_runs_of_decay_take_nothing_from_what_is_not_due(service: Ageing) -> None:
    memory_id = service.add("as it is", importance=0.8)
    service.clock.advance(3 * DAY_S)
    for _ in range(5):
        assert service.ok("run_decay")["changes"] == 0
        assert service.record(memory_id)["importance"] == near(faded(0.8, SHORT, 3))


def test_a_sort_by_importance_follows_the_time(service: Ageing) -> None:
    quick = service.add("great now, and soon forgotten", importance=0.9)
    steady = service.add("less, but for long", importance=0.5, memory_tier="long")
    by_importance = {"sort_field": "importance", "sort_order": "desc"}
    assert service.listed(**by_importance) == [quick, steady]
    service.clock.advance(10 * DAY_S)
    assert faded(0.9, SHORT, 10) < faded(0.5, LONG, 10)
    assert service.listed(**by_importance) == [steady, quick]
    service.restart()
    assert service.listed(**by_importance) == [steady, quick]
    assert service.listed(sort_field="importance", sort_order="asc") == [quick, steady]


def test_a_filter_on_importance_follows_the_time(service: Ageing) -> None:
    quick = service.add("a concert by the harbour", importance=0.9)
    steady = service.add("a concert in the museum", importance=0.5, memory_tier="long")
    service.vectors_ready()
    important = {"importance": {"gte": 0.45}}

    def passing() -> list[set[str]]:
        return [
            set(service.listed(filters=important)),
            service.found("concert", filters=important),
            service.found("concert", "semantic_search", filters=important),
        ]

    assert passing() == [{quick, steady}] * 3
    service.clock.advance(9 * DAY_S)
    assert faded(0.9, SHORT, 9) < 0.45 < faded(0.5, LONG, 9)
    assert passing() == [{steady}] * 3
    service.restart()
    assert passing() == [{steady}] * 3


def test_a_walk_by_importance_sees_each_memory_once_however_long_it_takes(service: Ageing) -> None:
    """Two rates: at the instant of each page the order would be another one."""
    tiers = itertools.cycle(["short", "long"])
    ids = {service.add(f"memory {n}", importance=0.3 + n / 100.0, memory_tier=next(tiers)) for n in range(40)}
    seen: list[str] = []
    asked: dict[str, Any] = {"sort_field": "importance", "limit": 6}
    reply = service.ok("list_memories", **asked)
    as_of = reply["as_of"]
    values = []
    while True:
        seen += [memory["memory_id"] for memory in reply["results"]]
        values += [memory["importance"] for memory in reply["results"]]
        if "next_cursor" not in reply:
            break
        service.clock.advance(2 * DAY_S)
        reply = service.ok("list_memories", **asked, cursor=reply["next_cursor"])
        assert reply["as_of"] == as_of
    assert sorted(seen) == sorted(ids)
    assert values == sorted(values, reverse=True)


def test_a_read_by_id_counts_and_slows_the_fading(service: Ageing) -> None:
    read, unread = service.add("read often", importance=0.6), service.add("never read", importance=0.6)
    for _ in range(5):
        service.ok("get_memory", memory_id=read)
    service.accesses_written(read, 5)
    started = service.record(read)["importance"]
    assert started == near(0.6 + 5 * 0.01)  # access_weight_get
    assert service.record(read)["last_accessed_at"] == pytest.approx(service.clock.time(), abs=30.0)
    service.restart()
    service.clock.advance(5 * DAY_S)
    assert service.record(read)["importance"] == near(faded(started, SHORT, 5, accesses=5))
    assert service.record(unread)["importance"] == near(faded(0.6, SHORT, 5))


def test_a_read_starts_the_clock_from_the_importance_of_then(service: Ageing) -> None:
    memory_id = service.add("read after some days", importance=0.9)
    service.clock.advance(4 * DAY_S)
    service.ok("get_memory", memory_id=memory_id)
    service.accesses_written(memory_id, 1)
    then = faded(0.9, SHORT, 4) + 0.01
    assert service.record(memory_id)["importance"] == near(then)
    service.clock.advance(3 * DAY_S)
    assert service.record(memory_id)["importance"] == near(faded(then, SHORT, 3, accesses=1))


@pytest.mark.parametrize("weight", [0.0, 0.05])
def test_search_hits_weigh_what_the_settings_say(tmp_path: Path, weight: float) -> None:
    with ageing_orchestrator(tmp_path, lifecycle__access_weight_search=weight) as service:
        memory_id = service.add("a lighthouse", importance=0.5)
        service.vectors_ready()
        for _ in range(3):
            assert service.ok("search_memory", query="lighthouse")["count"] == 1
        service.ok("get_memory", memory_id=memory_id)  # what is counted is written in order: this comes after
        service.accesses_written(memory_id, 1 if weight == 0.0 else 4)
        assert service.record(memory_id)["importance"] == near(0.5 + 3 * weight + 0.01)


def test_reinforcing_multiplies_up_to_one_and_starts_the_clock_anew(service: Ageing) -> None:
    memory_id = service.add("reinforced", importance=0.5)
    service.clock.advance(3 * DAY_S)
    now = faded(0.5, SHORT, 3)
    reply = service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=1.5)
    assert reply["new_importance"] == near(now * 1.5)
    service.restart()
    service.clock.advance(2 * DAY_S)
    fading = faded(now * 1.5, SHORT, 2, accesses=1)
    assert service.record(memory_id)["importance"] == near(fading)
    assert service.ok("reinforce_memory", memory_id=memory_id)["new_importance"] == near(fading * 1.2)
    assert service.ok("reinforce_memory", memory_id=memory_id, reinforcement_factor=100)["new_importance"] == 1.0
    assert service.record(memory_id)["importance"] == near(1.0)


def test_a_clock_that_is_set_back_raises_no_importance(service: Ageing) -> None:
    memory_id = service.add("kept", importance=0.5)
    service.clock.advance(-10 * DAY_S)
    assert service.record(memory_id)["importance"] == 0.5
    service.clock.advance(13 * DAY_S)
    assert service.record(memory_id)["importance"] == near(faded(0.5, SHORT, 3))


def test_sessions_do_not_fade(service: Ageing) -> None:
    session_id = service.ok("create_session", user_id="ada")["session_id"]
    before = service.record(session_id)["importance"]
    service.clock.advance(400 * DAY_S)
    assert service.ok("run_decay")["changes"] == 0
    assert service.record(session_id)["importance"] == before
    assert service.record(session_id)["state"] == "active"


def test_the_client_leaves_tier_importance_and_factor_to_the_type(tmp_path: Path) -> None:
    types = "{knowledge_fact: {memory_tier: long, importance: 0.7, reinforcement_factor: 1.1}, note: {importance: 0.2}}"
    with (
        ageing_orchestrator(tmp_path, lifecycle__memory_types=types) as service,
        MemoryClient(service.orchestrator.address, raise_on_error=True) as client,
    ):
        fact = client.add_memory("water boils at 100 degrees", "knowledge_fact")["memory_id"]
        batch = client.batch_add_memories(
            [{"content": "iron rusts", "memory_type": "knowledge_fact"}, {"content": "milk", "memory_type": "note"}]
        )["memory_ids"]
        named = client.add_memory("x", "knowledge_fact", "medium", 0.9)["memory_id"]
        plain = client.add_memory("of no special type")["memory_id"]
        of = {memory_id: service.record(memory_id) for memory_id in (fact, *batch, named, plain)}
        assert [(record["memory_tier"], round(record["importance"], 4)) for record in of.values()] == [
            *(("long", 0.7), ("long", 0.7), ("short", 0.2), ("medium", 0.9), ("short", 0.5))
        ]
        assert client.reinforce_memory(fact)["new_importance"] == near(0.77)
        assert client.reinforce_memory(plain)["new_importance"] == near(0.6)
        assert client.reinforce_memory(fact, 1.05)["new_importance"] == near(0.77 * 1.05)
        service.clock.advance(30 * DAY_S)
        assert service.record(batch[0])["importance"] == near(faded(0.7, LONG, 30))
