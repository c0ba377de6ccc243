"""Scoring candidates and filling a budget with them, and the text that comes of it."""

from __future__ import annotations

from datetime import timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.context_choice import Budget, Choice, Scored, choose, likeness, says_again, score
from agents.context_items import PINNED, Item, Writer, day_of, in_order, text_of
from memory_system.agent_settings import ContextManagerSettings
from tests.support.contexts import DAY_S, NOON_S, WRITER, WordCounts, item, record

# Two of the weights are 0 by default.
RULES = ContextManagerSettings(neighbour_weight=0.4, session_weight=0.3)


def scored(*items: tuple[Item, float]) -> list[Scored]:
    return [Scored(each, value, {"relevance": value}) for each, value in items]


def chosen(
    candidates: list[Scored], tokens: int = 1000, max_items: int = 50, diversity: float = 0.1, **options: Any
) -> Choice:
    return choose(candidates, Budget(tokens, WRITER.heading_cost), max_items, diversity, **options)


def texts(choice: Choice) -> list[str]:
    return [each.item.text for each in choice.chosen]


class TestScore:
    def test_the_parts_add_up_and_are_what_the_formula_says(self) -> None:
        before = item("Where was it?", parent_id="s", created_at=NOON_S - 1)
        answer = item("In Rome.", parent_id="s", created_at=NOON_S, importance=0.8)
        far = item("Nothing to do with it.", parent_id="t", created_at=NOON_S - 7 * DAY_S)
        found = {each.item.text: each for each in score([(before, 1.0), (answer, 0.5), (far, 0.2)], RULES, NOON_S)}
        parts = found["In Rome."].parts
        assert parts["relevance"] == 0.5
        assert parts["neighbours"] == pytest.approx(0.4 * 1.0)
        assert parts["session"] == pytest.approx(0.3 * (1.0 + 0.5) / 3)
        assert parts["importance"] == pytest.approx(0.1 * 0.8)
        assert parts["recency"] == pytest.approx(0.1)
        assert found["In Rome."].score == pytest.approx(sum(parts.values()))
        assert found["Nothing to do with it."].parts["recency"] == pytest.approx(0.05)
        assert found["Nothing to do with it."].parts["neighbours"] == 0.0

    def test_what_was_said_beside_a_hit_comes_before_an_equal_elsewhere(self) -> None:
        hit = item("I lost my key.", parent_id="s", created_at=NOON_S)
        beside = item("Where, then?", parent_id="s", created_at=NOON_S + 5)
        elsewhere = item("How so, then?", parent_id="t", created_at=NOON_S + 5)
        order = [each.item.text for each in score([(elsewhere, 0.3), (hit, 1.0), (beside, 0.3)], RULES, NOON_S)]
        assert order == ["I lost my key.", "Where, then?", "How so, then?"]

    def test_who_is_asked_about_is_preferred(self) -> None:
        """By any word of the name, in any case; the order of equals would be the other way round."""
        candidates = [(item("Ask Ada.", "Ben Reyes"), 0.5), (item("I ski.", "Ada Cruz"), 0.5), (item("I sew."), 0.5)]
        first, *others = score(candidates, RULES, NOON_S, "What is ADA's hobby?")
        assert first.item.speaker == "Ada Cruz"
        assert first.parts["speaker"] == RULES.speaker_weight > 0.0
        assert first.score == pytest.approx(0.5 + RULES.speaker_weight + 0.1 * 0.5 + 0.1)
        assert [each.parts["speaker"] for each in others] == [0.0, 0.0]
        for query in ("Who is Adam, and what is adagio?", None):
            assert {each.parts["speaker"] for each in score(candidates, RULES, NOON_S, query)} == {0.0}
        assert score(candidates, RULES, NOON_S, "Ada?", plain=True)[0].parts == {"relevance": 0.5}

    def test_without_a_session_nobody_is_a_neighbour(self) -> None:
        for each in score([(item("One fact."), 1.0), (item("Another fact."), 1.0)], RULES, NOON_S):
            assert each.parts["neighbours"] == each.parts["session"] == 0.0

    def test_plain_is_relevance_alone(self) -> None:
        important = item("Important.", importance=1.0)
        relevant = item("Relevant.", importance=0.0)
        ordered = score([(important, 0.4), (relevant, 0.5)], RULES, NOON_S, plain=True)
        assert [(each.item.text, each.score) for each in ordered] == [("Relevant.", 0.5), ("Important.", 0.4)]

    def test_what_is_in_the_future_is_new_not_newer(self) -> None:
        (each,) = score([(item("Soon.", occurred_at=NOON_S + 9 * DAY_S), 0.0)], RULES, NOON_S)
        assert each.parts["recency"] == pytest.approx(0.1)

    @pytest.mark.parametrize(
        ("parts", "reason"),
        [
            ({"relevance": 0.5, "neighbours": 0.6}, "neighbours"),
            ({"relevance": 0.0, "importance": 0.1, "recency": 0.05}, "importance"),
            ({"relevance": 1.0}, "relevance"),
        ],
    )
    def test_the_reason_is_the_greatest_part(self, parts: dict[str, float], reason: str) -> None:
        assert Scored(item("x"), sum(parts.values()), parts).reason == reason
        assert Scored(item("x", pinned=True), sum(parts.values()), parts).reason == "pinned"


