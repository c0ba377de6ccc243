"""The knowledge base's actions, asked over the wire: a real agent and a real orchestrator with the stub's vectors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from agents.agent_memory import AgentMemory, handling
from agents.facts import Draft
from agents.facts_text import text_key
from memory_system.envelope import Request
from memory_system.protocol import encode_request
from memory_system.settings import Settings
from tests.support.agents import Agent, running_agent
from tests.support.process import Orchestrator, running_orchestrator, wait_until
from tests.support.wire import ENCODINGS, Reply, decode_reply, envelope, request_id

_names = itertools.count(1)


@pytest.fixture(scope="module")
def orchestrator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    # Searches count as use only where they weigh something.
    with running_orchestrator(
        tmp_path_factory.mktemp("orchestrator"),
        lifecycle__access_weight_search=0.001,
        storage__access_flush_s=0.05,
        search__wait_ms=30_000,  # a search finds what was written before it, however busy the machine is
    ) as running:
        yield running


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory, orchestrator: Orchestrator) -> Iterator[Agent]:
    with running_agent(tmp_path_factory.mktemp("agent"), "knowledge_base", orchestrator.address) as running:
        yield running


class Base:
    """The knowledge base of one namespace."""

    def __init__(self, agent: Agent, orchestrator: Orchestrator) -> None:
        self.agent = agent
        self.orchestrator = orchestrator
        self.around = {"namespace": f"space-{next(_names)}"}

    def ok(self, action: str, **data: Any) -> Reply:
        return self.agent.succeed(action, self.around, **data)

    def fails(self, code: str, action: str, **data: Any) -> Reply:
        reply = self.agent.refused(action, self.around, **data)
        assert reply["error_code"] == code, reply
        return reply

    def add(self, content: str, topic: str = "Office", **data: Any) -> str:
        reply = self.ok("add_fact", topic=topic, content=content, **data)
        assert reply["added"]
        return str(reply["fact_id"])

    def texts(self, action: str, **data: Any) -> list[str]:
        return [fact["content"] for fact in self.ok(action, **data)["results"]]

    def record(self, fact_id: str) -> Reply:
        found: Reply = self.orchestrator.ask("get_memory", self.around, memory_id=fact_id, touch=False)["memory"]
        return found


def at_once(base: Base, *asked: tuple[str, dict[str, Any]]) -> list[Reply]:
    """The replies to requests that are sent in this order, without waiting for one another."""
    with base.agent.peer(dealer=True) as peer:
        for action, data in asked:
            peer.send(encode_request(envelope(action, data, **base.around)))
        return [decode_reply(peer.receive(), "msgpack") for _ in asked]


@pytest.fixture
def base(agent: Agent, orchestrator: Orchestrator) -> Base:
    return Base(agent, orchestrator)


# -- adding -----------------------------------------------------------------------------------------------------


def test_a_fact_is_a_memory_of_the_long_tier(base: Base) -> None:
    around = {**base.around, "agent_id": "planner"}
    told = {"confidence": 0.5, "source": "Ana", "tags": ["wifi"]}
    reply = base.agent.succeed("add_fact", around, topic="The  Office", content=" It has wifi. ", **told)
    assert (reply["added"], reply["reinforced"], reply["superseded"]) == (True, False, [])
    record = base.record(reply["fact_id"])
    assert record["memory_type"] == "knowledge_fact"
    assert record["memory_tier"] == "long"
    assert record["content"] == "It has wifi."
    assert record["importance"] == pytest.approx(0.6, abs=0.01)
    assert record["created_by"] == "planner"
    fact = base.ok("get_fact", topic="the office")["fact"]
    assert {name: fact[name] for name in told} == told
    assert (fact["topic"], fact["content"], fact["state"]) == ("The Office", "It has wifi.", "current")


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_flat_form_of_older_callers(base: Base, encoding: str) -> None:
    flat = {"topic": f"flat {encoding}", "content": "It works.", "unheard_of": 1}
    added = base.agent.ask_raw({"action": "add_fact", **flat, **base.around}, encoding)
    assert added["status"] == "success", added
    found = base.agent.ask_raw({"action": "get_fact", "topic": flat["topic"], **base.around}, encoding)
    assert found["fact"]["fact_id"] == added["fact_id"]


def test_a_fact_that_is_there_is_reinforced(base: Base) -> None:
    fact_id = base.add("The office has wifi.")
    before = base.record(fact_id)["importance"]
    reply = base.ok("add_fact", topic="OFFICE", content="the office has WIFI")
    assert (reply["fact_id"], reply["added"], reply["reinforced"]) == (fact_id, False, True)
    assert reply["fact"]["importance"] > before + 0.05
    assert base.texts("get_fact", topic="office") == ["The office has wifi."]


def test_the_same_text_on_another_topic_is_another_fact(base: Base) -> None:
    assert base.add("It has wifi.", "Office") != base.add("It has wifi.", "Hotel")


def test_the_same_claim_in_other_words_is_reinforced(base: Base) -> None:
    fact_id = base.add("Elephants remember waterholes")
    reply = base.ok("add_fact", topic="Office", content="Elephants remembered the waterholes")
    assert (reply["fact_id"], reply["reinforced"]) == (fact_id, True)
    assert reply["similarity"] >= 0.97


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Rooms for 12 guests need signs", "Rooms for 14 guests need signs"),
        ("Ada prefers trains to planes", "Ada prefers planes to trains"),
        ("Ada likes tea", "Ada never likes tea"),
    ],
)
def test_another_claim_in_nearly_the_same_words_is_kept(base: Base, one: str, other: str) -> None:
    base.add(one)
    base.add(other)
    assert set(base.texts("get_fact", topic="Office")) == {one, other}


def test_a_newer_value_supersedes_the_older(base: Base) -> None:
    old = base.add("The rent is 900 euros a month.")
    reply = base.ok("add_fact", topic="office", content="The rent is 950 euros a month.")
    assert (reply["added"], reply["superseded"]) == (True, [old])
    assert base.texts("get_fact", topic="Office") == ["The rent is 950 euros a month."]
    assert base.texts("search_facts", query="rent euros month") == ["The rent is 950 euros a month."]
    older = base.ok("get_fact", fact_id=old, related=True)["fact"]
    assert (older["state"], older["superseded_by"]) == ("superseded", reply["fact_id"])
    assert [(each["relation"], each["direction"]) for each in older["related"]] == [("supersedes", "incoming")]
    with_old = base.texts("search_facts", query="rent euros month", include_superseded=True)
    assert sorted(with_old) == ["The rent is 900 euros a month.", "The rent is 950 euros a month."]
    plain = base.orchestrator.ask("search_memory", base.around, query="rent", touch=False)
    assert [each["content"] for each in plain["results"]] == ["The rent is 950 euros a month."]


def test_what_was_superseded_can_be_said_again(base: Base) -> None:
    base.add("The rent is 900 euros a month.")
    base.add("The rent is 950 euros a month.")
    base.add("The rent is 900 euros a month.")
    assert base.texts("get_fact", topic="Office") == ["The rent is 900 euros a month."]


def test_the_caller_says_what_is_superseded(base: Base) -> None:
    tea, milk = base.add("Ada likes tea."), base.add("Ada takes milk.")
    reply = base.ok("add_fact", topic="Office", content="Ada likes coffee.", supersedes=[tea, milk])
    assert reply["superseded"] == [tea, milk]
    assert base.texts("get_fact", topic="Office") == ["Ada likes coffee."]
    base.add("The rent is 900 euros.")
    assert base.ok("add_fact", topic="Office", content="The rent is 950 euros.", supersedes=[])["superseded"] == []
    reply = base.fails("memory_not_found", "add_fact", topic="Office", content="x", supersedes="mem-none")
    assert reply["details"]["field"] == "supersedes"


def test_a_fact_belongs_to_no_session(base: Base) -> None:
    session = base.orchestrator.ask("create_session", base.around, user_id="ada")["session_id"]
    around = {**base.around, "session_id": session}
    fact_id = base.agent.succeed("add_fact", around, topic="Office", content="It has wifi.")["fact_id"]
    imported = base.agent.succeed("import_facts", around, records=[{"topic": "a", "content": "b"}])["fact_ids"]
    assert base.orchestrator.ask("forget", base.around, session_id=session)["status"] == "success"
    for each in [fact_id, *imported]:
        assert base.ok("get_fact", fact_id=each)["fact"]["fact_id"] == each


# -- retries ----------------------------------------------------------------------------------------------------


def test_a_retried_request_has_its_effect_once(base: Base) -> None:
    fact_id = base.add("The office has wifi.")
    around = {**base.around, "request_id": request_id()}
    first = base.agent.succeed("add_fact", around, topic="Office", content="The office has wifi.")
    again = base.agent.succeed("add_fact", around, topic="Office", content="The office has wifi.")
    assert again["fact"]["importance"] == pytest.approx(first["fact"]["importance"], abs=1e-6)
    assert (again["fact_id"], again["reinforced"]) == (fact_id, True)
    # The control: as a request of its own it reinforces once more.
    other = base.ok("add_fact", topic="Office", content="The office has wifi.")
    assert other["fact"]["importance"] > first["fact"]["importance"] + 0.01


def test_a_retried_add_adds_once_and_does_not_reinforce(base: Base) -> None:
    around = {**base.around, "request_id": request_id()}
    first = base.agent.succeed("add_fact", around, topic="Office", content="It has wifi.")
    again = base.agent.succeed("add_fact", around, topic="Office", content="It has wifi.")
    assert (again["fact_id"], again["added"]) == (first["fact_id"], True)
    assert again["fact"]["importance"] <= first["fact"]["importance"]


def test_a_retry_finishes_what_was_broken_off(base: Base) -> None:
    """The agent ended after the new fact was stored, before the old one was marked."""
    old = base.add("The rent is 900 euros.")
    again = request_id()
    memory = AgentMemory("tcp://127.0.0.1:1", "knowledge_base_agent", Settings().agents)
    with handling(Request("add_fact", {}, again, None, None, base.around["namespace"], None, False, False, b"")):
        key = memory.key("add")
    half = Draft("Office", "The rent is 950 euros.").memory([old])
    around = {**base.around, "request_id": key, "agent_id": "knowledge_base_agent"}
    new = base.orchestrator.ask("add_memory", around, **half)["memory_id"]
    assert base.record(old)["state"] == "active"
    # Until then, answers leave out what another fact says it replaces.
    assert base.texts("get_fact", topic="Office") == ["The rent is 950 euros."]
    assert base.texts("search_facts", query="The rent is euros") == ["The rent is 950 euros."]
    retried = {**base.around, "request_id": again}
    reply = base.agent.succeed("add_fact", retried, topic="Office", content="The rent is 950 euros.")
    assert (reply["fact_id"], reply["added"], reply["superseded"]) == (new, True, [old])
    assert base.record(old)["metadata"]["superseded_by"] == new


@pytest.mark.parametrize(
    ("action", "data"),
    [
        ("update_fact", {"content": "It has no wifi."}),
        ("delete_fact", {}),
        ("relate_facts", {"related_id": "other"}),
    ],
)
def test_other_writes_may_be_retried(base: Base, action: str, data: dict[str, Any]) -> None:
    fact_id, other = base.add("It has wifi."), base.add("It has a roof.")
    data = {name: other if value == "other" else value for name, value in data.items()}
    around = {**base.around, "request_id": request_id()}
    first = base.agent.succeed(action, around, fact_id=fact_id, **data)
    again = base.agent.succeed(action, around, fact_id=fact_id, **data)
    for reply in (first, again):
        reply.pop("fact", None)
    assert again == first


# -- getting ----------------------------------------------------------------------------------------------------


def test_the_exact_topic_goes_before_the_meaning(base: Base) -> None:
    base.add("Blue whales sing.", "whales of the north")
    base.add("Whales of the north are blue and sing songs.", "zoology")
    reply = base.ok("get_fact", topic="Whales of the North")
    assert (reply["match"], reply["fact"]["content"], reply["count"]) == ("topic", "Blue whales sing.", 1)
    reply = base.ok("get_fact", topic="blue whales sing songs in the north")
    assert (reply["match"], reply["fact"]["topic"]) == ("meaning", "zoology")
    assert reply["similarity"] >= 0.5


def test_what_is_not_known_is_not_found(base: Base) -> None:
    base.add("Blue whales sing.", "whales")
    reply = base.fails("memory_not_found", "get_fact", topic="the capital of Mongolia")
    assert reply["details"]["floor"] == 0.5
    assert reply["details"]["nearest"] < 0.5
    assert base.ok("search_facts", query="the capital of Mongolia")["results"] == []
    # The control: without a floor there is an answer, and it is a wrong one.
    reply = base.ok("get_fact", topic="the capital of Mongolia", min_similarity=-1.0)
    assert reply["fact"]["content"] == "Blue whales sing."


def test_a_topic_is_given_page_by_page(base: Base) -> None:
    ids = [base.add(content) for content in ("Owls fly.", "It has wifi.", "Tea is brown.", "Snow melts.", "Bo sings.")]
    found: list[str] = []
    cursor: dict[str, str] = {}
    while True:
        reply = base.ok("get_fact", topic="office", limit=2, **cursor)
        found += [fact["fact_id"] for fact in reply["results"]]
        assert reply["more"] == ("next_cursor" in reply)
        if not reply["more"]:
            break
        cursor = {"cursor": reply["next_cursor"]}
    assert found == ids[::-1]


def test_reading_leaves_no_trace_but_for_what_was_asked_for(base: Base) -> None:
    asked, other = base.add("It has wifi."), base.add("Blue whales sing.", "whales")
    for _ in range(3):
        base.ok("search_facts", query="blue whales")
        base.ok("search_facts", query="sing", topic="whales")
        base.ok("list_topics")
        base.ok("add_fact", topic="whales", content="Whales are large.")
    base.ok("get_fact", topic="office")
    base.ok("get_fact", fact_id=asked)
    wait_until(lambda: base.record(asked)["access_count"] == 2, "the two reads are counted")
    assert base.record(other)["access_count"] == 0


def test_either_topic_or_id(base: Base) -> None:
    for action, field in (("get_fact", "topic"), ("delete_fact", "fact_id")):
        assert base.fails("invalid_field", action)["details"]["field"] == field
        assert base.fails("invalid_field", action, topic="a", fact_id="b")["details"]["field"] == field


def test_a_memory_of_another_kind_is_no_fact(base: Base) -> None:
    other = base.orchestrator.ask("add_memory", base.around, content="a note")["memory_id"]
    fact_id = base.add("It has wifi.")
    for action in ("get_fact", "delete_fact"):
        base.fails("memory_not_found", action, fact_id=other)
    base.fails("memory_not_found", "update_fact", fact_id=other, content="x")
    base.fails("memory_not_found", "relate_facts", fact_id=fact_id, related_id=other)
    assert base.ok("search_facts", query="a note", min_similarity=-1.0)["count"] == 1


def test_facts_that_faded_are_still_known(base: Base) -> None:
    fact_id = base.add("It has wifi.")
    archive = {"memory_id": fact_id, "update_payload": {"state": "archived"}}
    base.orchestrator.ask("update_memory", base.around, **archive)
    assert base.texts("get_fact", topic="office") == ["It has wifi."]
    assert base.texts("search_facts", query="wifi") == ["It has wifi."]
    assert base.ok("add_fact", topic="office", content="It has wifi")["fact_id"] == fact_id
    assert base.record(fact_id)["state"] == "active"


def test_a_fact_of_another_program_has_no_topic(base: Base) -> None:
    added = base.orchestrator.ask("add_memory", base.around, content="Owls fly.", memory_type="knowledge_fact")
    found = base.ok("search_facts", query="owls fly")["results"]
    assert [(fact["fact_id"], fact["topic"]) for fact in found] == [(added["memory_id"], "")]
    assert base.ok("list_topics")["results"] == []


# -- updating, history -------------------------------------------------------------------------------------------


def test_an_update_keeps_the_version_before(base: Base) -> None:
    added = base.ok("add_fact", topic="Office", content="It has wifi.", source="Ana", tags=["a"])["fact"]
    fact_id = added["fact_id"]
    first = base.ok("update_fact", fact_id=fact_id, content="It has fast wifi.", confidence=0.7)["fact"]
    second = base.ok("update_fact", fact_id=fact_id, content="It has no wifi.", source="", tags=[])["fact"]
    assert (second["source"], second["tags"], second["confidence"], second["version"]) == (None, [], 0.7, 3)
    for as_of, content in (
        (added["created_at"], "It has wifi."),
        ((added["updated_at"] + first["updated_at"]) / 2, "It has wifi."),
        ((first["updated_at"] + second["updated_at"]) / 2, "It has fast wifi."),
        (second["updated_at"], "It has no wifi."),
    ):
        assert base.ok("get_fact", fact_id=fact_id, as_of=as_of)["fact"]["content"] == content
        assert base.texts("get_fact", topic="office", as_of=as_of) == [content]
    reply = base.fails("memory_not_found", "get_fact", fact_id=fact_id, as_of=added["created_at"] - 1.0)
    assert reply["details"]["since"] == added["created_at"]
    base.fails("memory_not_found", "get_fact", topic="office", as_of=added["created_at"] - 1.0)


def test_what_was_true_before_it_was_superseded(base: Base) -> None:
    base.add("The rent is 900 euros.")
    new = base.ok("add_fact", topic="office", content="The rent is 950 euros.")["fact"]
    before = new["created_at"] - 1e-4
    assert base.texts("get_fact", topic="office", as_of=before) == ["The rent is 900 euros."]
    assert base.texts("get_fact", topic="office", as_of=new["created_at"]) == ["The rent is 950 euros."]


def test_an_updated_fact_is_found_by_its_new_words_and_topic(base: Base) -> None:
    fact_id = base.add("It has wifi.")
    base.ok("update_fact", fact_id=fact_id, topic="Hotel", content="It has a pool.")
    assert base.ok("get_fact", topic="hotel")["fact"]["fact_id"] == fact_id
    base.fails("memory_not_found", "get_fact", topic="office")
    assert base.ok("add_fact", topic="hotel", content="It has a POOL")["fact_id"] == fact_id
    assert base.ok("add_fact", topic="hotel", content="It has wifi.")["added"]


def test_an_update_of_nothing_or_of_another_version_is_refused(base: Base) -> None:
    fact_id = base.add("It has wifi.")
    assert base.fails("invalid_field", "update_fact", fact_id=fact_id)["details"]["field"] == "content"
    base.fails("version_conflict", "update_fact", fact_id=fact_id, content="x", expected_version=7)
    base.fails("memory_not_found", "update_fact", fact_id="mem-none", content="x")


# -- deleting, relating ------------------------------------------------------------------------------------------


def test_a_deleted_fact_is_gone_with_what_it_superseded(base: Base) -> None:
    ids = [base.add(f"The rent is {rent} euros.") for rent in (900, 950, 990)]
    assert base.ok("delete_fact", fact_id=ids[2])["deleted"] == 3
    for fact_id in ids:
        base.fails("memory_not_found", "get_fact", fact_id=fact_id)
    assert base.ok("search_facts", query="rent", min_similarity=-1.0, include_superseded=True)["count"] == 0


def test_a_topic_is_deleted(base: Base) -> None:
    for each in ("It has wifi.", "The rent is 900 euros.", "The rent is 950 euros."):
        base.add(each)
    kept = base.add("Blue whales sing.", "whales")
    reply = base.ok("delete_fact", topic="OFFICE")
    assert (reply["deleted"], reply["left"]) == (3, 0)
    assert base.ok("delete_fact", topic="OFFICE")["deleted"] == 0
    assert [row["topic"] for row in base.ok("list_topics")["results"]] == ["whales"]
    assert base.ok("get_fact", fact_id=kept)["fact"]["state"] == "current"


def test_a_retried_deletion_of_a_topic_leaves_alone_what_came_since(base: Base) -> None:
    base.add("It has wifi.")
    around = {**base.around, "request_id": request_id()}
    assert base.agent.succeed("delete_fact", around, topic="office")["deleted"] == 1
    base.add("It has a roof.")
    assert base.agent.succeed("delete_fact", around, topic="office")["deleted"] == 0
    assert base.texts("get_fact", topic="office") == ["It has a roof."]
    assert base.ok("delete_fact", topic="office")["deleted"] == 1, "another request is another matter"


def test_relations_between_facts(base: Base) -> None:
    one, other = base.add("Trains run on rails."), base.add("Rails are steel.")
    assert base.ok("relate_facts", fact_id=one, related_id=other, relation="needs", strength=0.7)["created"]
    assert not base.ok("relate_facts", fact_id=one, related_id=other, relation="needs", strength=0.8)["created"]
    related = base.ok("get_fact", fact_id=one, related=True)["fact"]["related"]
    assert [(each["fact_id"], each["relation"], each["strength"]) for each in related] == [(other, "needs", 0.8)]
    for fact_id, related_id, field in ((one, one, "related_id"), (one, "no", "related_id"), ("no", one, "fact_id")):
        reply = base.agent.refused("relate_facts", base.around, fact_id=fact_id, related_id=related_id)
        assert reply["details"]["field"] == field


def test_a_relation_that_supersedes(base: Base) -> None:
    old, new = base.add("Ada likes tea."), base.add("Ada likes coffee.")
    base.ok("relate_facts", fact_id=new, related_id=old, relation="supersedes")
    assert base.texts("get_fact", topic="office") == ["Ada likes coffee."]
    assert base.ok("get_fact", fact_id=new)["fact"]["supersedes"] == [old]
    reply = base.fails("invalid_field", "relate_facts", fact_id=old, related_id=new, relation="supersedes")
    assert reply["details"]["field"] == "fact_id"


# -- topics -----------------------------------------------------------------------------------------------------


def test_topics_are_listed_page_by_page(base: Base) -> None:
    said = {
        "Rail": "It is steel.",
        "air": "Birds fly.",
        "rail ": "Trains run.",
        "Road": "Cars drive.",
        "Åland": "Ferries swim.",
    }
    for topic, content in said.items():
        base.add(content, topic)
    reply = base.ok("list_topics", limit=3)
    assert [(row["topic"], row["facts"]) for row in reply["results"]] == [("air", 1), ("rail", 2), ("Road", 1)]
    assert reply["total"] == 4
    rest = base.ok("list_topics", limit=3, cursor=reply["next_cursor"])
    assert [row["topic"] for row in rest["results"]] == ["Åland"]
    assert "next_cursor" not in rest
    assert [row["topic"] for row in base.ok("list_topics", prefix="R")["results"]] == ["rail", "Road"]


def test_topics_follow_every_change(base: Base) -> None:
    def topics() -> list[tuple[str, int]]:
        return [(row["topic"], row["facts"]) for row in base.ok("list_topics")["results"]]

    assert topics() == []
    fact_id = base.add("It has wifi.")
    assert topics() == [("Office", 1)]
    base.ok("update_fact", fact_id=fact_id, topic="Hotel")
    assert topics() == [("Hotel", 1)]
    base.orchestrator.ask("delete_memory", base.around, memory_id=fact_id)
    assert topics() == []


def test_merged_topics_go_by_both_names(base: Base) -> None:
    old = base.add("The rent is 900 euros.", "Bureau")
    for content in ("The rent is 950 euros.", "It has wifi."):
        base.add(content, "Bureau")
    kept = base.add("It HAS wifi", "Office")
    before = base.record(old)["updated_at"]
    reply = base.ok("merge_topics", source="bureau", target="Office")
    assert (reply["moved"], reply["duplicates"], reply["facts"]) == (3, 1, 2)
    later = base.add("Owls fly.", "BUREAU")
    assert base.record(later)["metadata"]["topic"] == "Office"
    base.ok("delete_fact", fact_id=later)
    for name in ("bureau", "office"):
        assert sorted(base.texts("get_fact", topic=name)) == ["It HAS wifi", "The rent is 950 euros."]
    assert [row["topic"] for row in base.ok("list_topics")["results"]] == ["Office"]
    assert "The rent is 900 euros." not in base.texts("get_fact", topic="Office", as_of=before)
    assert base.ok("add_fact", topic="office", content="It has wifi.")["fact_id"] == kept
    again = base.ok("merge_topics", source="bureau", target="Office")
    assert (again["moved"], again["facts"]) == (0, 2)
    base.fails("memory_not_found", "merge_topics", source="nowhere", target="Office")


def test_what_is_said_on_a_topic_while_it_is_merged_goes_with_it(base: Base) -> None:
    """These wait for the merge, and were sent when the topic still had its old name."""
    first = base.add("It has wifi.", "Bureau")
    base.add("It has a roof.", "Office")
    replies = at_once(
        base,
        ("merge_topics", {"source": "Bureau", "target": "Office"}),
        ("update_fact", {"fact_id": first, "content": "It has fast wifi."}),
        *[("add_fact", {"topic": "bureau", "content": f"Word{number} is said."}) for number in range(5)],
    )
    assert [reply["status"] for reply in replies] == ["success"] * 7, replies
    assert [(row["topic"], row["facts"]) for row in base.ok("list_topics")["results"]] == [("Office", 7)]
    # Found by its new text under its new topic: the keys in its metadata fit both.
    assert base.ok("add_fact", topic="Office", content="it has FAST wifi")["fact_id"] == first


def test_updates_at_once_leave_keys_that_fit(base: Base) -> None:
    fact_id = base.add("It has wifi.")
    replies = at_once(
        base,
        ("update_fact", {"fact_id": fact_id, "content": "It has a pool."}),
        ("update_fact", {"fact_id": fact_id, "topic": "Hotel"}),
    )
    assert [reply["status"] for reply in replies] == ["success"] * 2, replies
    kept = base.record(fact_id)
    assert (kept["content"], kept["metadata"]["topic"]) == ("It has a pool.", "Hotel")
    assert kept["metadata"]["text_key"] == text_key("Hotel", "It has a pool.")


def test_a_topic_is_renamed(base: Base) -> None:
    base.add("It has wifi.", "office")
    assert base.ok("merge_topics", source="office", target="OFFICE")["moved"] == 1
    assert [row["topic"] for row in base.ok("list_topics")["results"]] == ["OFFICE"]
    base.ok("merge_topics", source="OFFICE", target="Hotel")
    base.ok("merge_topics", source="Hotel", target="Inn")
    assert [base.ok("get_fact", topic=name)["fact"]["topic"] for name in ("office", "hotel", "inn")] == ["Inn"] * 3


# -- import, bad input, namespaces -------------------------------------------------------------------------------


def test_an_import_may_be_repeated(base: Base) -> None:
    rows = [
        {"category": "Rail", "fact": "Trains run on rails.", "certainty": "0.9", "keywords": "a,b", "created": 1.5e9},
        {"category": "Rail", "fact": "trains run on RAILS", "certainty": None, "keywords": "", "created": None},
        {"category": "", "fact": "Ships swim."},
    ]
    reply = base.ok("import_facts", records=rows, topic="Misc", source="old.db")
    assert (reply["added"], reply["unchanged"], len(reply["fact_ids"])) == (2, 1, 2)
    fact = base.ok("get_fact", topic="rail")["fact"]
    assert (fact["confidence"], fact["tags"], fact["said_at"], fact["source"]) == (0.9, ["a", "b"], 1.5e9, "old.db")
    importance = fact["importance"]
    base.ok("update_fact", fact_id=fact["fact_id"], content="Trains run on steel rails.")
    again = base.ok("import_facts", records=rows, topic="Misc", source="old.db")
    assert (again["added"], again["unchanged"]) == (0, 3)
    assert base.texts("get_fact", topic="rail") == ["Trains run on steel rails."]
    assert base.record(fact["fact_id"])["importance"] <= importance + 0.02
    # It was known before it came here.
    assert base.texts("get_fact", topic="rail", as_of=1.6e9) == ["Trains run on rails."]


def test_a_retried_import_tells_the_same(base: Base) -> None:
    around = {**base.around, "request_id": request_id()}
    rows = [{"topic": "a", "content": "one"}, {"topic": "a", "content": "two"}]
    first = base.agent.succeed("import_facts", around, records=rows)
    assert base.agent.succeed("import_facts", around, records=rows) == first


def test_an_import_follows_merged_topics(base: Base) -> None:
    rows = [{"topic": f"Old {each % 3}", "content": f"Word{each} is said."} for each in range(300)]
    assert base.ok("import_facts", records=rows)["added"] == 300
    for each in range(3):
        base.ok("merge_topics", source=f"old {each}", target="New")
    changed = base.ok("get_fact", topic="new", limit=1)["fact"]["fact_id"]
    base.ok("update_fact", fact_id=changed, content="Something else is said.")
    assert base.ok("import_facts", records=rows)["added"] == 0
    base.ok("import_facts", records=[{"topic": "old 1", "content": "This is new."}])
    assert [(row["topic"], row["facts"]) for row in base.ok("list_topics")["results"]] == [("New", 301)]


def test_columns_may_be_given(base: Base) -> None:
    rows = [{"what": "Trains run.", "about": "Rail", "content": "no"}]
    base.ok("import_facts", records=rows, columns={"content": "what", "topic": "about"})
    assert base.texts("get_fact", topic="rail") == ["Trains run."]


def test_one_bad_record_refuses_the_import(base: Base) -> None:
    rows = [{"topic": "a", "content": "one"}, {"topic": "a", "content": "two", "confidence": 7}]
    reply = base.fails("invalid_field", "import_facts", records=rows)
    assert reply["details"]["field"] == "records[1].confidence"
    assert base.ok("list_topics")["total"] == 0
    reply = base.fails("invalid_field", "import_facts", records=rows, columns={"content": "text"})
    assert reply["details"]["field"] == "columns.content"


@pytest.mark.parametrize(
    ("action", "data", "field"),
    [
        ("add_fact", {"topic": "a"}, "content"),
        ("add_fact", {"topic": " ", "content": "x"}, "topic"),
        ("add_fact", {"topic": "a", "content": " \n"}, "content"),
        ("update_fact", {"fact_id": "a", "content": " "}, "content"),
        ("merge_topics", {"source": "a", "target": " "}, "target"),
        ("add_fact", {"topic": "a", "content": "x", "confidence": 2}, "confidence"),
        ("add_fact", {"topic": "a", "content": "x", "confidnce": 1}, "confidnce"),
        ("add_fact", {"topic": "a", "content": "x", "tags": ["y" * 200]}, "tags[0]"),
        ("add_fact", {"topic": "a", "content": "x", "supersedes": 5}, "supersedes"),
        ("add_fact", {"topic": "a" * 200, "content": "x"}, "topic"),
        ("get_fact", {"topic": "a", "as_of": "now"}, "as_of"),
        ("get_fact", {"topic": "a", "limit": 0}, "limit"),
        ("search_facts", {"query": ""}, "query"),
        ("import_facts", {"records": []}, "records"),
        ("merge_topics", {"source": "a"}, "target"),
    ],
)
def test_bad_input_names_the_field(base: Base, action: str, data: dict[str, Any], field: str) -> None:
    assert base.fails("invalid_field", action, **data)["details"]["field"] == field


def test_a_long_fact_is_kept_or_refused_by_its_name(base: Base) -> None:
    base.add("wifi " * 12_000)
    assert base.ok("add_fact", topic="office", content="wifi " * 12_000)["reinforced"]
    reply = base.fails("invalid_field", "add_fact", topic="office", content="é" * 40_000)
    assert reply["details"]["field"] == "content"


def test_namespaces_are_kept_apart(agent: Agent, orchestrator: Orchestrator) -> None:
    one, other = Base(agent, orchestrator), Base(agent, orchestrator)
    fact_id = one.add("It has wifi.")
    other.fails("memory_not_found", "get_fact", fact_id=fact_id)
    other.fails("memory_not_found", "get_fact", topic="office")
    other.fails("memory_not_found", "delete_fact", fact_id=fact_id)
    assert other.ok("list_topics")["total"] == 0
    assert other.ok("search_facts", query="It has wifi.")["count"] == 0
    assert other.add("It has wifi.") != fact_id
