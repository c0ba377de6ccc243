"""Search by meaning with the real model and its worker process, when it is there, lost, changed, restarted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from memory_client import MemoryClient
from tests.support.service import Orchestrator, Reply, eventually, running_orchestrator, running_service, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(240)]

# Loading the model takes some ten seconds on two busy cores.
LOAD_S = 90.0
MODEL = "all-MiniLM-L6-v2"

# What is asked -> the memory that answers it, in other words.
PARAPHRASES = {
    "Who suffers from a nut allergy?": "Priya breaks out in hives whenever she eats peanuts.",
    "How does the boss like to commute?": "Mr. Alvarez cycles to the office each morning.",
    "Why was the website down?": "An expired certificate made the web shop unreachable on Monday.",
    "Does anyone own a pet?": "Tom adopted a grey kitten from the shelter.",
    "When do I see the dentist?": "Appointment for the toothache: Thursday at nine.",
    "Who is good with languages?": "Yuki speaks Japanese, Finnish and Portuguese fluently.",
}
DISTRACTORS = [
    "The quarterly report is due at the end of March.",
    "Lisbon was sunny during the whole of the holiday.",
    "The printer on the third floor is out of toner again.",
    "Marta bought two tickets for the opera.",
    "The old oak in the garden was struck by lightning.",
    "Our football team lost the match by two goals.",
    "The library closes early on Wednesdays.",
    "A new bridge over the river will be opened in spring.",
    "Interest rates were raised by a quarter of a percent.",
    "The novel is about a lighthouse keeper and his daughter.",
    "The recipe needs three eggs and a little nutmeg.",
    "Rust is a programming language without a garbage collector.",
    "The train to the coast leaves from platform seven.",
    "Grandmother knitted a blue scarf last winter.",
]


def real_model(tmp_path: Path, **overrides: Any) -> contextlib.AbstractContextManager[Orchestrator]:
    return running_orchestrator(tmp_path, **{"embedding__provider": "sentence-transformers", **overrides})


def wait_embedded(service: Orchestrator, namespace: str = "default") -> None:
    """Wait until the model is loaded and every memory of the namespace has its vector."""

    def done() -> bool:
        readiness = service.ask("health_check")["readiness"]
        settled = readiness["embedding"] == readiness["search_index"] == "ready"
        return settled and service.ask("stats", {"namespace": namespace})["pending"] == 0

    wait_until(done, "every memory has its vector", LOAD_S)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    """One service with the real model for the tests that leave it as they found it; each uses its own namespace."""
    with real_model(tmp_path_factory.mktemp("semantic"), search__wait_ms=10_000) as orchestrator:
        wait_until(lambda: orchestrator.ask("health_check")["readiness"]["embedding"] == "ready", "the model", LOAD_S)
        yield orchestrator


@pytest.fixture
def client(service: Orchestrator, request: pytest.FixtureRequest) -> Iterator[MemoryClient]:
    namespace = request.node.name.replace("[", "-").replace("]", "")
    with MemoryClient(service.address, namespace=namespace, timeout_ms=30_000, raise_on_error=True) as client:
        yield client


def add_all(client: MemoryClient, contents: list[str]) -> None:
    client.batch_add_memories([{"content": content} for content in contents])


def texts(reply: Reply) -> list[str]:
    return [result["content"] for result in reply["results"]]


# -- meaning --------------------------------------------------------------------------------------------------------


def test_a_question_finds_its_answer_in_other_words(client: MemoryClient, service: Orchestrator) -> None:
    add_all(client, [*PARAPHRASES.values(), *DISTRACTORS])
    wait_embedded(service, client.namespace)
    for question, answer in PARAPHRASES.items():
        dense = client.semantic_search(question, k=5, mode="dense")
        assert texts(dense)[0] == answer
        hybrid = client.semantic_search(question, k=5)
        assert answer in texts(hybrid)[:3]
        assert (hybrid["pending"], hybrid["degraded"]) == (0, False)


def test_figures_are_absolute_and_the_score_orders(client: MemoryClient, service: Orchestrator) -> None:
    add_all(client, [*PARAPHRASES.values(), *DISTRACTORS])
    wait_embedded(service, client.namespace)
    text = DISTRACTORS[0]
    results = client.semantic_search(text, k=20, explain=True)["results"]
    assert results[0]["content"] == text
    assert results[0]["similarity"] == pytest.approx(1.0, abs=1e-4)
    assert results[0]["keyword"] == pytest.approx(1.0, abs=1e-6)
    assert [result["score"] for result in results] == sorted((result["score"] for result in results), reverse=True)
    for result in results:
        assert -1.0 <= result["similarity"] <= 1.0 + 1e-6
        assert 0.0 <= result["keyword"] <= 1.0
        assert set(result["explain"]) == {"dense", "keyword", "bm25", "parent", "date", "turn"}
        assert 0.0 <= result["explain"]["dense"] <= 1.0
        assert 0.0 <= result["explain"]["keyword"] <= 1.0
    assert "explain" not in client.semantic_search(text)["results"][0]
    alone = client.semantic_search(text, k=1, filters={"memory_id": results[0]["memory_id"]})["results"][0]
    assert alone["similarity"] == pytest.approx(results[0]["similarity"], abs=1e-6)
    floor = client.semantic_search(text, k=20, mode="dense", min_score=0.9)
    assert texts(floor) == [text]


def test_what_was_just_written_is_found_at_once(client: MemoryClient) -> None:
    for number, (question, answer) in enumerate(PARAPHRASES.items()):
        client.add_memory(answer)
        found = client.semantic_search(question, mode="dense")
        assert texts(found)[0] == answer
        assert (found["pending"], found["count"]) == (0, min(5, number + 1))
    memory_id = client.add_memory("A note that will be rewritten.")["memory_id"]
    client.update_memory(memory_id, {"content": "Sergei repairs watches for a living."})
    found = client.semantic_search("What is the profession of Sergei?", mode="dense", k=1)
    assert [result["memory_id"] for result in found["results"]] == [memory_id]


# -- one filter, one set --------------------------------------------------------------------------------------------

FILTERS: dict[str, dict[str, Any]] = {
    "type": {"memory_type": "episode"},
    "tier": {"memory_tier": {"in": ["short", "long"]}},
    "importance": {"importance": {"gte": 0.4, "lt": 0.85}},
    "tags any": {"tags": {"any": ["red", "blue"]}},
    "tags all": {"tags": {"all": ["red", "even"]}},
    "tags contains": {"tags": {"contains": "blue"}},
    "no tags": {"tags": {"exists": False}},
    "metadata equal": {"metadata.topic": "tea"},
    "metadata in": {"metadata.topic": {"in": ["tea", "rain"]}},
    "metadata range": {"metadata.size": {"gt": 2, "lte": 9}},
    "metadata nested": {"metadata.place.city": {"exists": True}},
    "metadata kept in memory": {"metadata.project": {"ne": "apollo"}},
    "occurred": {"occurred_at": {"gte": 1_000.0, "lt": 1_012.0}},
    "occurred never": {"occurred_at": None},
    "content": {"content": {"contains": "number 1"}},
    "created by": {"created_by": "planner"},
    "user": {"user_id": {"ne": "ada"}},
    "version": {"version": {"gte": 2}},
    "expiry": {"expires_at": {"exists": True}},
    "or": {"or": [{"memory_type": "episode"}, {"tags": {"contains": "red"}}]},
    "not": {"not": {"memory_type": "episode", "metadata.topic": "tea"}},
    "and": {"and": [{"metadata.size": {"gte": 3}}, {"or": [{"memory_tier": "long"}, {"user_id": "ada"}]}]},
    "nothing": {"memory_type": "no such type"},
    "everything": {},
}


def varied(number: int) -> dict[str, Any]:
    """A memory whose fields differ from its neighbours' in every way a filter can ask for."""
    item: dict[str, Any] = {
        "content": f"a note about the weather, number {number}",
        "memory_type": ("episode", "fact", "general")[number % 3],
        "memory_tier": ("short", "medium", "long")[number % 3 - number % 2],
        "importance": number / 24,
        "metadata": {"topic": ("tea", "rain", "sun")[number % 3], "size": number % 12},
        "tags": [["red"], ["blue"], []][number % 3] + (["even"] if number % 2 == 0 and number % 3 < 2 else []),
        "user_id": ("ada", "bob")[number % 2],
    }
    if number % 4 == 0:
        item["metadata"] |= {"place": {"city": "Lisbon"}, "project": "apollo"}
    if number % 5:
        item["occurred_at"] = 1_000.0 + number
    if number % 6 == 0:
        item["expires_at"] = time.time() + 86_400.0
    return item