class TestChoose:
    def test_a_heading_is_paid_for_once(self) -> None:
        """A day's heading is three words; each line here is two."""
        same_day = scored(*((item(f"Number{at} here."), 1.0 - at / 10) for at in range(3)))
        assert chosen(same_day, tokens=3 + 3 * 2).tokens == 9
        assert len(chosen(same_day, tokens=8).chosen) == 2
        days = scored(*((item(f"Number{at} here.", created_at=NOON_S + at * DAY_S), 1.0) for at in range(3)))
        assert chosen(days, tokens=9).tokens == 5

    def test_what_does_not_fit_makes_room_for_what_does(self) -> None:
        long, short = item("word " * 30), item("It fits.")
        choice = chosen(scored((long, 1.0), (short, 0.1)), tokens=10)
        assert texts(choice) == ["It fits."]
        assert choice.left_out == {"budget": 1}

    def test_what_is_short_comes_before_what_is_long_and_hardly_better(self) -> None:
        """Of 16 tokens and of 1: the power .1 makes 1.0 worth .758, and .05 makes it .871."""
        long, short = item("word " * 16), item("Short.")
        candidates = scored((long, 1.0), (short, 0.8))
        assert texts(chosen(candidates, diversity=0.0)) == [long.text, "Short."]
        assert texts(chosen(candidates, diversity=0.0, brevity=0.05)) == [long.text, "Short."]
        assert texts(chosen(candidates, diversity=0.0, brevity=0.1)) == ["Short.", long.text]
        assert texts(chosen(candidates, tokens=19, diversity=0.0, brevity=0.1)) == ["Short."]

    def test_brevity_is_nothing_to_a_pin(self) -> None:
        pin, hit = item("word " * 16, pinned=True), item("Short.")
        assert texts(chosen(scored((hit, 1.0), (pin, 0.0)), brevity=1.0)) == [pin.text, "Short."]

    def test_nothing_fits(self) -> None:
        choice = chosen(scored((item("much too long a line"), 1.0)), tokens=3)
        assert choice == Choice((), 0, {"budget": 1})

    def test_pins_come_first_and_all_else_competes(self) -> None:
        pin, hit = item("Never forget this.", pinned=True), item("A hit.")
        choice = chosen(scored((hit, 5.0), (pin, 0.0)))
        assert texts(choice) == ["Never forget this.", "A hit."]
        assert chosen(scored((hit, 5.0), (pin, 0.0)), max_items=1).left_out == {"limit": 1}

    def test_who_repeats_is_left_out_and_who_is_alike_waits(self) -> None:
        candidates = scored(
            (item("I love green tea from Japan.", "Ada"), 1.0),
            (item("i love green tea, from japan!", "Ada"), 0.99),
            (item("green tea from Japan", "Ada"), 0.98),
            (item("I love green tea from China.", "Ada"), 0.97),
            (item("My brother lives in Oslo.", "Ada"), 0.9),
        )
        choice = chosen(candidates, diversity=0.3)
        assert texts(choice) == [
            "I love green tea from Japan.",
            "My brother lives in Oslo.",
            "I love green tea from China.",
        ]
        assert choice.left_out == {"duplicate": 2}
        assert len(chosen(candidates, diversity=0.0, repeats=True).chosen) == 5

    def test_two_people_may_say_the_same(self) -> None:
        candidates = scored((item("I love green tea.", "Ada"), 1.0), (item("I love green tea.", "Ben"), 0.9))
        assert len(chosen(candidates).chosen) == 2

    def test_the_number_of_items_is_bounded(self) -> None:
        candidates = scored(*((item(f"Number {at} of many."), 1.0) for at in range(300)))
        choice = chosen(candidates, tokens=100_000, max_items=7)
        assert len(choice.chosen) == 7
        assert choice.left_out == {"limit": 293}

    def test_what_is_too_long_is_not_in_the_way_of_what_fits(self) -> None:
        """However many of the best are too long, at first or after what was chosen."""
        long = [(item(f"w{at} " * 50), 1.0) for at in range(20)]
        medium = [(item(f"v{at} " * 12), 0.9) for at in range(20)]
        short = [(item("One more word."), 0.5), (item("And another one."), 0.4), (item("A last one."), 0.3)]
        choice = chosen(scored(*long, *medium, *short), tokens=25, max_items=2)
        assert texts(choice) == [medium[0][0].text, "One more word."]
        assert choice.left_out == {"budget": 39, "limit": 2}

    @given(
        st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1), st.booleans(), st.integers(0, 3)), max_size=30),
        st.integers(1, 120),
        st.integers(1, 20),
        st.floats(0, 1),
        st.floats(0, 1),
    )
    def test_the_text_never_has_more_tokens_than_the_budget(
        self,
        given_items: list[tuple[int, float, bool, int]],
        tokens: int,
        max_items: int,
        diversity: float,
        brevity: float,
    ) -> None:
        candidates = scored(
            *(
                (item(f"w{at} " * words, pinned=pinned, created_at=NOON_S + day * DAY_S), value)
                for at, (words, value, pinned, day) in enumerate(given_items)
            )
        )
        choice = chosen(candidates, tokens, max_items, diversity, brevity=brevity)
        written = text_of([each.item for each in choice.chosen])
        assert WordCounts().count(written) == choice.tokens <= tokens
        assert len(choice.chosen) + sum(choice.left_out.values()) == len(candidates)
        assert len(choice.chosen) <= max_items


