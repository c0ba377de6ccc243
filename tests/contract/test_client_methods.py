"""What both clients send: the documented action and fields of every method."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import msgpack
import msgspec
import pytest

from memory_client import AsyncMemoryClient, MemoryClient
from memory_system import models, protocol
from memory_system.client_api import ClientMethods
from tests.contract.fake_orchestrator import FakeOrchestrator, error, ok

SEARCH = {
    "occurred_after": 1.5,
    "occurred_before": 2.5,
    "include_archived": True,
    "min_score": 0.1,
    "boost": {"recency": 0.5, "importance": 0.25, "half_life_days": 7.0},
    "diversity": 0.3,
    "expand": "neighbours",
    "explain": True,
    "touch": False,
    "cursor": "c",
}
TEXT_SEARCH = SEARCH | {"highlight": True}
FILTERS = {"tags": {"any": ["a"]}}

# method: (its required arguments, all its others)
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "create_session": ({"user_id": "u"}, {"session_type": "t", "session_metadata": {"a": 1}, "idle_timeout_s": 60.0}),
    "add_memory": (
        {"content": "x"},
        {
            "memory_type": "t",
            "memory_tier": "long",
            "importance": 0.9,
            "metadata": {"a": [1]},
            "tags": ["t"],
            "parent_id": "p",
            "user_id": "u",
            "occurred_at": 1.5,
            "expires_at": 2.5,
        },
    ),
    "get_memory": ({"memory_id": "m"}, {"touch": False}),
    "search_memory": (
        {"query": "q"},
        {"memory_type": "t", "limit": 3, "parent_id": "p", "filters": FILTERS, **TEXT_SEARCH},
    ),
    "semantic_search": ({"query": "q"}, {"k": 3, "filters": FILTERS, "mode": "dense", **TEXT_SEARCH}),
    "update_memory": (
        {"memory_id": "m", "update_payload": {"content": "y", "tags": None}},
        {"expected_version": 3, "metadata_mode": "replace"},
    ),
    "delete_memory": ({"memory_id": "m"}, {"cascade": False}),
    "get_children": (
        {"parent_id": "p"},
        {"limit": 5, "sort_field": "importance", "sort_order": "asc", "include_archived": True, "cursor": "c"},
    ),
    "add_relationship": ({"source_id": "a", "target_id": "b", "relationship_type": "r"}, {"strength": 0.5}),
    "get_related_memories": (
        {"memory_id": "m"},
        {"relationship_type": "r", "direction": "incoming", "limit": 7, "cursor": "c"},
    ),
    "reinforce_memory": ({"memory_id": "m"}, {"reinforcement_factor": 2.0}),
    "batch_add_memories": ({"memories": [{"content": "x"}]}, {}),
    "batch_get_memories": ({"memory_ids": ["a", "b"]}, {"touch": False, "cursor": "c"}),
    "create_context_group": ({"name": "g"}, {"description": "d"}),
    "add_to_group": ({"memory_id": "m", "group_id": 1}, {}),
    "get_memories_by_group": ({"group_id": 1}, {"limit": 7, "include_archived": True, "cursor": "c"}),
    "end_session": ({}, {"session_id": "s", "summary": "done"}),
    "resume_session": ({}, {"session_id": "s"}),
    "get_session": ({}, {"session_id": "s"}),
    "list_sessions": ({}, {"user_id": "u", "session_state": "open", "limit": 7, "cursor": "c"}),
    "search_similar": ({"memory_id": "m"}, {"k": 3, "filters": FILTERS, **SEARCH}),
    "batch_search": ({"queries": [{"query": "q"}]}, {}),
    "remove_relationship": ({"source_id": "a", "target_id": "b"}, {"relationship_type": "r"}),
    "list_context_groups": ({}, {"limit": 7, "cursor": "c"}),
    "remove_from_group": ({"memory_id": "m", "group_id": 1}, {}),
    "list_memories": (
        {},
        {
            "filters": FILTERS,
            "sort_field": "importance",
            "sort_order": "asc",
            "limit": 7,
            "include_archived": True,
            "include_sessions": True,
            "cursor": "c",
        },
    ),
    "get_memory_history": ({"memory_id": "m"}, {"limit": 7, "cursor": "c"}),
    "forget": ({}, {"user_id": "u", "session_id": "s"}),
    "stats": ({}, {}),
    "get_commit_seq": ({}, {}),
    "health_check": ({}, {}),
    "get_request_status": ({"request_id": "r" * 16}, {}),
}
# Second names of other fields, for agents that do not use this client.
ALIASES = {"create_session": {"metadata", "created_by"}, "add_memory": {"created_by"}, "update_memory": {"update_data"}}


def decoded(request: dict[str, Any]) -> models.Params:
    """The data as the service would read it; raises when it would be refused."""
    msgspec.msgpack.decode(msgpack.packb(request), type=models.Envelope)
    return msgspec.msgpack.decode(msgpack.packb(request["data"]), type=models.PARAMS[request["action"]])


def test_every_action_has_a_method() -> None:
    """Admin actions excepted: an operator runs them by `call`."""
    assert set(models.PARAMS) == protocol.ACTIONS
    assert set(METHODS) == protocol.ACTIONS - protocol.ADMIN_ACTIONS


@pytest.mark.parametrize("name", METHODS)
def test_a_method_sends_its_action_and_fields(name: str, make: Callable[..., Any], server: FakeOrchestrator) -> None:
    required, others = METHODS[name]
    client = make(agent_id="a", session_id="s", namespace="n")
    assert getattr(client, name)(**required)["status"] == "success"
    assert getattr(client, name)(**required, **others)["status"] == "success"
    short, full = server.requests
    for request in (short, full):
        assert (request["action"], request["v"], request["namespace"]) == (name, 1, "n")
        assert (request["agent_id"], request["session_id"]) == ("a", "s")
        assert len(request["request_id"]) >= protocol.MIN_REQUEST_ID_CHARS
        assert 0 < request["deadline_ms"] <= 5000
        decoded(request)
    assert short["request_id"] != full["request_id"]
    assert full["data"] == required | others
    assert set(full["data"]) == set(models.PARAMS[name].__struct_fields__) - ALIASES.get(name, set())
    # What is not given means the service's default.
    empty = decoded({"action": name, "data": required})
    for field in set(short["data"]) - set(required):
        assert short["data"][field] == getattr(empty, field), field


def test_what_a_type_may_say_is_left_to_the_service(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    client = make()
    client.add_memory("x", memory_type="fact", memory_tier="short", importance=0.5)
    client.add_memory("x", memory_type="fact", memory_tier="medium", importance=0.51)
    client.reinforce_memory("m", 1.2)
    client.reinforce_memory("m", 1.3)
    added, named, plain, given = (request["data"] for request in server.requests)
    assert set(added) == {"content", "memory_type"}
    assert (named["memory_tier"], named["importance"]) == ("medium", 0.51)
    assert plain == {"memory_id": "m"}
    assert given["reinforcement_factor"] == 1.3


def test_the_parent_of_a_new_memory(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    client = make()
    client.add_memory("x")
    client.add_memory("x", top_level=True)
    client.add_memory("x", parent_id="p")
    absent, none, given = (request["data"] for request in server.requests)
    assert "parent_id" not in absent
    assert none["parent_id"] is None
    assert given["parent_id"] == "p"


def test_agent_and_session_are_omitted_until_set(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    client = make()
    client.stats()
    assert not {"agent_id", "session_id"} & set(server.requests[-1])
    client.set_agent_id("a")
    client.set_session_id("s")
    client.stats()
    assert (server.requests[-1]["agent_id"], server.requests[-1]["session_id"]) == ("a", "s")
    client.set_session_id(None)
    client.stats()
    assert "session_id" not in server.requests[-1]


def test_create_session_is_remembered_only_on_success(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    client = make()
    server.script.extend([error("invalid_field"), ok(session_id="s-1")])
    client.create_session("")
    assert client.session_id is None
    client.create_session("u")
    assert client.session_id == "s-1"
    client.add_memory("x")
    assert server.requests[-1]["session_id"] == "s-1"


def test_every_changing_method_takes_the_callers_key(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    client = make()
    for number, name in enumerate(sorted(protocol.WRITE_ACTIONS)):
        key = f"the-callers-own-key-{number}"
        getattr(client, name)(**METHODS[name][0], request_id=key)
        assert server.requests[-1]["request_id"] == key


def test_call_runs_any_action(make: Callable[..., Any], server: FakeOrchestrator) -> None:
    client = make()
    client.call("of_tomorrow", {"a": 1}, deadline_ms=20_000, request_id="k" * 16)
    request = server.requests[-1]
    assert (request["action"], request["data"], request["request_id"]) == ("of_tomorrow", {"a": 1}, "k" * 16)
    assert 10_000 < request["deadline_ms"] <= 20_000


FIXED = {
    "create_session": "user_id, session_type='conversation', session_metadata=None",
    "add_memory": "content, memory_type='general', memory_tier='short', importance=0.5, "
    "metadata=None, tags=None, parent_id=None",
    "get_memory": "memory_id",
    "search_memory": "query, memory_type=None, limit=10, parent_id=None",
    "semantic_search": "query, k=5, filters=None",
    "update_memory": "memory_id, update_payload",
    "delete_memory": "memory_id, cascade=True",
    "get_children": "parent_id, limit=50, sort_field='created_at', sort_order='desc'",
    "add_relationship": "source_id, target_id, relationship_type, strength=1.0",
    "get_related_memories": "memory_id, relationship_type=None",
    "reinforce_memory": "memory_id, reinforcement_factor=1.2",
    "batch_add_memories": "memories",
    "batch_get_memories": "memory_ids",
    "create_context_group": "name, description=None",
    "add_to_group": "memory_id, group_id",
    "get_memories_by_group": "group_id",
}


@pytest.mark.parametrize("client", [MemoryClient, AsyncMemoryClient])
def test_the_fixed_signatures(client: type[ClientMethods[Any]]) -> None:
    for name, wanted in FIXED.items():
        parameters = [one for one in inspect.signature(getattr(client, name)).parameters.values() if one.name != "self"]
        fixed = [one.replace(annotation=one.empty) for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
        assert ", ".join(map(str, fixed)) == wanted
        assert all(one.default is not one.empty for one in parameters if one.kind is one.KEYWORD_ONLY)
    constructor = list(inspect.signature(client).parameters.values())
    assert str(constructor[0].replace(annotation=inspect.Parameter.empty)) == "endpoint=None"
    assert {one.name: one.default for one in constructor[1:8]} == {
        "agent_id": None,
        "session_id": None,
        "namespace": "default",
        "timeout_ms": 5000,
        "failure_threshold": 5,
        "reset_timeout_s": 30.0,
        "raise_on_error": False,
    }
    assert list(client.set_agent_id.__annotations__) == ["agent_id", "return"]


def test_the_endpoint_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, server: FakeOrchestrator) -> None:
    monkeypatch.delenv(protocol.ENDPOINT_VARIABLE, raising=False)
    with MemoryClient() as client:
        assert client.endpoint == "tcp://127.0.0.1:7140"
    monkeypatch.setenv(protocol.ENDPOINT_VARIABLE, server.endpoint)
    with MemoryClient() as client:
        assert client.stats()["status"] == "success"
    with MemoryClient("tcp://10.0.0.1:7140") as client:
        assert client.endpoint == "tcp://10.0.0.1:7140"


def test_every_public_method_says_what_it_does() -> None:
    for name, method in inspect.getmembers(ClientMethods, inspect.isfunction):
        if not name.startswith("_"):
            assert re.search(r"\w", inspect.getdoc(method) or ""), name