@pytest.fixture(scope="module")
def varied_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orchestrator]:
    """24 memories and a session's 3, one archived, two updated; the modes are compared, so the stub serves as model."""
    folder = tmp_path_factory.mktemp("filters")
    with (
        running_orchestrator(folder, search__filterable_metadata='["project"]') as orchestrator,
        MemoryClient(orchestrator.address, agent_id="planner", raise_on_error=True) as client,
    ):
        ids = client.batch_add_memories([varied(number) for number in range(24)])["memory_ids"]
        for memory_id in ids[3:5]:
            client.update_memory(memory_id, {"importance": 0.5})
        client.update_memory(ids[7], {"state": "archived"})
        client.create_session("ada")
        client.set_agent_id("writer")
        client.batch_add_memories([{"content": f"a note of the session, {number}"} for number in range(3)])
        wait_embedded(orchestrator)
        yield orchestrator


@pytest.mark.parametrize("include_archived", [False, True], ids=["active", "archived too"])
@pytest.mark.parametrize("name", [*FILTERS, "parent", "session", "state"])
def test_every_mode_sees_the_same_memories(varied_service: Orchestrator, name: str, include_archived: bool) -> None:
    with MemoryClient(varied_service.address, agent_id="reader", raise_on_error=True) as client:
        session_id = client.call("list_sessions")["results"][0]["session_id"]
        made = {
            "parent": {"parent_id": session_id},
            "session": {"session_id": session_id},
            "state": {"state": "active"},
        }
        filters = FILTERS.get(name) or made.get(name, {})
        options: dict[str, Any] = {"filters": filters, "include_archived": include_archived}
        expected = {
            memory["memory_id"] for memory in client.call("list_memories", {"limit": 1000, **options})["results"]
        }
        for mode in ("keyword", "dense", "hybrid"):
            found = client.semantic_search("a note", k=1000, mode=mode, **options)
            assert {result["memory_id"] for result in found["results"]} == expected, mode
            assert found["count"] == len(expected)
            few = client.semantic_search("a note", k=2, mode=mode, **options)
            assert few["count"] == min(2, len(expected))
        searched = client.search_memory("note", limit=1000, **options)
        assert {result["memory_id"] for result in searched["results"]} == expected
    assert (name == "nothing") == (not expected)
    assert (name in {"everything", "state"}) == (len(expected) >= 26)


