"""Cursors: opaque, tied to their call, checked when they come back."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_system import cursors
from memory_system.errors import InvalidCursor

quick = settings(deadline=None)
keys = st.lists(
    st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
)


@quick
@given(as_of=st.floats(0.0, 1e12), key=keys)
def test_a_position_comes_back_exactly(as_of: float, key: list[object]) -> None:
    scope = cursors.scope("list", "arguments")
    position = cursors.Position(scope, as_of, key)
    cursor = cursors.encode(position)
    assert cursors.decode(cursor, scope) == position
    assert cursor.isascii()
    assert "=" not in cursor


@quick
@given(cursor=st.text(max_size=80))
def test_any_text(cursor: str) -> None:
    with pytest.raises(InvalidCursor):
        cursors.decode(cursor, "scope")


@quick
@given(value=st.recursive(st.none() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4)))
def test_any_json(value: object) -> None:
    cursor = base64.urlsafe_b64encode(json.dumps(value).encode()).decode()
    with pytest.raises(InvalidCursor):
        cursors.decode(cursor, "scope")


@quick
@given(key=keys)
def test_offsets_are_counts(key: list[object]) -> None:
    cursor = cursors.encode(cursors.Position("scope", 0.0, key))
    if len(key) == 1 and type(key[0]) is int and 0 <= key[0] < 2**31:
        assert cursors.offset_of(cursor, "scope") == key[0]
    else:
        with pytest.raises(InvalidCursor):
            cursors.offset_of(cursor, "scope")


def test_a_boolean_is_no_offset() -> None:
    with pytest.raises(InvalidCursor):
        cursors.offset_of(cursors.encode(cursors.Position("scope", 0.0, [True])), "scope")


def test_offsets() -> None:
    assert cursors.offset_of(None, "scope") == 0
    assert cursors.offset_of(cursors.at_offset(7, "scope", 1.5), "scope") == 7
    assert cursors.decode(cursors.at_offset(7, "scope", 1.5), "scope").as_of == 1.5


def test_another_scope_is_refused() -> None:
    cursor = cursors.at_offset(7, cursors.scope("a", 1), 0.0)
    for other in (cursors.scope("a", 2), cursors.scope("b", 1), cursors.scope("a"), ""):
        with pytest.raises(InvalidCursor, match="another call"):
            cursors.decode(cursor, other)


@quick
@given(first=st.lists(st.text()), second=st.lists(st.text()))
def test_scopes_tell_arguments_apart(first: list[str], second: list[str]) -> None:
    assert (cursors.scope(*first) == cursors.scope(*second)) == (first == second)