def test_likeness() -> None:
    assert likeness(frozenset("ab"), frozenset("ab")) == pytest.approx(1.0)
    assert likeness(frozenset("ab"), frozenset("bc")) == pytest.approx(0.5)
    assert likeness(frozenset("ab"), frozenset()) == 0.0


@pytest.mark.parametrize(
    ("text", "other", "again"),
    [
        ("I take the train.", "Yes, I take the train to Como.", True),
        ("I take the train to Como.", "I take the train.", False),
        ("I prefer trains to planes.", "I prefer planes to trains.", False),
        ("I like tea so much.", "I do not like tea so much.", False),
        ("The code is 1234 now.", "The code is 9876 now.", False),
        ("Yes.", "Yes, of course.", False),
        ("Yes.", "Yes.", True),
    ],
)
def test_says_again(text: str, other: str, again: bool) -> None:
    assert says_again(item(text), item(other)) is again


class TestText:
    def test_by_day_with_who_said_it_and_pins_first(self) -> None:
        items = [
            item("Second.", "Ben", created_at=NOON_S + 10),
            item("Nuts are not for Ada.", pinned=True, created_at=NOON_S - 300 * DAY_S),
            item("A day later.", "Ada", occurred_at=NOON_S + DAY_S, created_at=NOON_S),
            item("First.", "Ada", created_at=NOON_S),
        ]
        assert text_of(items) == (
            f"{PINNED}\nNuts are not for Ada. (19 January 2023)\n\n"
            "15 November 2023\nAda: First.\nBen: Second.\n\n16 November 2023\nAda: A day later."
        )
        assert in_order(items)[0].text == "Nuts are not for Ada."
        assert text_of([]) == ""

    def test_a_day_begins_where_the_settings_say(self) -> None:
        evening_s = NOON_S + 8 * 3600
        assert day_of(evening_s, WRITER.zone) == "15 November 2023"
        assert day_of(evening_s, ZoneInfo("Asia/Manila")) == "16 November 2023"
        assert day_of(evening_s, timezone(timedelta(hours=-12))) == "15 November 2023"

    def test_a_role_stands_for_a_name(self) -> None:
        told = Writer(WordCounts(), WRITER.zone).item(
            {**record("Hello there."), "metadata": {"role": "assistant", "data": {"mood": "good"}}}
        )
        assert told.line == "assistant: Hello there."
        assert told.metadata == {"mood": "good"}

    def test_what_no_agent_stored_keeps_its_metadata(self) -> None:
        told = WRITER.item({**record("Trains run on rails."), "metadata": {"topic": "trains"}})
        assert told.line == "Trains run on rails."
        assert told.metadata == {"topic": "trains"}


@given(st.lists(st.text("abcd ", max_size=12), min_size=1, max_size=12), st.floats(0.05, 0.95), st.floats(0, 1))
def test_the_pool_goes_by_the_worth_and_the_likeness_that_are_documented(
    lines: list[str], diversity: float, brevity: float
) -> None:
    """Against the formulas, computed anew for each choice."""
    candidates = scored(*((item(text), 1.0 / place) for place, text in enumerate(lines, 1)))
    worths = {each.item: each.score / max(1, each.item.tokens) ** brevity for each in candidates}
    left, expected = list(candidates), list[Item]()
    while left:
        best = max(
            left,
            key=lambda each: (
                (1.0 - diversity) * worths[each.item] / max(worths.values())
                - diversity
                * max((likeness(frozenset(each.item.words), frozenset(one.words)) for one in expected), default=0.0)
            ),
        )
        left.remove(best)
        expected.append(best.item)
    choice = chosen(candidates, tokens=10**6, diversity=diversity, brevity=brevity, repeats=True)
    assert [each.item.memory_id for each in choice.chosen] == [each.memory_id for each in expected]