# -- the worker -----------------------------------------------------------------------------------------------------


def worker_pid(service: Orchestrator) -> int:
    """The process of the model: the only child of the orchestrator."""
    children = [
        int(pid)
        for task in Path(f"/proc/{service.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    (pid,) = children
    return pid


def test_without_the_worker_words_are_found_and_it_comes_back_by_itself(
    service: Orchestrator, client: MemoryClient
) -> None:
    add_all(client, list(PARAPHRASES.values()))
    wait_embedded(service, client.namespace)
    killed = worker_pid(service)
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: service.ask("health_check")["readiness"]["embedding"] != "ready", "the loss is noticed")
    began_s = time.monotonic()
    found = client.semantic_search("Who adopted a kitten and never told?")
    assert time.monotonic() - began_s < 4.0
    assert found["degraded"]
    assert found["degraded_reason"] == "no_query_vector"
    assert texts(found)[0] == PARAPHRASES["Does anyone own a pet?"]
    assert found["results"][0]["similarity"] is None
    late = client.add_memory("Written while the model was away: Ines plays the cello.")["memory_id"]
    assert client.get_memory(late)["memory"]["version"] == 1
    assert late in [result["memory_id"] for result in client.semantic_search("cello")["results"]]

    wait_embedded(service, client.namespace)
    assert worker_pid(service) != killed
    found = client.semantic_search("Is there a musician among us?", mode="dense", k=1)
    assert not found["degraded"]
    assert [result["memory_id"] for result in found["results"]] == [late]


def test_a_worker_that_hangs_costs_a_search_no_more_than_its_time(service: Orchestrator, client: MemoryClient) -> None:
    add_all(client, list(PARAPHRASES.values()))
    wait_embedded(service, client.namespace)
    pid = worker_pid(service)
    os.kill(pid, signal.SIGSTOP)
    try:
        began_s = time.monotonic()
        found = client.call("semantic_search", {"query": "the kitten that nobody asked for"}, deadline_ms=4_000)
        assert time.monotonic() - began_s < 4.0
        assert found["degraded"]
        assert texts(found)[0] == PARAPHRASES["Does anyone own a pet?"]
        client.add_memory("Written while the model stood still.")
        waiting = client.call("semantic_search", {"query": "stood still", "mode": "keyword"})
        assert (waiting["pending"], waiting["count"]) == (1, 1)
        assert client.call("stats")["pending"] == 1
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_embedded(service, client.namespace)
    assert client.semantic_search("stood still")["pending"] == 0


def test_the_worker_goes_with_the_orchestrator(tmp_path: Path) -> None:
    with real_model(tmp_path) as orchestrator:
        wait_until(lambda: bool(children(orchestrator)), "the worker is started")
        pid = worker_pid(orchestrator)
        orchestrator.kill()
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or is_zombie(pid), "the worker ends with its parent")


