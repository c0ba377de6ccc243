"""What one manager keeps for the next: bounded, and never a reason not to start."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from memory_system.health.memory import FORGET_S, MAX_KEPT, Memory, decode, encode

NOW_AT = 1_700_000_000.0
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
FIELDS = ("state", "cause", "troubled", "deaths_at", "heartbeat_s", "last_heartbeat_at", "address", "pid", "since_at")


def test_what_matters_comes_back() -> None:
    kept = {
        "orchestrator": Memory("flapping", "flapping", troubled=True, deaths_at=(NOW_AT - 20, NOW_AT - 10)),
        "planner": Memory("healthy", heartbeat_s=5.0, last_heartbeat_at=NOW_AT - 1, address="10.0.0.2"),
        "memory_scheduler": Memory("healthy", pid=7, since_at=NOW_AT - 500),
    }
    rest = {
        "archiver": Memory("healthy", since_at=NOW_AT - 500),
        "old": Memory("down", "silent", heartbeat_s=5.0, last_heartbeat_at=NOW_AT - FORGET_S),
    }
    assert decode(encode({**rest, **kept}, NOW_AT), NOW_AT) == kept


def test_it_is_bounded_and_trouble_comes_first() -> None:
    calm = {f"a{number}": Memory("healthy", heartbeat_s=5.0, last_heartbeat_at=NOW_AT) for number in range(MAX_KEPT)}
    found = decode(encode({**calm, "orchestrator": Memory("down", "died", troubled=True)}, NOW_AT), NOW_AT)
    assert len(found) == MAX_KEPT
    assert "orchestrator" in found


@given(st.text() | ANYTHING.map(json.dumps))
def test_whatever_is_kept_can_be_read(text: str) -> None:
    decode(text, NOW_AT)


@given(st.fixed_dictionaries({name: ANYTHING for name in FIELDS} | {"state": st.just("down")}))
def test_whatever_a_component_has_can_be_read(value: dict[str, object]) -> None:
    for each in decode(json.dumps({"planner": value, "other": [value]}), NOW_AT).values():
        assert each.state == "down"
        assert all(at <= NOW_AT for at in each.deaths_at)


def test_nothing_is_no_memory() -> None:
    assert decode(None, NOW_AT) == {}
