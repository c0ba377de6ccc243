"""Summaries of a context: its own sentences, those that tell most."""

from __future__ import annotations

from agents import utterances
from agents.context_choice import Scored
from agents.context_items import Item
from agents.context_summary import summarise
from memory_system.settings import load_settings
from tests.support.contexts import DAY_S, NOON_S, WRITER, WordCounts, item

JUDGE = utterances.load(load_settings(environ={"MEMORY_CONFIG": "/dev/null"}))


def summary(items: list[Item], budget: int, query: str | None = None) -> tuple[str, int, tuple[str, ...]]:
    scored = [Scored(each, 1.0, {"relevance": 1.0}) for each in items]
    made = summarise(scored, query, budget, JUDGE, WRITER)
    return made.text, made.tokens, made.memory_ids


def test_it_tells_what_was_told_in_the_order_of_time() -> None:
    items = [
        item("Great! I moved to Cebu in March 2021. How are you?", "Ada", created_at=NOON_S + DAY_S),
        item("Thanks! My sister Eva works in Oslo. Bye!", "Ben", created_at=NOON_S),
        item("Good morning!", "Ben", created_at=NOON_S),
    ]
    text, tokens, ids = summary(items, 100)
    assert text == (
        "15 November 2023\nBen: My sister Eva works in Oslo.\n\n16 November 2023\nAda: I moved to Cebu in March 2021."
    )
    assert tokens == WordCounts().count(text)
    assert set(ids) == {items[0].memory_id, items[1].memory_id}


def test_the_query_decides_what_fits() -> None:
    items = [item("I love green tea.", "Ada"), item("I love night trains.", "Ada")]
    assert summary(items, 9, "Which trains?")[0].endswith("Ada: I love night trains.")
    assert summary(items, 9, "What about green tea?")[0].endswith("Ada: I love green tea.")


def test_a_sentence_that_tells_nothing_stays_out_unless_it_is_asked_for() -> None:
    items = [item("It was a quiet evening by the lake.", "Ada")]
    assert summary(items, 50) == ("", 0, ())
    assert "quiet evening" in summary(items, 50, "What about the evening?")[0]


def test_nothing_is_said_twice() -> None:
    items = [item("I love green tea.", "Ada", created_at=NOON_S + at) for at in range(3)]
    assert summary(items, 50)[0].count("green tea") == 1


def test_of_nothing_there_is_no_summary() -> None:
    assert summary([], 50, "trains") == ("", 0, ())