def children(service: Orchestrator) -> str:
    return "".join((task / "children").read_text() for task in Path(f"/proc/{service.pid}/task").iterdir())


def is_zombie(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    return True


# -- another model --------------------------------------------------------------------------------------------------


def models(database: Path) -> dict[str, int]:
    """How many vectors of each model are stored."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return dict(db.execute("SELECT model_id, count(*) FROM embeddings GROUP BY model_id"))


def test_another_model_embeds_anew_in_the_background_and_is_never_mixed(tmp_path: Path) -> None:
    contents = [*PARAPHRASES.values(), *DISTRACTORS]
    contents += [f"{text} It was written down for the {n}. time." for n in range(9) for text in contents[:20]]
    with running_orchestrator(tmp_path) as first, MemoryClient(first.address, raise_on_error=True) as client:
        add_all(client, contents)
        wait_embedded(first)
        assert models(first.database) == {"stub-64": len(contents)}
        assert first.terminate() == 0

    question, answer = next(iter(PARAPHRASES.items()))
    seen: list[tuple[int, dict[str, float | None]]] = []
    with real_model(tmp_path) as second, MemoryClient(second.address, timeout_ms=20_000, raise_on_error=True) as client:
        keyword = client.semantic_search("peanuts")  # the model is not there yet
        assert texts(keyword)[0] == answer
        assert keyword["degraded"] or keyword["pending"] == 0

        def done() -> bool:
            found = client.semantic_search(question, k=1000, mode="dense")
            if not found["degraded"]:
                seen.append((found["pending"], {r["memory_id"]: r["similarity"] for r in found["results"]}))
            return bool(seen) and seen[-1][0] == 0

        wait_until(done, "all is embedded anew", LOAD_S)
        final = seen[-1][1]
        assert len(final) == len(contents)
        for pending, similarities in seen:
            # Only what has a vector of this model takes part, with the similarity that it keeps.
            assert len(similarities) <= len(contents) - pending
            for memory_id, similarity in similarities.items():
                assert similarity == pytest.approx(final[memory_id], abs=1e-3)
        assert texts(client.semantic_search(question, k=1, mode="dense")) == [answer]
        (model_id,) = models(second.database)
        assert model_id.startswith(MODEL)
        assert second.terminate() == 0

    with running_orchestrator(tmp_path) as third:
        wait_embedded(third)
        assert models(third.database) == {"stub-64": len(contents)}
        found = third.ask("semantic_search", query=DISTRACTORS[1], k=1, mode="dense")
        assert texts(found) == [DISTRACTORS[1]]


def test_a_result_that_lacks_a_vector_of_the_database_is_not_kept(tmp_path: Path) -> None:
    """A search that cannot catch up with the database is incomplete; it must not be repeated."""

    async def scenario() -> None:
        async with running_service(tmp_path, search__wait_ms=0) as service:
            index = service.runtime._index
            behind = threading.Event()
            follow, store = index._apply, service.runtime._embedding._store

            async def store_unnoticed(*arguments: Any) -> None:
                behind.set()
                await store(*arguments)

            index._apply = lambda *arguments: not behind.is_set() and follow(*arguments)
            service.runtime._embedding._store = store_unnoticed
            memory_id = await service.add("the kettle is blue")

            async def stored() -> bool:
                return service.count("embeddings") == 1

            await eventually(stored)
            query = {"query": "kettle blue", "mode": "dense"}
            with mock.patch("memory_system.search.index._CATCH_UP", 0):
                early = await service.ok("semantic_search", **query)
            assert early["count"] == 0
            assert early["pending"] == 1
            assert (await service.ok("semantic_search", **query))["count"] == 1, "the thread is not waited for"
            behind.clear()
            index.notify()

            async def known() -> bool:
                return index.has_vector(service.rows("SELECT row_id FROM memories")[0][0])

            await eventually(known)
            late = await service.ok("semantic_search", **query)
            assert [result["memory_id"] for result in late["results"]] == [memory_id]

    asyncio.run(scenario())


# -- the index on disk ----------------------------------------------------------------------------------------------

WORDS = (
    *("amber", "birch", "cedar", "dune", "ember", "fjord", "grove", "heron", "inlet"),
    *("jetty", "knoll", "larch", "marsh", "nettle", "otter", "pine", "quarry", "reed"),
)


def sentences(count: int) -> list[str]:
    """Different texts whose vectors are far from each other."""
    size = len(WORDS)
    return [
        f"{WORDS[n % size]} {WORDS[n // size % size]} {WORDS[(n * 7 + n // 5) % size]} text{n}" for n in range(count)
    ]


def log_events(service: Orchestrator) -> list[str]:
    lines = [line for file in (service.folder / "logs").glob("*") for line in file.read_text().splitlines()]
    return [json.loads(line)["event"] for line in lines]


def ranked(service: Orchestrator) -> list[list[tuple[str, float]]]:
    queries = [{"query": f"{a} {b}", "k": 10, "mode": "dense"} for a, b in zip(WORDS, WORDS[5:], strict=False)]
    replies = service.ask("batch_search", queries=queries)["results"]
    return [[(hit["memory_id"], round(hit["similarity"], 5)) for hit in reply["results"]] for reply in replies]


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at % len(data)] ^= 0x40
    file.write_bytes(data)


def graph_of(folder: Path) -> Path:
    return max(folder.glob("graph-*.bin"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "header": lambda folder: flip(graph_of(folder), 8),
    "body": lambda folder: flip(graph_of(folder), -100),
    "cut": lambda folder: os.truncate(graph_of(folder), 1000),
    "rows": lambda folder: [flip(file, 3) for file in folder.glob("rows-*.bin")],
    "manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "gone": lambda folder: graph_of(folder).unlink(),
}


def test_a_snapshot_is_used_when_whole_and_built_anew_when_not(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path, search__exact_max=50, search__graph_from=100, log__level="info") as service:
        service.ask("batch_add_memories", memories=[{"content": content} for content in sentences(400)])
        wait_embedded(service)
        expected = ranked(service)
        assert all(len(results) == 10 for results in expected)
        assert service.terminate() == 0
        assert "search_snapshot_saved" in log_events(service)
        folder = Path(f"{service.database}.index")

        service.restart()
        wait_embedded(service)
        assert log_events(service).count("search_snapshot_loaded") == 1
        assert ranked(service) == expected

        # What changed after the snapshot is replayed, also when the process had no time to save another.
        memory_id = service.ask("add_memory", content="amber fjord text-after")["memory_id"]
        wait_embedded(service)
        service.restart()
        wait_embedded(service)
        assert log_events(service).count("search_snapshot_loaded") == 2
        assert (
            service.ask("semantic_search", query="amber fjord text-after", k=1)["results"][0]["memory_id"] == memory_id
        )
        service.ask("delete_memory", memory_id=memory_id)
        wait_embedded(service)
        assert service.terminate() == 0

        for number, (name, damage) in enumerate(DAMAGE.items(), start=1):
            damage(folder)
            service.restart()
            wait_embedded(service)
            assert log_events(service).count("search_snapshot_refused") >= number, name
            assert ranked(service) == expected, name
            assert service.terminate() == 0, name
