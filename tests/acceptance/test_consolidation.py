"""Consolidation with the real model: a conversation is stored, consolidated, asked about, and put back."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from memory_client import MemoryClient
from memory_system.consolidation.summary import sentences
from tests.support.service import PROJECT, Orchestrator, running_orchestrator, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(240)]

LOAD_S = 90.0
# Memories fade as soon as they are stored; this conversation moves on quickly, so its neighbours are less alike.
FADING = {
    "lifecycle__short__max_age_days": 0,
    "lifecycle__short__promote_importance": 0.9,
    "consolidation__similarity_threshold": 0.3,
}
(CONVERSATION,) = json.loads((PROJECT / "examples" / "conversation.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    settings = {"embedding__provider": "sentence-transformers", "search__wait_ms": 10_000, **FADING}
    with running_orchestrator(tmp_path_factory.mktemp("consolidation"), **settings) as orchestrator:
        wait_until(lambda: orchestrator.ask("health_check")["readiness"]["embedding"] == "ready", "the model", LOAD_S)
        yield orchestrator


@pytest.fixture
def client(service: Orchestrator, request: pytest.FixtureRequest) -> Iterator[MemoryClient]:
    """A client in a namespace of its own that holds the conversation."""
    with MemoryClient(service.address, namespace=request.node.name, timeout_ms=120_000, raise_on_error=True) as client:
        for name, spoken in CONVERSATION["conversation"].items():
            if isinstance(spoken, list):
                session_id = client.create_session("ada", session_metadata={"name": name})["session_id"]
                client.batch_add_memories([turn(each, at, session_id) for at, each in enumerate(spoken)])
        client.set_session_id(None)
        settled(client)
        yield client


def turn(spoken: dict[str, Any], at: int, session_id: str) -> dict[str, Any]:
    return {
        "content": f"{spoken['speaker']}: {spoken['text']}",
        "parent_id": session_id,
        "occurred_at": 20.0 * at,
        "metadata": {"dia_id": spoken["dia_id"]},
    }


def settled(client: MemoryClient) -> None:
    wait_until(lambda: client.stats()["pending"] == 0, "every memory has its vector", LOAD_S)


def run(client: MemoryClient, **data: Any) -> dict[str, Any]:
    reply: dict[str, Any] = client.call("run_consolidation", {"namespaces": [client.namespace], "limit": 1000, **data})
    return reply


def memories(client: MemoryClient, **options: Any) -> dict[str, dict[str, Any]]:
    listed = client.list_memories(limit=1000, **options)["results"]
    return {memory["memory_id"]: memory for memory in listed}


def found(client: MemoryClient, question: str) -> set[str]:
    """The turns that the results stand for which fit into the text of ten turns."""
    room = 10 * 120
    ids: set[str] = set()
    for result in client.semantic_search(question, k=20, touch=False)["results"]:
        room -= len(result["content"])
        if room < 0:
            break
        told = result["metadata"]["dia_id"]
        ids.update(told if isinstance(told, list) else [told])
    return ids


def recall(client: MemoryClient) -> float:
    questions = [(each["question"], set(each["evidence"])) for each in CONVERSATION["qa"]]
    return sum(len(found(client, asked) & wanted) / len(wanted) for asked, wanted in questions) / len(questions)


def test_a_summary_is_made_of_its_originals_and_stands_for_them(client: MemoryClient) -> None:
    before = memories(client)
    recall_before = recall(client)
    seen = run(client, dry_run=True)
    assert memories(client).keys() == before.keys()
    done = run(client, as_of=seen["as_of"])
    assert (done["digest"], done["counts"]) == (seen["digest"], seen["counts"])
    assert [plan["content"] for plan in done["plans"]] == [plan["content"] for plan in seen["plans"]]
    assert done["counts"]["archived"] >= 0.15 * len(before)
    for plan in done["plans"]:
        originals = " ".join(before[memory_id]["content"] for memory_id in plan["members"])
        own = [part.partition(": ")[2] or part for part in sentences(plan["content"])]
        assert len(plan["content"]) <= len(originals) + 1
        assert all(sentence in originals for sentence in own), plan
    settled(client)
    assert recall(client) >= recall_before - 0.1

    for plan in done["plans"]:
        client.call("undo_consolidation", {"memory_id": plan["memory_id"]})
    after = memories(client)
    assert after.keys() == before.keys()
    ignored = {"importance": 0.0}
    assert {key: memory | ignored for key, memory in after.items()} == {
        key: memory | ignored for key, memory in before.items()
    }
    assert run(client)["changes"] == 0


def test_what_was_deleted_is_not_told_any_more(client: MemoryClient) -> None:
    before = memories(client)
    plan = next(plan for plan in run(client)["plans"] if plan["kind"] == "summary")
    gone = plan["members"][0]
    words = {word for word in before[gone]["content"].split() if len(word) > 6}
    client.delete_memory(gone)
    kept = " ".join(memory["content"] for memory_id, memory in before.items() if memory_id != gone)
    own = {word for word in words if word not in kept}
    told = " ".join(memory["content"] for memory in memories(client, include_archived=True).values())
    assert own
    assert not any(word in told for word in own)


def test_readers_are_served_while_it_runs(service: Orchestrator, client: MemoryClient) -> None:
    """Sentences are embedded in small parts, so that a question gets its vector in between."""
    with MemoryClient(service.address, namespace=client.namespace, timeout_ms=30_000, raise_on_error=True) as other:
        runner = threading.Thread(target=run, args=(client,), kwargs={"dry_run": True})
        runner.start()
        answers = 0
        while runner.is_alive():
            assert other.semantic_search(f"What broke on day {answers}?", touch=False)["degraded"] is False
            answers += 1
        runner.join()
    assert answers >= 1
