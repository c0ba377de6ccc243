"""The session memory, over the wire: a real agent process before a real memory service."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from agents import token_counts
from memory_system.settings import Settings
from tests.support.agents import Agent, running_agent
from tests.support.process import Orchestrator, running_orchestrator, wait_until
from tests.support.wire import ENCODINGS, Reply, request_id

_users = itertools.count()


@pytest.fixture(scope="module")
def orchestrator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    # Searches count as use only where they weigh something.
    with running_orchestrator(
        tmp_path_factory.mktemp("service"),
        lifecycle__access_weight_search=0.001,
        storage__access_flush_s=0.05,
        search__wait_ms=30_000,  # a search finds what was written before it, however busy the machine is
    ) as orchestrator:
        yield orchestrator


@pytest.fixture(scope="module")
def agent(orchestrator: Orchestrator, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with running_agent(tmp_path_factory.mktemp("agent"), "session_memory", orchestrator.address) as agent:
        yield agent


@pytest.fixture
def user() -> str:
    """One whom no other test has."""
    return f"user-{next(_users)}"


def new_session(agent: Agent, user: str, **fields: Any) -> str:
    session_id: str = agent.succeed("create_session", user_id=user, **fields)["session_id"]
    return session_id


def say(agent: Agent, session_id: str, *texts: str, role: str = "user") -> list[str]:
    turns = [{"role": role, "content": text} for text in texts]
    ids: list[str] = agent.succeed("add_interactions", session_id=session_id, interactions=turns)["interaction_ids"]
    return ids


def texts(reply: Reply) -> list[str]:
    return [turn["content"] for turn in reply["results"]]


# -- sessions ---------------------------------------------------------------------------------------------------------


def test_the_life_of_a_session(agent: Agent, user: str) -> None:
    made = agent.succeed(
        "create_session", {"agent_id": "host"}, user_id=user, session_type="call", metadata={"channel": "voice"}
    )
    session = made["session"]
    assert made["session_id"] == session["session_id"]
    assert (session["user_id"], session["session_type"], session["metadata"]) == (user, "call", {"channel": "voice"})
    assert (session["session_state"], session["created_by"], session["idle_timeout_s"]) == ("open", "host", 1800.0)
    assert agent.succeed("get_session", session_id=made["session_id"])["session"] == session

    ended = agent.succeed("end_session", session_id=made["session_id"], summary="They talked.")
    assert (ended["ended"], ended["session"]["session_state"]) == (True, "ended")
    assert ended["session"]["summary"] == "They talked."
    assert not agent.succeed("end_session", session_id=made["session_id"])["ended"]

    resumed = agent.succeed("resume_session", session_id=made["session_id"])
    assert (resumed["resumed"], resumed["session"]["session_state"]) == (True, "open")
    assert resumed["session"]["summary"] == "They talked."
    assert not agent.succeed("resume_session", session_id=made["session_id"])["resumed"]

    assert agent.succeed("delete_session", session_id=made["session_id"])["deleted"] == 1
    for action in ("get_session", "end_session", "resume_session", "delete_session", "get_context"):
        reply = agent.refused(action, session_id=made["session_id"])
        assert (reply["error_code"], reply["details"]["session_id"]) == ("session_not_found", made["session_id"])


def test_sessions_are_listed_newest_first_page_by_page(agent: Agent, user: str) -> None:
    made = [new_session(agent, user) for _ in range(3)]
    agent.succeed("end_session", session_id=made[1])
    for fields, expected in (
        ({}, [made[2], made[1], made[0]]),
        ({"session_state": "open"}, [made[2], made[0]]),
        ({"session_state": "ended"}, [made[1]]),
    ):
        found, cursor = [], {}
        while True:
            page = agent.succeed("list_sessions", user_id=user, limit=1, **fields, **cursor)
            found += [each["session_id"] for each in page["results"]]
            if "next_cursor" not in page:
                break
            cursor = {"cursor": page["next_cursor"]}
        assert found == expected


def test_a_session_that_is_left_alone_ends_by_itself(agent: Agent, user: str) -> None:
    idle, busy, endless = (new_session(agent, user, idle_timeout_s=each) for each in (0.3, 600, 0))
    (first,) = say(agent, idle, "Is anybody there?")
    wait_until(lambda: state(agent, idle) == "ended", "the session ends by itself")
    session = agent.succeed("get_session", session_id=idle)["session"]
    assert session["ended_at"] == session["last_active_at"] + 0.3
    found = agent.succeed("list_sessions", user_id=user, session_state="ended")["results"]
    assert [each["session_id"] for each in found] == [idle]
    assert {state(agent, each) for each in (busy, endless)} == {"open"}
    assert agent.succeed("get_session", session_id=endless)["session"]["idle_timeout_s"] is None

    reply = agent.refused("add_interaction", session_id=idle, role="user", content="Hello?")
    assert (reply["error_code"], reply["retryable"]) == ("session_ended", False)
    assert reply["details"] == {"session_id": idle, "ended_at": session["ended_at"]}
    agent.succeed("resume_session", session_id=idle)
    (second,) = say(agent, idle, "Here I am.")
    context = agent.succeed("get_context", session_id=idle)
    assert [turn["interaction_id"] for turn in context["results"]] == [first, second]


def state(agent: Agent, session_id: str) -> str:
    found: str = agent.succeed("get_session", session_id=session_id)["session"]["session_state"]
    return found


# -- what is said and was said ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("flat", [False, True], ids=["data", "flat"])
@pytest.mark.parametrize("legacy", [False, True], ids=["v1", "legacy"])
def test_every_form_of_a_request(agent: Agent, user: str, encoding: str, flat: bool, legacy: bool) -> None:
    session_id = new_session(agent, user)
    said = {"role": "user", "content": "I live in Turin.", "metadata": {"mood": "good"}}
    request: dict[str, Any] = {"action": "add_interaction"}
    request |= {"session_id": session_id, **said} if flat else {"data": {"session_id": session_id, **said}}
    if not legacy:
        request |= {"v": 1, "request_id": request_id()}
    reply = agent.ask_raw(request, encoding)
    assert reply["status"] == "success", reply
    (turn,) = agent.succeed("get_context", session_id=session_id)["results"]
    assert turn == {
        "interaction_id": reply["interaction_id"], "session_id": session_id, "role": "user", "speaker": None,
        "content": "I live in Turin.", "said_at": turn["said_at"], "importance": turn["importance"],
        "metadata": {"mood": "good"}, "relevant": False,
    }  # fmt: skip
    assert turn["said_at"] == pytest.approx(time.time(), abs=30)


def test_speakers_times_and_importance_are_kept(agent: Agent, orchestrator: Orchestrator, user: str) -> None:
    session_id = new_session(agent, user)
    turns = [
        {"role": "Caroline", "content": "I adopted a dog.", "occurred_at": 1_700_000_000.0},
        {"role": "user", "speaker": "Mel", "content": "Caroline: that is her name?", "importance": 0.9},
    ]
    ids = agent.succeed("add_interactions", session_id=session_id, interactions=turns)["interaction_ids"]
    first, second = agent.succeed("get_context", session_id=session_id)["results"]
    assert (first["speaker"], first["content"], first["said_at"]) == ("Caroline", "I adopted a dog.", 1_700_000_000.0)
    assert (second["role"], second["speaker"]) == ("user", "Mel")
    assert second["content"] == "Caroline: that is her name?"
    assert second["importance"] == pytest.approx(0.9, abs=0.01)
    stored = orchestrator.ask("batch_get_memories", memory_ids=ids, touch=False)["results"]
    assert [each["content"] for each in stored] == ["Caroline: I adopted a dog.", "Mel: Caroline: that is her name?"]
    assert {(each["parent_id"], each["user_id"], each["memory_type"]) for each in stored} == {
        (session_id, user, "interaction")
    }


def test_a_batch_is_kept_whole_or_not_at_all(agent: Agent, user: str) -> None:
    session_id = new_session(agent, user)
    good = {"role": "user", "content": "fine"}
    for field, turn in (
        ("interactions[1].role", {"content": "x"}),
        ("interactions[1].content", {"role": "user", "content": ""}),
        ("interactions[1].content", {"role": "user", "content": "\t "}),
        ("interactions[1].contnt", {"role": "user", "content": "x", "contnt": "x"}),
        ("interactions[1].importance", {"role": "user", "content": "x", "importance": 2}),
        ("interactions[1].content", {"role": "user", "content": "ж" * 40_000}),
        ("interactions[1].metadata", {"role": "user", "content": "x", "metadata": {"a": "x" * 40_000}}),
        ("interactions[1].occurred_at", {"role": "user", "content": "x", "occurred_at": 1e300}),
    ):
        reply = agent.refused("add_interactions", session_id=session_id, interactions=[good, turn])
        assert reply["error_code"] == "invalid_field"
        assert reply["details"]["field"].startswith(field), reply
        assert field.rpartition(".")[2] in reply["message"]
        assert "memories" not in reply["message"]
    reply = agent.refused("add_interaction", session_id=session_id, role="user", content="ж" * 40_000)
    assert reply["details"] == {"field": "content"}
    assert agent.succeed("get_context", session_id=session_id)["count"] == 0


def test_the_newest_turns_in_their_order_and_the_way_to_older_ones(agent: Agent, user: str) -> None:
    session_id = new_session(agent, user)
    said = [f"turn {number}" for number in range(250)]
    say(agent, session_id, *said[:120])
    say(agent, session_id, *said[120:])
    context = agent.succeed("get_context", session_id=session_id)
    assert (texts(context), context["count"], context["more"]) == (said[-20:], 20, True)
    assert context["session"]["session_id"] == session_id
    found: list[str] = []
    page = agent.succeed("get_context", session_id=session_id, limit=110)
    while True:
        assert page["more"] == ("next_cursor" in page)
        found = texts(page) + found
        if "next_cursor" not in page:
            break
        page = agent.succeed("get_context", session_id=session_id, limit=110, cursor=page["next_cursor"])
    assert found == said
    assert texts(agent.succeed("get_context", session_id=session_id, limit=1000)) == said


def test_a_token_budget_is_filled_with_whole_turns(agent: Agent, user: str) -> None:
    session_id = new_session(agent, user)
    said = [f"This is turn {number}. " + "It goes on for a while. " * (number % 4) for number in range(150)]
    say(agent, session_id, *said)
    tokens = token_counts.load(Settings())
    costs = [tokens.count(f"user: {text}") for text in said]
    for budget in (1, costs[-1] - 1, costs[-1], 100, 1000, 1001, sum(costs) - 1, sum(costs), 1_000_000):
        context = agent.succeed("get_context", session_id=session_id, token_budget=budget)
        count = context["count"]
        assert texts(context) == said[150 - count :]
        assert context["tokens"] == sum(costs[150 - count :]) <= budget
        assert count == 150 or context["tokens"] + costs[149 - count] > budget
        assert context["more"] == (count < 150)
        assert "next_cursor" not in context
    both = agent.succeed("get_context", session_id=session_id, token_budget=1000, limit=3)
    assert (texts(both), both["more"]) == (said[-3:], True)


def test_older_turns_about_a_question(agent: Agent, user: str) -> None:
    session_id = new_session(agent, user)
    said = ["My passport number is 1234 marimba.", *(f"The weather on day {day} was fine." for day in range(60))]
    say(agent, session_id, *said)
    plain = agent.succeed("get_context", session_id=session_id, token_budget=200)
    assert said[0] not in texts(plain)
    asked = {"session_id": session_id, "query": "passport marimba", "relevant_limit": 1}
    context = agent.succeed("get_context", **asked, token_budget=200)
    assert texts(context)[0] == said[0]
    assert [turn["relevant"] for turn in context["results"]] == [True] + [False] * (context["count"] - 1)
    assert texts(context)[1:] == said[-(context["count"] - 1) :]
    assert plain["tokens"] * 0.6 < context["tokens"] <= 200
    context = agent.succeed("get_context", **asked, limit=2)
    assert texts(context) == [said[0], *said[-2:]]
    # What is among the newest anyway is not there twice.
    context = agent.succeed("get_context", **asked, limit=100)
    assert texts(context) == said
    assert not any(turn["relevant"] for turn in context["results"])


def test_only_what_was_said_is_in_a_context(agent: Agent, orchestrator: Orchestrator, user: str) -> None:
    session_id = new_session(agent, user)
    (said,) = say(agent, session_id, "I play the kulintang.")
    orchestrator.ask("add_memory", content="A note about the kulintang.", parent_id=session_id)
    context = agent.succeed("get_context", session_id=session_id, query="kulintang")
    assert [turn["interaction_id"] for turn in context["results"]] == [said]
    found = agent.succeed("search_interactions", query="kulintang", session_id=session_id)
    assert [turn["interaction_id"] for turn in found["results"]] == [said]


def test_what_faded_is_still_in_its_session(agent: Agent, orchestrator: Orchestrator, user: str) -> None:
    session_id = new_session(agent, user)
    old, new = say(agent, session_id, "An old gamelan story.", "A new gamelan story.")
    orchestrator.ask("update_memory", memory_id=old, update_payload={"state": "archived"})
    context = agent.succeed("get_context", session_id=session_id)
    assert [turn["interaction_id"] for turn in context["results"]] == [old, new]
    for archived, expected in ((False, {new}), (True, {old, new})):
        found = agent.succeed("search_interactions", query="gamelan", session_id=session_id, include_archived=archived)
        assert {turn["interaction_id"] for turn in found["results"]} == expected


def test_searching_one_session_or_all_of_a_user(agent: Agent, user: str) -> None:
    first, second = new_session(agent, user), new_session(agent, user)
    stranger = new_session(agent, f"{user}-other")
    for session_id, text in ((first, "My cat is Miso."), (second, "The cat sleeps."), (stranger, "No cat here.")):
        say(agent, session_id, text)

    def found(**fields: Any) -> set[str]:
        return set(texts(agent.succeed("search_interactions", query="cat", **fields)))

    assert found(session_id=first) == {"My cat is Miso."}
    assert found(user_id=user) == {"My cat is Miso.", "The cat sleeps."}
    assert found(user_id=user, session_id=second) == {"The cat sleeps."}
    assert found(user_id=user, session_id=stranger) == set()
    reply = agent.succeed("search_interactions", query="Miso cat", user_id=user, limit=1, mode="keyword")
    (best,) = reply["results"]
    assert (best["content"], best["session_id"], best["keyword"]) == ("My cat is Miso.", first, 1.0)
    page = agent.succeed(
        "search_interactions", query="Miso cat", user_id=user, limit=1, mode="keyword", cursor=reply["next_cursor"]
    )
    assert texts(page) == ["The cat sleeps."]
    assert agent.refused("search_interactions", query="cat")["details"]["field"] == "session_id"
    reply = agent.refused("search_interactions", query="cat", session_id="mem-none")
    assert reply["error_code"] == "session_not_found"


def test_bad_fields_are_named(agent: Agent, user: str) -> None:
    session_id = new_session(agent, user)
    for action, field, data in (
        ("create_session", "user_id", {}),
        ("create_session", "idle_timeout_s", {"user_id": user, "idle_timeout_s": -1}),
        ("add_interaction", "session_id", {"role": "user", "content": "x"}),
        ("add_interaction", "role", {"session_id": session_id, "content": "x"}),
        ("get_context", "limit", {"session_id": session_id, "limit": 0}),
        ("get_context", "token_budget", {"session_id": session_id, "token_budget": "many"}),
        ("get_context", "cursor", {"session_id": session_id, "token_budget": 10, "cursor": "x"}),
        ("list_sessions", "session_state", {"session_state": "closed"}),
        ("import_sessions", "conversations", {"conversations": []}),
        ("add_interaction", "content", {"session_id": session_id, "role": "user", "content": " \n"}),
        ("add_interaction", "role", {"session_id": session_id, "role": " ", "content": "x"}),
        ("add_interaction", "speaker", {"session_id": session_id, "role": "user", "speaker": " ", "content": "x"}),
        ("create_session", "metadata", {"user_id": user, "metadata": {"a": "x" * 40_000}}),
    ):
        reply = agent.refused(action, **data)
        assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", field), reply
        assert reply["message"].startswith(field)
    assert agent.refused("get_context", session_id=session_id, limit=5, cursor="?")["error_code"] == "invalid_cursor"


# -- who asks, and how often ------------------------------------------------------------------------------------------


def test_namespaces_are_kept_apart(agent: Agent, user: str) -> None:
    other = {"namespace": f"{user}-space"}
    session_id: str = agent.succeed("create_session", other, user_id=user)["session_id"]
    agent.succeed("add_interaction", other, session_id=session_id, role="user", content="A secret ocarina.")
    assert agent.succeed("get_context", other, session_id=session_id)["count"] == 1
    for action, data in (
        ("get_session", {}), ("get_context", {}), ("end_session", {}), ("delete_session", {}),
        ("add_interaction", {"role": "user", "content": "x"}),
    ):  # fmt: skip
        assert agent.refused(action, session_id=session_id, **data)["error_code"] == "session_not_found"
    assert agent.succeed("search_interactions", query="ocarina", user_id=user)["count"] == 0
    assert agent.succeed("list_sessions", user_id=user)["count"] == 0


def test_a_retried_request_has_its_effect_once(agent: Agent, user: str) -> None:
    again = {"request_id": request_id()}
    made = agent.succeed("create_session", again, user_id=user)
    assert agent.succeed("create_session", again, user_id=user)["session_id"] == made["session_id"]
    assert agent.succeed("list_sessions", user_id=user)["count"] == 1

    session_id = made["session_id"]
    again = {"request_id": request_id()}
    said = {"session_id": session_id, "role": "user", "content": "Once."}
    first = agent.succeed("add_interaction", again, **said)
    second = agent.succeed("add_interaction", again, **said)
    agent.succeed("end_session", session_id=session_id)
    third = agent.succeed("add_interaction", again, **said)
    assert first["interaction_id"] == second["interaction_id"] == third["interaction_id"]
    assert (second["replayed"], third["replayed"]) == (True, True)
    assert agent.succeed("get_context", session_id=session_id)["count"] == 1
    assert agent.refused("add_interaction", **said)["error_code"] == "session_ended"

    again = {"request_id": request_id()}
    assert agent.succeed("delete_session", again, session_id=session_id)["deleted"] == 2
    assert agent.succeed("delete_session", again, session_id=session_id)["deleted"] == 2


def test_without_a_request_id_a_repetition_is_a_new_request(agent: Agent, user: str) -> None:
    session_id = new_session(agent, user)
    request = {"action": "add_interaction", "session_id": session_id, "role": "user", "content": "Twice."}
    first, second = (agent.ask_raw(request)["interaction_id"] for _ in range(2))
    assert first != second
    assert texts(agent.succeed("get_context", session_id=session_id)) == ["Twice.", "Twice."]


def test_what_an_agent_reads_for_itself_leaves_no_trace(agent: Agent, orchestrator: Orchestrator, user: str) -> None:
    session_id = new_session(agent, user)
    (said,) = say(agent, session_id, "The theremin is mine.")
    agent.succeed("get_context", session_id=session_id, query="theremin")
    agent.succeed("search_interactions", query="theremin", session_id=session_id, touch=False)

    def accesses() -> int:
        return int(orchestrator.ask("get_memory", memory_id=said, touch=False)["memory"]["access_count"])

    assert accesses() == 0
    assert agent.succeed("search_interactions", query="theremin", session_id=session_id)["count"] == 1
    wait_until(lambda: accesses() == 1, "the search that the caller asked for is counted")


def test_fifty_callers_at_once(agent: Agent, user: str) -> None:
    """Each has a session of its own and one that all share; nobody loses a word, and each keeps their order."""
    shared = new_session(agent, user)

    def talk(number: int) -> list[str]:
        own = new_session(agent, user)
        said = [f"caller {number} turn {turn}" for turn in range(4)]
        for text in said:
            agent.succeed("add_interaction", session_id=own, role="user", content=text)
            agent.succeed("add_interaction", session_id=shared, role="user", content=text)
        assert texts(agent.succeed("get_context", session_id=own)) == said
        return said

    with ThreadPoolExecutor(50) as pool:
        said = list(pool.map(talk, range(50)))
    together = texts(agent.succeed("get_context", session_id=shared, limit=1000))
    assert len(together) == 200
    for each in said:
        assert [text for text in together if text in set(each)] == each


# -- conversations of other systems -----------------------------------------------------------------------------------

TRIP = {
    "conversation_id": "trip",
    "started_at": 1_600_000_000.0,
    "summary": "About a trip.",
    "metadata": {"topic": "travel"},
    "turns": [
        {"role": "user", "content": "I take the ferry to Cebu.", "occurred_at": 1_600_000_000.0},
        {"role": "assistant", "content": "Shall I book it?"},
        {"role": "user", "content": "Yes, for two.", "occurred_at": 1_600_000_100.0, "metadata": {"n": 3}},
    ],
}
CHAT = {"conversation_id": "chat", "turns": [{"role": "Ana", "content": "Hi."}, {"role": "Ben", "content": "Hello!"}]}


def imported(added: int, unchanged: int, conflicts: int = 0) -> dict[str, int]:
    return {"added": added, "unchanged": unchanged, "conflicts": conflicts}


def test_an_import_and_its_repetition(agent: Agent, user: str) -> None:
    asked = {"conversations": [TRIP, CHAT], "source": user, "user_id": user}
    dry = agent.succeed("import_sessions", **asked, dry_run=True)
    assert (dry["sessions"], dry["interactions"]) == ({"added": 2, "unchanged": 0}, imported(5, 0))
    assert agent.succeed("list_sessions", user_id=user)["count"] == 0

    done = agent.succeed("import_sessions", **asked)
    assert (done["conversations"], done["sessions"]) == (2, {"added": 2, "unchanged": 0})
    assert (done["interactions"], done["count"]) == (imported(5, 0), 0)
    sessions = {each["metadata"]["imported"]["conversation_id"]: each for each in listed(agent, user)}
    trip = sessions["trip"]
    assert (trip["created_at"], trip["session_state"], trip["summary"]) == (1_600_000_000.0, "ended", "About a trip.")
    assert trip["metadata"] == {"topic": "travel", "imported": {"source": user, "conversation_id": "trip"}}
    assert trip["ended_at"] == 1_600_000_100.0 + 1800.0
    context = agent.succeed("get_context", session_id=trip["session_id"])
    assert texts(context) == [turn["content"] for turn in TRIP["turns"]]  # type: ignore[index]
    assert context["results"][2]["metadata"] == {"n": 3}
    assert context["results"][2]["said_at"] == 1_600_000_100.0
    assert context["results"][2]["importance"] > 0.15, "what is old begins to fade only now"
    speakers = agent.succeed("get_context", session_id=sessions["chat"]["session_id"])["results"]
    assert [turn["speaker"] for turn in speakers] == ["Ana", "Ben"]

    before = everything(agent, user)
    again = agent.succeed("import_sessions", **asked)
    assert (again["sessions"], again["interactions"]) == ({"added": 0, "unchanged": 2}, imported(0, 5))
    assert everything(agent, user) == before


def listed(agent: Agent, user: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = agent.succeed("list_sessions", user_id=user)["results"]
    return found


def everything(agent: Agent, user: str) -> list[tuple[str, list[str]]]:
    ids = [each["session_id"] for each in listed(agent, user)]
    return [(each, texts(agent.succeed("get_context", session_id=each, limit=1000))) for each in ids]


def test_a_conversation_that_has_grown_gets_what_is_new(agent: Agent, user: str) -> None:
    for conversation in (TRIP, CHAT):
        asked = {"source": user, "user_id": user}
        agent.succeed("import_sessions", conversations=[conversation], **asked)
        (session,) = (each for each in listed(agent, user) if name_of(each) == conversation["conversation_id"])
        agent.succeed("resume_session", session_id=session["session_id"])
        more = [*conversation["turns"], {"role": "user", "content": "One thing more."}]  # type: ignore[misc]
        grown = agent.succeed("import_sessions", conversations=[{**conversation, "turns": more}], **asked)
        assert grown["interactions"] == imported(1, len(more) - 1)
        context = agent.succeed("get_context", session_id=session["session_id"])
        assert texts(context) == [turn["content"] for turn in more]
        assert context["session"]["session_state"] == "open", "an import does not end what was resumed"


def name_of(session: dict[str, Any]) -> str:
    name: str = session["metadata"]["imported"]["conversation_id"]
    return name


def test_what_is_there_with_other_words_is_told_and_left(agent: Agent, user: str) -> None:
    asked = {"source": user, "user_id": user}
    agent.succeed("import_sessions", conversations=[TRIP], **asked)
    before = everything(agent, user)
    turns = [*TRIP["turns"][:1], {"role": "assistant", "content": "Another answer."}, *TRIP["turns"][2:]]  # type: ignore[index]
    reply = agent.succeed("import_sessions", conversations=[{**TRIP, "turns": turns}], **asked)
    assert reply["interactions"] == imported(0, 2, 1)
    assert reply["results"] == [{"conversation_id": "trip", "turn": 1, "fields": ["content"]}]
    assert everything(agent, user) == before


def test_an_import_of_more_than_one_request_to_the_service(agent: Agent, user: str) -> None:
    turns = [{"role": "user", "content": f"turn {number}"} for number in range(2345)]
    asked = {"conversations": [{"conversation_id": "long", "turns": turns}, CHAT], "source": user, "user_id": user}
    assert agent.succeed("import_sessions", **asked)["interactions"] == imported(2347, 0)
    assert agent.succeed("import_sessions", **asked)["interactions"] == imported(0, 2347)
    session_id = next(each["session_id"] for each in listed(agent, user) if name_of(each) == "long")
    newest = agent.succeed("get_context", session_id=session_id, limit=1000)
    assert texts(newest) == [f"turn {number}" for number in range(1345, 2345)]


def test_bad_conversations_are_named(agent: Agent, user: str) -> None:
    good = {"role": "user", "content": "x"}
    for field, conversations in (
        ("conversations[1].turns", [CHAT, {"conversation_id": "b", "turns": []}]),
        ("conversations[1].turns[1].role", [CHAT, {"conversation_id": "b", "turns": [good, {"content": "x"}]}]),
        ("conversations[1].conversation_id", [CHAT, CHAT]),
        ("conversations[1].turns[0].content", [CHAT, {"conversation_id": "b", "turns": [{**good, "content": " "}]}]),
        (
            "conversations[1].turns[1].metadata",
            [CHAT, {"conversation_id": "b", "turns": [good, {**good, "metadata": {"a": "x" * 40_000}}]}],
        ),
        (
            "conversations[1].turns[0].content",
            [CHAT, {"conversation_id": "b", "turns": [{**good, "content": "ж" * 40_000}]}],
        ),
    ):
        reply = agent.refused("import_sessions", conversations=conversations, user_id=user, source=user)
        assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", field), reply
        assert field.rpartition(".")[2].rpartition("]")[2] in reply["message"]
    reply = agent.refused("import_sessions", conversations=[CHAT])
    assert reply["details"]["field"] == "conversations[0].user_id"
    assert listed(agent, user) == []
