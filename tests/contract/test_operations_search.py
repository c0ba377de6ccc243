"""The options of the searches over the wire, alone and together: window, floor, boosts, diversity, surroundings,
highlights; with and without vectors."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest

from memory_system.calls import Call
from memory_system.digest import content_digest
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.protocol import MAX_LIST_REPLY_BYTES
from memory_system.search.engine import Hit, SearchEngine, SearchQuery
from memory_system.service.surroundings import Asked, Surroundings
from memory_system.storage.database import connect_writer
from memory_system.storage.migrations import CURRENT_VERSION
from memory_system.storage.rows import RecordView
from tests.support.service import PROJECT, Reply, Service, running_service, service_test

DAY_S = 86_400.0
# The searches of a text: action, and what it takes beside the query.
SEARCHES: list[tuple[str, dict[str, Any]]] = [
    ("search_memory", {}),
    ("semantic_search", {"mode": "keyword"}),
    ("semantic_search", {"mode": "dense"}),
    ("semantic_search", {"mode": "hybrid"}),
]
every_search = pytest.mark.parametrize(("action", "more"), SEARCHES, ids=lambda value: str(value))


def texts(reply: Reply) -> list[str]:
    return [result["content"] for result in reply["results"]]


def beside(result: dict[str, Any]) -> tuple[list[str], list[str]]:
    around = result["surroundings"]
    assert set(around) == {"before", "after"}
    return texts({"results": around["before"]}), texts({"results": around["after"]})


# ---- the time window ----


@every_search
@service_test()
async def test_the_window_begins_with_its_first_instant_and_ends_before_its_last(
    service: Service, action: str, more: dict[str, Any]
) -> None:
    now_s = service.clock.time()
    for day in (1, 2, 3):
        await service.add(f"rain on day {day}", occurred_at=now_s - day * DAY_S)
    await service.add("rain without a date")
    await service.settled()
    two, one = now_s - 2 * DAY_S, now_s - DAY_S

    async def found(**window: float) -> list[str]:
        return sorted(text[5:] for text in texts(await service.ok(action, query="rain", **more, **window)))

    assert await found() == ["on day 1", "on day 2", "on day 3", "without a date"]
    assert await found(occurred_after=two) == ["on day 1", "on day 2", "without a date"]
    assert await found(occurred_before=two) == ["on day 3"]
    assert await found(occurred_after=two, occurred_before=one) == ["on day 2"]
    assert await found(occurred_after=now_s - 60.0) == ["without a date"]  # it counts by when it was created
    assert await found(occurred_after=now_s + DAY_S) == []


@service_test()
async def test_the_window_joins_a_filter_that_sql_decides_and_follows_updates(service: Service) -> None:
    now_s = service.clock.time()
    early = await service.add("a heron", metadata={"place": "pier"}, occurred_at=now_s - 9 * DAY_S)
    await service.add("a heron", metadata={"place": "pier"}, occurred_at=now_s - DAY_S)
    await service.add("a heron", metadata={"place": "roof"}, occurred_at=now_s - 9 * DAY_S)
    asked = {"query": "heron", "filters": {"metadata.place": "pier"}, "occurred_before": now_s - 5 * DAY_S}
    assert [r["memory_id"] for r in (await service.ok("semantic_search", **asked))["results"]] == [early]
    await service.ok("update_memory", memory_id=early, update_payload={"occurred_at": now_s})
    assert (await service.ok("semantic_search", **asked))["count"] == 0
    await service.ok("update_memory", memory_id=early, update_payload={"occurred_at": None})
    assert (await service.ok("search_memory", query="heron", occurred_after=now_s - 60.0))["count"] == 1


# ---- boosts ----


async def diary(service: Service) -> None:
    """Three memories that match alike: an old one, an important one, and a new one."""
    now_s = service.clock.time()
    await service.add("walked to the lake, old", importance=0.2, occurred_at=now_s - 300 * DAY_S)
    await service.add("walked to the lake, important", importance=1.0, occurred_at=now_s - 90 * DAY_S)
    await service.add("walked to the lake, new", importance=0.2, occurred_at=now_s)
    await service.settled()


@every_search
@service_test()
async def test_boosts_change_the_order_and_show_in_explain(service: Service, action: str, more: dict[str, Any]) -> None:
    await diary(service)

    async def order(**boost: float) -> list[str]:
        reply = await service.ok(action, query="walked to the lake", explain=True, boost=boost, **more)
        assert [r["score"] for r in reply["results"]] == sorted((r["score"] for r in reply["results"]), reverse=True)
        for result in reply["results"]:
            added = {name for name in ("recency", "importance") if boost.get(name)}
            assert set(result["explain"]) & {"recency", "importance"} == added
        return [text.rpartition(", ")[2] for text in texts(reply)]

    assert await order(recency=10.0) == ["new", "important", "old"]
    assert (await order(importance=10.0))[0] == "important"
    # Ten years are nothing to a half-life of a hundred; then importance decides.
    assert (await order(recency=1.0, importance=1.0, half_life_days=36_500.0))[0] == "important"


@service_test(ranking__recency_half_life_days=100.0, lifecycle__short__decay_rate=0.0)
async def test_what_a_boost_adds(service: Service) -> None:
    await service.add("a lamp", importance=0.4, occurred_at=service.clock.time() - 200 * DAY_S)

    async def asked(**boost: Any) -> dict[str, Any]:
        reply = await service.ok("semantic_search", query="lamp", explain=True, **boost)
        (result,) = reply["results"]
        return dict(result)

    plain = await asked()
    assert (await asked(boost=None))["score"] == plain["score"]
    assert (await asked(boost={}))["score"] == plain["score"]
    by_settings = await asked(boost={"recency": 2.0, "importance": 0.5})
    assert by_settings["explain"]["recency"] == pytest.approx(2.0 * 0.25, abs=1e-4)
    assert by_settings["explain"]["importance"] == pytest.approx(0.5 * 0.4, abs=1e-6)
    assert by_settings["score"] == pytest.approx(plain["score"] + 0.7, abs=1e-4)
    own = await asked(boost={"recency": 1.0, "half_life_days": 50.0})
    assert own["explain"]["recency"] == pytest.approx(1 / 16, abs=1e-4)
    assert (own["similarity"], own["keyword"]) == (plain["similarity"], plain["keyword"])  # absolute figures stay


@service_test()
async def test_a_boost_is_of_now_and_not_of_a_kept_result(service: Service) -> None:
    await service.add("a lamp", importance=1.0, occurred_at=service.clock.time())
    await service.settled()
    asked = {"query": "lamp", "explain": True, "boost": {"recency": 1.0, "importance": 1.0, "half_life_days": 1.0}}
    first = (await service.ok("semantic_search", **asked))["results"][0]["explain"]
    service.clock.ahead_s = DAY_S
    later = (await service.ok("semantic_search", **asked))["results"][0]["explain"]
    assert later["recency"] == pytest.approx(first["recency"] / 2.0, rel=1e-3)
    assert later["importance"] < first["importance"]


# ---- diversity ----


async def copies(service: Service) -> None:
    for text in ("ferry to the island", "ferry to the island", "ferry, to the island!", "ferry timetable of the port"):
        await service.add(text)


@every_search
@service_test()
async def test_diversity_brings_what_is_new_before_copies(service: Service, action: str, more: dict[str, Any]) -> None:
    await copies(service)
    await service.settled()
    await spread(service, action, more)


@service_test(embedding__provider="off")
async def test_the_replies_of_a_batch_share_the_room_of_one(service: Service) -> None:
    for number in range(20):
        await service.add(f"gull {number} " + "x" * 60_000)
    query = {"query": "gull", "k": 20, "mode": "keyword", "touch": False}
    batch = (await service.ok("batch_search", queries=[query] * 6))["results"]
    assert [one["count"] for one in batch[:3]] == [20, 20, 20], "one alone has room enough"
    assert sum(len(result["content"]) for one in batch for result in one["results"]) <= MAX_LIST_REPLY_BYTES
    cut = next(one for one in batch if one["count"] < 20)
    rest = await service.ok("semantic_search", **query, cursor=cut["next_cursor"])
    assert cut["count"] + rest["count"] == 20 and batch[-1]["count"] == 0
    names = {result["memory_id"] for one in (cut, rest) for result in one["results"]}
    assert len(names) == 20


@service_test()
async def test_a_result_of_another_model_is_not_given_again(service: Service) -> None:
    await service.add("a heron")
    await service.settled()
    asked = {"query": "heron", "touch": False}
    hits = service.runtime._caches.results.stats
    for _ in range(2):
        assert (await service.ok("semantic_search", **asked))["count"] == 1
    assert hits().hits == 1
    with mock.patch.object(service.runtime._embedder, "model_id", "another"):
        reply = await service.ok("semantic_search", **asked)
    assert (hits().hits, reply["degraded_reason"]) == (1, "other_model")
    assert (await service.ok("semantic_search", **asked))["degraded"] is False
    assert hits().hits == 2


@pytest.mark.parametrize(("action", "more"), [SEARCHES[0], SEARCHES[3]], ids=str)
@service_test(embedding__provider="off")
async def test_diversity_without_vectors_goes_by_words(service: Service, action: str, more: dict[str, Any]) -> None:
    await copies(service)
    await spread(service, action, more)


async def spread(service: Service, action: str, more: dict[str, Any]) -> None:
    asked = {"query": "ferry to the island", **more}
    plain = await service.ok(action, **asked, explain=True)
    assert texts(plain)[-1] == "ferry timetable of the port"
    assert "diversity" not in plain["results"][0]["explain"]
    spread = await service.ok(action, **asked, diversity=0.9, explain=True)
    assert texts(spread)[1] == "ferry timetable of the port"
    assert sorted(texts(spread)) == sorted(texts(plain))
    assert [r["score"] for r in spread["results"]] == sorted((r["score"] for r in spread["results"]), reverse=True)
    parts = [result["explain"] for result in spread["results"]]
    assert parts[0]["diversity"] == 0.0 and parts[0]["relevance"] == 1.0
    assert parts[-1]["diversity"] == pytest.approx(-0.9, abs=1e-3)
    for result in spread["results"]:
        value = 0.1 * result["explain"]["relevance"] + result["explain"]["diversity"]
        assert result["score"] == pytest.approx(value)
    limit = {"limit" if action == "search_memory" else "k": 1}
    walked = await service.walk(action, **asked, diversity=0.9, **limit)
    assert [one["memory_id"] for one in walked] == [one["memory_id"] for one in spread["results"]]


# ---- surroundings ----


async def talk(service: Service) -> dict[str, str]:
    """Five turns of a session, told in another order than they were added."""
    session = await service.session(session_metadata={"channel": "voice"})
    base_s = service.clock.time() - DAY_S
    ids = {
        text: await service.add(text, parent_id=session, occurred_at=base_s + at)
        for at, text in ((4, "fifth"), (0, "first"), (2, "third, the kestrel"), (1, "second"), (3, "fourth"))
    }
    await service.add("third of another talk", parent_id=await service.session())
    await service.settled()
    return ids | {"session": session}


@every_search
@service_test()
async def test_neighbours_stand_beside_a_result_in_their_order(
    service: Service, action: str, more: dict[str, Any]
) -> None:
    ids = await talk(service)
    asked = {"query": "kestrel", "min_score": 0.5, **more}
    (result,) = (await service.ok(action, **asked, expand="neighbours"))["results"]
    assert beside(result) == (["first", "second"], ["fourth", "fifth"])
    assert result["surroundings"]["before"][0]["memory_id"] == ids["first"]
    assert "score" not in result["surroundings"]["before"][0]
    (plain,) = (await service.ok(action, **asked))["results"]
    assert "surroundings" not in plain


@service_test()
async def test_neighbours_are_those_that_a_read_may_show(service: Service) -> None:
    ids = await talk(service)
    asked = {"query": "kestrel", "min_score": 0.5, "expand": "neighbours"}

    async def around(**more: Any) -> tuple[list[str], list[str]]:
        (result,) = (await service.ok("semantic_search", **asked, **more))["results"]
        return beside(result)

    assert await around(filters={"parent_id": ids["session"]}) == (["first", "second"], ["fourth", "fifth"])
    # Filters say what is found, not what stands around it.
    assert await around(filters={"content": {"contains": "kestrel"}}) == (["first", "second"], ["fourth", "fifth"])
    await service.ok("update_memory", memory_id=ids["second"], update_payload={"state": "archived"})
    assert await around() == (["first"], ["fourth", "fifth"])
    assert await around(include_archived=True) == (["first", "second"], ["fourth", "fifth"])
    await service.ok("delete_memory", memory_id=ids["fourth"])
    assert await around() == (["first"], ["fifth"])
    await service.ok(
        "update_memory", memory_id=ids["fifth"], update_payload={"expires_at": service.clock.time() + 100.0}
    )
    assert await around() == (["first"], ["fifth"])  # a result that is kept must forget it, too
    service.clock.ahead_s = 101.0
    assert await around() == (["first"], [])
    await service.ok("update_memory", memory_id=ids["first"], update_payload={"parent_id": None})
    assert await around() == ([], [])
    (other,) = (await service.ok("search_memory", {"namespace": "other"}, query="kestrel"))["results"] or [None]
    assert other is None


@service_test()
async def test_what_may_not_be_shown_is_passed_over_on_the_way_to_a_neighbour(service: Service) -> None:
    session = await service.session()
    ids = {text: await service.add(text, parent_id=session) for text in ("one", "two", "three", "four", "kestrel")}
    for text in ("three", "four"):
        await service.ok("update_memory", memory_id=ids[text], update_payload={"state": "archived"})
    (result,) = (await service.ok("search_memory", query="kestrel", expand="neighbours"))["results"]
    assert beside(result) == (["one", "two"], [])


@service_test()
async def test_a_neighbour_that_moved_away_meanwhile_is_left_out(service: Service) -> None:
    """What the index said when it was searched counts only as far as it is still so when the records are read."""
    ids = await talk(service)
    rows = dict(service.rows("SELECT memory_id, row_id FROM memories"))
    queries = service.runtime._queries
    memory = await queries.memory("default", ids["third, the kestrel"])
    assert memory is not None
    before = tuple(rows[ids[text]] for text in ("first", "second"))
    hit = Hit(memory.row_id, memory.content_digest, 1.0, None, 1.0, before=before)
    view = RecordView(LifecycleSettings())
    surroundings = Surroundings(cast(SearchEngine, None), queries, view)
    asked = Asked(SearchQuery("default", "kestrel", service.clock.time()), "", False, "neighbours", False)
    call = cast(Call, SimpleNamespace(namespace="default", now_s=service.clock.time()))

    async def shown() -> list[str]:
        (fields,) = await surroundings.of(call, asked, [(hit, memory)])
        return texts({"results": fields["surroundings"]["before"]})

    assert await shown() == ["first", "second"]
    await service.ok("update_memory", memory_id=ids["first"], update_payload={"parent_id": None})
    assert await shown() == ["second"]
    await service.ok("delete_memory", memory_id=ids["second"])
    assert await shown() == []


@service_test()
async def test_a_memory_without_a_parent_stands_alone(service: Service) -> None:
    await service.add("a kestrel")
    await service.add("a heron")
    (alone,) = (await service.ok("search_memory", query="kestrel", expand="neighbours"))["results"]
    assert alone["surroundings"] == {"before": [], "after": []}
    (alone,) = (await service.ok("search_memory", query="kestrel", expand="parent"))["results"]
    assert alone["surroundings"] == {"parent": None}


@every_search
@service_test()
async def test_the_parent_stands_beside_a_result(service: Service, action: str, more: dict[str, Any]) -> None:
    ids = await talk(service)
    (result,) = (await service.ok(action, query="kestrel", min_score=0.5, expand="parent", **more))["results"]
    parent = result["surroundings"]["parent"]
    assert (parent["memory_id"], parent["memory_type"]) == (ids["session"], "session")
    assert parent["metadata"] == {"channel": "voice"}
    assert parent == await service.record(ids["session"]) | {"importance": parent["importance"]}


@service_test()
async def test_a_parent_that_is_archived_or_expired_is_not_shown(service: Service) -> None:
    parent = await service.add("a book about birds", expires_at=service.clock.time() + 100.0)
    await service.add("a kestrel", parent_id=parent)
    asked = {"query": "kestrel", "expand": "parent"}

    async def shown(**more: Any) -> str | None:
        (result,) = (await service.ok("search_memory", **asked, **more))["results"]
        above = result["surroundings"]["parent"]
        return above and above["content"]

    assert await shown() == "a book about birds"
    await service.ok("update_memory", memory_id=parent, update_payload={"state": "archived"})
    assert await shown() is None
    assert await shown(include_archived=True) == "a book about birds"
    service.clock.ahead_s = 101.0
    assert await shown(include_archived=True) is None


@service_test(lifecycle__access_weight_search=0.1)
async def test_surroundings_are_no_access(service: Service) -> None:
    ids = await talk(service)
    await service.ok("search_memory", query="kestrel", expand="neighbours")
    await service.ok("search_memory", query="kestrel", expand="parent")
    await service.runtime._housekeeping.flush_accesses()
    assert (await service.record(ids["third, the kestrel"]))["access_count"] == 2
    assert (await service.record(ids["second"]))["access_count"] == 0


# ---- highlights ----


@every_search
@service_test()
async def test_highlights_are_spans_of_the_content(service: Service, action: str, more: dict[str, Any]) -> None:
    await service.add("\U0001f6a2 Ferries leave; one FERRY left. Ferrying caf\u00e9 cups.")
    await service.settled()
    (result,) = (await service.ok(action, query="What does the ferry cafe do?", highlight=True, **more))["results"]
    marked = [result["content"][begin:end] for begin, end in result["highlights"]]
    assert marked == ["Ferries", "FERRY", "Ferrying", "caf\u00e9"]
    (plain,) = (await service.ok(action, query="What does the ferry cafe do?", **more))["results"]
    assert "highlights" not in plain


# ---- search_similar, batch_search, all together ----


@service_test()
async def test_search_similar_takes_the_options(service: Service) -> None:
    ids = await talk(service)
    now_s = service.clock.time()
    old = await service.add("the kestrel on the mast", importance=0.1, occurred_at=now_s - 400 * DAY_S)
    new = await service.add("the kestrel on the roof, the mast", importance=0.9, occurred_at=now_s)
    await service.settled()

    async def found(**more: Any) -> list[str]:
        reply = await service.ok("search_similar", memory_id=old, **more)
        assert old not in [result["memory_id"] for result in reply["results"]]
        return [result["memory_id"] for result in reply["results"]]

    assert (await found())[0] == new
    assert await found(k=1) == [new]
    assert (await found(boost={"recency": 1.0}, k=1)) == [new]
    assert new not in await found(occurred_before=now_s - 60.0)
    assert await found(filters={"parent_id": ids["session"]}, min_score=0.2) == [ids["third, the kestrel"]]
    assert await found(min_score=0.999) == []
    reply = await service.ok(
        "search_similar", memory_id=old, filters={"parent_id": ids["session"]}, expand="neighbours", explain=True,
        diversity=0.2, boost={"importance": 0.1}, min_score=0.2,
    )  # fmt: skip
    (result,) = reply["results"]
    assert beside(result) == (["first", "second"], ["fourth", "fifth"])
    assert {"dense", "importance"} <= set(result["explain"])
    bad = await service.fails("invalid_field", "search_similar", memory_id=old, highlight=True)
    assert bad["details"]["field"] == "highlight"


def everything(service: Service) -> dict[str, Any]:
    now_s = service.clock.time()
    return {
        "filters": {"memory_type": "general"}, "occurred_after": now_s - 7 * DAY_S, "occurred_before": now_s + 1.0,
        "min_score": 0.1, "boost": {"recency": 0.2, "importance": 0.1, "half_life_days": 7.0}, "diversity": 0.2,
        "expand": "neighbours", "highlight": True, "explain": True, "touch": False,
    }  # fmt: skip


@every_search
@service_test()
async def test_all_options_together(service: Service, action: str, more: dict[str, Any]) -> None:
    await talk(service)
    reply = await service.ok(action, query="the kestrel of the third", **everything(service), **more)
    first = reply["results"][0]
    assert first["content"] == "third, the kestrel"
    assert [first["content"][begin:end] for begin, end in first["highlights"]] == ["third", "kestrel"]
    assert beside(first) == (["first", "second"], ["fourth", "fifth"])
    assert {"recency", "importance", "diversity", "relevance"} <= set(first["explain"]) or reply["count"] == 1


@service_test()
async def test_every_query_of_a_batch_has_options_of_its_own(service: Service) -> None:
    await talk(service)
    options = everything(service)
    queries: list[dict[str, Any]] = [
        {"query": "third", **options},
        {"query": "kestrel", "mode": "keyword", "expand": "parent"},
        {"query": "kestrel", "mode": "dense", "occurred_before": 5.0},
        {"query": "third"},
    ]
    batch = (await service.ok("batch_search", queries=queries))["results"]
    alone = [await service.ok("semantic_search", **query) for query in queries]
    for together, single in zip(batch, alone, strict=True):
        assert texts(together) == texts(single)
        assert [set(one) for one in together["results"]] == [set(one) for one in single["results"]]
    assert batch[1]["results"][0]["surroundings"]["parent"]["memory_type"] == "session"
    assert batch[2]["count"] == 0
    refused = await service.fails(
        "invalid_field", "batch_search", queries=[queries[3], {"query": "x", "boost": {"recency": 99}}]
    )
    assert refused["details"]["field"] == "queries[1].boost.recency"


@pytest.mark.parametrize(("action", "more"), [SEARCHES[0], SEARCHES[3]], ids=str)
@service_test(embedding__provider="off")
async def test_without_an_embedder_the_options_go_on_working(
    service: Service, action: str, more: dict[str, Any]
) -> None:
    session = await service.session()
    now_s = service.clock.time()
    for at, text in enumerate(("first", "the kestrel", "last")):
        await service.add(text, parent_id=session, occurred_at=now_s - 10 + at)
    reply = await service.ok(action, query="kestrel", **everything(service), **more)
    assert reply["degraded"] is (action == "semantic_search")
    (result,) = reply["results"]
    assert result["similarity"] is None and result["keyword"] == pytest.approx(1.0)
    assert beside(result) == (["first"], ["last"])
    assert result["highlights"] == [[4, 11]]
    assert {"recency", "importance"} <= set(result["explain"])
    assert (await service.ok(action, query="the kestrel flew away", min_score=0.9, **more))["count"] == 0
    assert (await service.ok(action, query="kestrel", occurred_before=now_s - 10.0, **more))["count"] == 0


@service_test()
async def test_a_kept_result_is_of_its_own_options(service: Service) -> None:
    """The same query with one option changed is another search, however soon it follows."""
    await talk(service)
    now_s = service.clock.time()
    variants: list[dict[str, Any]] = [
        {}, {"min_score": 0.9}, {"occurred_after": now_s - 60.0}, {"occurred_before": now_s - 60.0},
        {"diversity": 0.9}, {"expand": "neighbours"}, {"expand": "parent"}, {"highlight": True}, {"explain": True},
        {"boost": {"recency": 1.0}},
    ]  # fmt: skip

    async def answers() -> list[Any]:
        return [(await service.ok("semantic_search", query="third", touch=False, **one))["results"] for one in variants]

    first = await answers()
    hits = service.runtime._caches.results.stats().hits
    again = await answers()
    assert service.runtime._caches.results.stats().hits == hits + len(variants) - 1  # a boosted one is not kept
    assert [[set(one) for one in results] for results in again] == [[set(one) for one in results] for results in first]
    assert [[one["memory_id"] for one in results] for results in again] == [
        [one["memory_id"] for one in results] for results in first
    ]
    assert len({repr([sorted(one) for one in results]) + str(len(results)) for results in first}) >= 6


@service_test()
async def test_a_kept_result_has_no_text(service: Service) -> None:
    """It names memories; their records are read anew."""
    await talk(service)
    with mock.patch.object(service.runtime._caches.results, "put", mock.AsyncMock()) as put:
        reply = await service.ok("semantic_search", query="third", touch=False)
    assert "third, the kestrel" in texts(reply)
    ((_, kept, _), _) = put.await_args
    assert kept and b"kestrel" not in kept


@service_test()
async def test_a_cursor_belongs_to_its_options(service: Service) -> None:
    for at in range(4):
        await service.add(f"gull {at}")
    await service.settled()
    page = await service.ok("semantic_search", query="gull", k=2, diversity=0.5)
    cursor = page["next_cursor"]
    await service.fails("invalid_cursor", "semantic_search", query="gull", k=2, cursor=cursor)
    await service.fails("invalid_cursor", "semantic_search", query="gull", k=2, diversity=0.6, cursor=cursor)
    rest = await service.ok("semantic_search", query="gull", k=2, diversity=0.5, cursor=cursor)
    assert len({*texts(page), *texts(rest)}) == 4


@pytest.mark.parametrize(
    "options",
    [{}, {"boost": {"recency": 5.0}}, {"diversity": 0.5}, {"diversity": 0.5, "boost": {"importance": 1.0}}],
    ids=str,
)
@pytest.mark.parametrize(("action", "more"), [*SEARCHES[1:], ("search_similar", {})], ids=str)
@service_test()
async def test_pages_never_overlap_whatever_orders_them(
    service: Service, action: str, more: dict[str, Any], options: dict[str, Any]
) -> None:
    """More memories than one side's candidates, in another order by time than by words."""
    now_s = service.clock.time()
    memories = [
        {
            "content": f"gull {'pier ' * (number % 7)}{'tide ' * (number % 5)}n{number}",
            "occurred_at": now_s - (number * 37 % 90) * DAY_S,
            "importance": (number * 11 % 90) / 90,
        }
        for number in range(90)
    ]
    ids = (await service.ok("batch_add_memories", memories=memories))["memory_ids"]
    await service.settled()
    asked = {"memory_id": ids[0]} if action == "search_similar" else {"query": "gull pier tide"}
    found = await service.walk(action, k=20, touch=False, **asked, **more, **options)
    names = [one["memory_id"] for one in found]
    assert len(names) == len(set(names)) >= 40
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True)


