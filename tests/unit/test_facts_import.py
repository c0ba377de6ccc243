"""Rows of other knowledge bases as facts."""

from __future__ import annotations

from typing import Any

import pytest

from agents.facts import Draft
from agents.facts_import import columns_of, draft_of
from memory_system.errors import InvalidField


def read(**record: Any) -> Draft:
    return draft_of(record, columns_of(record), "records[0]", topic=None, source=None)


def test_columns_go_by_their_usual_names() -> None:
    assert columns_of(["id", "Category", "fact", "certainty", "timestamp"]) == {
        "content": "fact",
        "topic": "Category",
        "confidence": "certainty",
        "created_at": "timestamp",
    }


def test_a_column_that_is_given_is_not_guessed_again() -> None:
    assert columns_of(["title", "text", "topic"], {"content": "title", "topic": "text"}) == {
        "content": "title",
        "topic": "text",
    }


@pytest.mark.parametrize(
    ("given", "field"), [({"contents": "a"}, "columns.contents"), ({"content": "b"}, "columns.content")]
)
def test_a_column_that_is_not_there_is_named(given: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        columns_of(["a"], given)
    assert caught.value.field == field


def test_a_whole_row() -> None:
    draft = read(topic=" Rail ", content=" Trains run. ", confidence="0.5", tags="a, b,,a", source="x", created_at=5)
    assert draft == Draft("Rail", "Trains run.", 0.5, "x", ("a", "b"), 5.0, is_import=True)
    memory = draft.memory()
    assert memory["memory_type"] == "knowledge_fact"
    assert memory["memory_tier"] == "long"
    assert memory["parent_id"] is None
    assert memory["occurred_at"] == 5.0
    assert memory["metadata"]["import_key"] == draft.text_key


def test_what_is_missing_comes_from_the_import() -> None:
    record = {"content": "x", "topic": "", "confidence": None, "tags": None, "created_at": ""}
    draft = draft_of(record, columns_of(record), "records[0]", topic="Rail", source="old.db")
    assert draft == Draft("Rail", "x", 1.0, "old.db", (), None, is_import=True)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [
        (1_600_000_000, 1.6e9),
        (1_600_000_000_000, 1.6e9),
        ("1600000000.5", 1_600_000_000.5),
        ("2020-09-13T12:26:40+00:00", 1.6e9),
        ("2020-09-13 14:26:40+02:00", 1.6e9),
        ("2020-09-13 12:26:40", 1.6e9),
        ("2020-09-13", 1_599_955_200.0),
    ],
)
def test_times(given: object, seconds: float) -> None:
    assert read(topic="t", content="x", created_at=given).said_at == seconds


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"topic": "t"}, "content"),
        ({"topic": "t", "content": "  "}, "content"),
        ({"topic": "t", "content": True}, "content"),
        ({"topic": "t", "content": "x" * 70_000}, "content"),
        ({"content": "x"}, "topic"),
        ({"topic": "t" * 200, "content": "x"}, "topic"),
        ({"topic": "t", "content": "x", "confidence": 80}, "confidence"),
        ({"topic": "t", "content": "x", "confidence": "high"}, "confidence"),
        ({"topic": "t", "content": "x", "confidence": "nan"}, "confidence"),
        ({"topic": "t", "content": "x", "tags": 5}, "tags"),
        ({"topic": "t", "content": "x", "tags": "[1]"}, "tags"),
        ({"topic": "t", "content": "x", "tags": "[broken"}, "tags"),
        ({"topic": "t", "content": "x", "tags": "y" * 200}, "tags"),
        ({"topic": "t", "content": "x", "created_at": "soon"}, "created_at"),
        ({"topic": "t", "content": "x", "created_at": []}, "created_at"),
    ],
)
def test_what_is_wrong_is_named(record: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidField) as caught:
        read(**record)
    assert caught.value.field == f"records[0].{field}"


def test_tags_as_a_list_or_json() -> None:
    assert read(topic="t", content="x", tags='["a", "b"]').tags == ("a", "b")
    assert read(topic="t", content="x", tags=["a", " b "]).tags == ("a", "b")
