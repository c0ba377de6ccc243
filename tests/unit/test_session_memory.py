"""The pure parts of the session memory: turns, what fits a budget, dumps of conversations, lines of an import."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agents.sessions_dumps import BadDump, portions, read
from agents.sessions_import import (
    MAX_BYTES,
    MAX_LINES,
    Conversation,
    Ids,
    Rules,
    batches,
    begins,
    session_line,
    times,
    turn_lines,
)
from agents.sessions_window import beside, newest_that_fit, select
from agents.turns import Interaction, Turn

# -- turns ------------------------------------------------------------------------------------------------------------


def record(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """As the service gives back what was stored with these fields."""
    blank = {"memory_id": "m", "session_id": "s", "user_id": "u", "created_at": 5.0, "occurred_at": None}
    return {**blank, "importance": 0.5, **fields, **changes}


@pytest.mark.parametrize(
    ("interaction", "content", "line"),
    [
        (Interaction("user", "Hi."), "Hi.", "user: Hi."),
        (Interaction("Assistant", "Hi."), "Hi.", "Assistant: Hi."),
        (Interaction("Ada", "Hi."), "Ada: Hi.", "Ada: Hi."),
        (Interaction("user", "Ada: Hi.", "Ada"), "Ada: Ada: Hi.", "Ada: Ada: Hi."),
        (Interaction("user", "Bob: Hi.", "A: B"), "A: B: Bob: Hi.", "A: B: Bob: Hi."),
    ],
)
def test_a_turn_comes_back_as_it_was_said(interaction: Interaction, content: str, line: str) -> None:
    fields = interaction.memory(0.4)
    assert (fields["content"], fields["importance"]) == (content, 0.4)
    turn = Turn.of(record(fields))
    assert (turn.role, turn.speaker, turn.text) == (interaction.role, interaction.name, interaction.content)
    assert turn.line == line


def test_what_the_caller_says_of_a_turn_is_kept() -> None:
    interaction = Interaction("user", "Hi.", metadata={"role": "x"}, occurred_at=3.0, importance=0.9)
    fields = interaction.memory(0.1)
    assert (fields["occurred_at"], fields["importance"]) == (3.0, 0.9)
    turn = Turn.of(record(fields))
    assert (turn.role, turn.metadata, turn.said_at) == ("user", {"role": "x"}, 3.0)
    assert Turn.of(record(Interaction("user", "Hi.").memory(0.1))).said_at == 5.0


def test_a_memory_that_no_session_agent_made_is_a_turn_too() -> None:
    turn = Turn.of(record({"content": "Hi.", "metadata": {}}))
    assert (turn.role, turn.speaker, turn.line) == ("", None, "Hi.")


# -- what fits --------------------------------------------------------------------------------------------------------


def turns(*numbers: int) -> list[Turn]:
    return [Turn(f"m{n:04d}", "s", "u", "user", None, f"turn {n}", float(n)) for n in numbers]


def one_each(_turn: Turn) -> int:
    return 1


def numbers(found: tuple[Turn, ...]) -> list[int]:
    return [int(turn.created_at) for turn in found]


def test_the_newest_that_fit_leave_no_gap() -> None:
    costs = {9: 3, 8: 5, 7: 1}
    newest = turns(9, 8, 7)
    for budget, count in ((0, 0), (2, 0), (3, 1), (7, 1), (8, 2), (9, 3), (99, 3)):
        assert newest_that_fit(newest, budget, lambda turn: costs[int(turn.created_at)]) == count


def test_older_turns_have_their_share_and_leave_the_rest() -> None:
    newest = turns(*range(20, 10, -1))
    chosen = select(newest, turns(3, 19, 1, 2), 10, 0.3, one_each)
    assert (numbers(chosen.turns), chosen.tokens) == ([1, 2, 3, 14, 15, 16, 17, 18, 19, 20], 10)
    assert chosen.relevant == {"m0001", "m0002", "m0003"}
    # One that is asked for takes one place; the rest goes to the newest.
    chosen = select(newest, turns(3), 10, 0.3, one_each)
    assert (numbers(chosen.turns), chosen.relevant) == ([3, 12, 13, 14, 15, 16, 17, 18, 19, 20], {"m0003"})


def test_a_turn_that_is_both_is_one_of_the_newest() -> None:
    chosen = select(turns(9, 8, 7, 6), turns(7, 6), 4, 0.5, one_each)
    assert (numbers(chosen.turns), chosen.tokens, chosen.relevant) == ([6, 7, 8, 9], 4, frozenset())
    chosen = beside(turns(9, 8), turns(8, 2), one_each)
    assert (numbers(chosen.turns), chosen.tokens, chosen.relevant) == ([2, 8, 9], 3, {"m0002"})


def test_turns_of_one_instant_keep_their_order() -> None:
    same = [Turn(f"m{n}", "s", "u", "user", None, "x", 5.0) for n in (2, 7, 1)]
    chosen = beside(same, [], one_each)
    assert [turn.interaction_id for turn in chosen.turns] == ["m1", "m7", "m2"]


@given(st.lists(st.integers(1, 30), max_size=40), st.sets(st.integers(0, 39)), st.integers(0, 200), st.floats(0, 1))
def test_a_budget_is_never_exceeded_and_hardly_wasted(
    costs: list[int], asked: set[int], budget: int, share: float
) -> None:
    def cost(turn: Turn) -> int:
        return costs[int(turn.created_at)]

    every = turns(*reversed(range(len(costs))))
    relevant = [turn for turn in every if int(turn.created_at) in asked]
    chosen = select(every, relevant, budget, share, cost)
    assert chosen.tokens == sum(map(cost, chosen.turns)) <= budget
    assert len({turn.interaction_id for turn in chosen.turns}) == len(chosen.turns)
    assert numbers(chosen.turns) == sorted(numbers(chosen.turns))
    recent = [n for n in numbers(chosen.turns) if f"m{n:04d}" not in chosen.relevant]
    assert recent == list(range(len(costs) - len(recent), len(costs)))
    taken = set(numbers(chosen.turns))
    following = next((n for n in reversed(range(len(costs))) if n not in taken), None)
    assert following is None or chosen.tokens + costs[following] > budget


# -- dumps ------------------------------------------------------------------------------------------------------------

HI = {"role": "user", "content": "Hi."}
HELLO = {"role": "assistant", "content": "Hello!"}
ONE = {"conversation_id": "7", "turns": [HI, HELLO]}
FROM_VALUE = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"}]
PARTS = [{"type": "text", "text": "Hi."}, {"type": "image_url"}]


@pytest.mark.parametrize(
    "value",
    [
        ONE,
        [ONE],
        {"id": "7", "messages": [HI, HELLO]},
        {"conversations": [{"id": 7, "conversations": FROM_VALUE}]},
        {"7": [HI, HELLO]},
        {"7": {"interactions": [HI, HELLO]}},
        {"sessions": {"7": {"history": [HI, HELLO]}}},
        [{"session_id": "7", **HI}, {"session_id": "7", **HELLO}],
        [{"uuid": "7", "turns": [HI, {"role": "assistant", "content": None}, {"role": "tool", "content": ""}, HELLO]}],
        [{"id": "7", "messages": [{"role": "user", "content": PARTS}, HELLO]}],
        [{"id": "7", "turns": [{"author": {"role": "user"}, "text": " Hi. "}, {"sender": "bot", "message": "Hello!"}]}],
    ],
)  # fmt: skip
def test_shapes_of_dumps(value: Any) -> None:
    assert read(json.dumps(value)) == [ONE]
    assert read("\ufeff" + json.dumps(value, indent=2)) == [ONE]


def test_lines_are_conversations_or_turns() -> None:
    two = {"conversation_id": "8", "user_id": "ada", "turns": [HI]}
    assert read("\n".join(map(json.dumps, [ONE, two])) + "\n\n") == [ONE, two]
    spoken = [{"session_id": name, "user_id": "ada", **turn} for turn in (HI, HELLO) for name in ("7", "8")]
    mixed = {"user_id": "ada", "turns": [HI, HELLO]}
    found = read("\n".join(map(json.dumps, spoken)))
    assert found == [{"conversation_id": "7", **mixed}, {"conversation_id": "8", **mixed}]


def test_times_speakers_and_what_else_is_known() -> None:
    dump = {
        "id": "7", "user": "ada", "created_at": "2024-05-01T10:00:00Z", "summary": "Greetings.", "metadata": {"a": 1},
        "turns": [
            {"speaker": "Ada", "text": "Hi.", "timestamp": 1714557600123},
            {"role": "user", "name": "Ben", "text": "Yes.", "time": "2024-05-01T12:00:00+02:00", "metadata": {"b": 2}},
        ],
    }  # fmt: skip
    (found,) = read(json.dumps(dump))
    assert found == {
        "conversation_id": "7", "user_id": "ada", "started_at": 1714557600.0, "summary": "Greetings.",
        "metadata": {"a": 1},
        "turns": [
            {"role": "Ada", "content": "Hi.", "occurred_at": 1714557600.123},
            {"role": "user", "content": "Yes.", "occurred_at": 1714557600.0, "speaker": "Ben", "metadata": {"b": 2}},
        ],
    }  # fmt: skip


def test_a_conversation_without_an_id_is_known_by_its_words() -> None:
    (first,), (second,), (other,) = (read(json.dumps(each)) for each in ([HI, HELLO], {"messages": [HI, HELLO]}, [HI]))
    assert first == second
    assert first["conversation_id"] != other["conversation_id"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no conversation"),
        ("[]", "no conversation"),
        ("{", "not JSON: Expecting property name enclosed in double quotes in line 1, column 2"),
        (json.dumps(ONE) + "\n{broken", "line 2 is not JSON"),
        ("7", "conversation 1 is no conversation"),
        ('[{"id": "7"}]', "item 1 has no turns"),
        ('[{"id": "7", "turns": ["Hi."]}]', "item 1, turn 1 is not a map"),
        ('[{"id": "7", "turns": [{"content": "Hi."}]}]', "item 1, turn 1 does not say who spoke"),
        ('[{"id": "7", "turns": [{"role": "user"}]}]', "item 1, turn 1 has no text"),
        ('[{"id": "7", "turns": [{"role": "user", "content": ""}]}]', "item 1 has no turn with a text"),
        ('[{"id": "7", "turns": [{"role": "u", "content": "x", "time": "noon"}]}]', "turn 1: 'noon' is no time"),
        (json.dumps([ONE, ONE]), "two conversations have the id '7'"),
        (json.dumps([{**HI, "session_id": "7"}, HI]), "item 2: a turn that does not say which conversation it is of"),
        ("[" * 100_000, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_is_no_dump_is_told_with_its_place(text: str, message: str) -> None:
    with pytest.raises(BadDump) as error:
        read(text)
    assert message in str(error.value)


def test_portions_are_of_bounded_size() -> None:
    many = [{"conversation_id": str(n), "turns": [HI] * length} for n, length in enumerate([3, 3, 3, 20, 1])]
    found = [[each["conversation_id"] for each in batch] for batch in portions(many, 6, 10**6)]
    assert found == [["0", "1"], ["2"], ["3"], ["4"]]
    size = len(json.dumps(many[0]).encode())
    assert len(list(portions(many[:3], 100, size * 2))) == 2


# -- imports ----------------------------------------------------------------------------------------------------------

RULES = Rules("dump.json", 1000.0, 60.0, "short", lambda text: 0.25)


def conversation(*at_s: float | None, **fields: Any) -> Conversation:
    said = [Interaction("user", f"turn {n}", occurred_at=each) for n, each in enumerate(at_s)]
    return Conversation("c", said, **fields)


@pytest.mark.parametrize(
    ("given_s", "fields", "expected"),
    [
        ((None, None), {}, [500.0, 500.001, 500.002]),
        ((7.0, 9.0), {}, [7.0, 7.001, 9.0]),
        ((None, 9.0, None), {}, [9.0, 9.001, 9.002, 9.003]),
        ((7.0, 9.0), {"started_at": 1.0}, [1.0, 7.0, 9.0]),
        ((9.0, 7.0), {"started_at": 1.0}, [1.0, 9.0, 9.001]),
    ],
)
def test_times_of_a_conversation_rise(
    given_s: tuple[float | None, ...], fields: dict[str, Any], expected: list[float]
) -> None:
    said = conversation(*given_s, **fields)
    assert times(said, begins(said, 500.0)) == pytest.approx(expected)


@given(st.lists(st.none() | st.floats(0, 1e9), min_size=2, max_size=8), st.integers(1, 7))
def test_what_was_imported_keeps_its_times_when_more_is_said(at_s: list[float | None], kept: int) -> None:
    earlier = conversation(*at_s[:kept])
    before = times(earlier, begins(earlier, 500.0))
    assert times(conversation(*at_s), before[0])[: len(before)] == before


def test_the_lines_of_a_conversation() -> None:
    said = conversation(None, None, user_id="ada", metadata={"topic": "x"}, summary="Short.")
    began_s, *made_s = times(said, 500.0)
    session = session_line(said, "ada", began_s, RULES)
    ids = Ids.of("dump.json", "c")
    assert (session["memory_id"], session["session_id"], session["created_at"]) == (ids.session, ids.session, 500.0)
    assert session["session"] == {"session_type": "conversation", "summary": "Short.", "idle_timeout_s": 60.0}
    lines = list(turn_lines(said, "ada", made_s, RULES))
    assert [line["memory_id"] for line in lines] == [ids.turn(0), ids.turn(1)]
    assert sorted([ids.turn(1), ids.turn(0), ids.session]) == [ids.session, ids.turn(0), ids.turn(1)]
    assert all(len(line["memory_id"]) == len("mem-") + 28 for line in lines)
    first = lines[0]
    assert (first["parent_id"], first["user_id"], first["content"]) == (ids.session, "ada", "turn 0")
    assert (first["importance"], first["importance_at"], first["tier_since"]) == (0.25, 1000.0, 1000.0)
    assert Ids.of("other.json", "c") != ids != Ids.of("dump.json", "d")


def test_batches_of_lines_fit_a_request() -> None:
    assert list(batches([])) == []
    small = [{"n": n} for n in range(2 * MAX_LINES + 1)]
    found = list(batches(small))
    assert [len(each) for each in found] == [MAX_LINES, MAX_LINES, 1]
    assert [line for batch in found for line in batch] == small
    large = [{"content": "x" * (MAX_BYTES // 3)} for _ in range(5)]
    assert [len(each) for each in batches(large)] == [2, 2, 1]
    assert [len(each) for each in batches([{"content": "x" * (2 * MAX_BYTES)}] * 2)] == [1, 1]