# ---- stores of before ----


@pytest.mark.parametrize("version", range(1, CURRENT_VERSION))
def test_what_an_older_store_holds_is_found(tmp_path: Path, version: int) -> None:
    texts_of_before = ["a heron by the pier", "below the stairs", "nothing else"]
    insert = (
        "INSERT INTO memories (namespace, memory_id, content, content_digest, memory_type, memory_tier, importance, "
        "importance_at, created_at, updated_at, tier_since, created_by) "
        "VALUES ('default', ?, ?, ?, 'general', 'short', 0.5, 1.7e9, 1.7e9, 1.7e9, 1.7e9, 'ada')"
    )
    with contextlib.closing(connect_writer(tmp_path / "memory.db")) as db:
        db.executescript((PROJECT / "tests" / "data" / f"schema-v{version}.sql").read_text())
        db.execute("INSERT INTO meta VALUES ('store_epoch', 'an old one')")
        for number, text in enumerate(texts_of_before):
            db.execute(insert, (f"mem-{number}", text, content_digest(text)))

    async def scenario() -> None:
        async with running_service(tmp_path, lifecycle__short__decay_rate=0.0) as service:
            await service.settled()
            assert texts(await service.ok("search_memory", query="herons")) == texts_of_before[:1]
            assert texts(await service.ok("semantic_search", query="stairs", k=1)) == [texts_of_before[1]]
            reply = await service.ok("semantic_search", query=texts_of_before[2], mode="dense", k=1)
            assert (texts(reply), reply["degraded"], reply["pending"]) == ([texts_of_before[2]], False, 0)
            assert (await service.ok("run_integrity_check"))["ok"] is True

    asyncio.run(scenario())
