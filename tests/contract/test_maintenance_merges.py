"""Consolidation as a run: what the dry run shows is what happens, and it can be undone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from unittest import mock

from memory_system.consolidation.summarisers import Embed, Original
from tests.support.runs import FADING, STEADY, reported
from tests.support.service import Service, request_id, service_test

TEXT = "Ada took the train to the lake and it rained all day"
FADING_KIN = {**STEADY, "consolidation__similarity_threshold": 0.3}


async def fading_kin(service: Service) -> list[str]:
    """Two memories that say the same, and one that has no kin; all of them fade by now."""
    same = [await service.add(TEXT, importance=FADING) for _ in range(2)]
    other = await service.add("violins are made of spruce and maple", importance=FADING)
    await service.settled()
    service.clock.ahead_s += 8 * 86_400.0
    return [*same, other]


def without_ids(plans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in plan.items() if name != "memory_id"} for plan in plans]


@service_test(**FADING_KIN)
async def test_consolidation_does_what_its_dry_run_shows(service: Service) -> None:
    ids = await fading_kin(service)
    before = service.rows("SELECT row_id, state, due_at FROM memories")
    seen = await service.ok("run_consolidation", dry_run=True)
    assert service.rows("SELECT row_id, state, due_at FROM memories") == before
    done = await service.ok("run_consolidation", as_of=seen["as_of"])
    shown, made = reported(seen), reported(done)
    assert without_ids(made.pop("plans")) == shown.pop("plans")
    assert made == shown
    assert seen["counts"] == {"archived": 2, "duplicates": 1, "faded": 1}
    assert {each["memory_id"] for each in seen["results"]} == set(ids[:2])
    assert {(each["from"], each["to"], each["reason"]) for each in seen["results"]} == {
        ("active", "archived", "duplicates")
    }
    (plan,) = done["plans"]
    assert (await service.record(plan["memory_id"]))["memory_type"] == "consolidated"
    again = await service.ok("run_consolidation")
    assert again["changes"] == 0
    assert again["counts"] == {"faded": 0}


@service_test(**FADING_KIN)
async def test_what_is_stored_of_a_consolidation_has_no_content(service: Service) -> None:
    await fading_kin(service)
    key = {"request_id": request_id()}
    live = await service.ok("run_consolidation", key)
    assert live["plans"][0]["content"] == TEXT
    replayed = await service.ok("run_consolidation", key)
    assert "content" not in replayed["plans"][0]
    assert replayed["plans"][0]["memory_id"] == live["plans"][0]["memory_id"]
    (stored,) = service.rows("SELECT result FROM maintenance_runs")
    assert "train" not in json.dumps(stored)


@service_test(**FADING_KIN)
async def test_a_consolidation_is_undone(service: Service) -> None:
    ids = await fading_kin(service)
    before = service.rows(
        "SELECT memory_id, state, memory_tier, importance, importance_at FROM memories ORDER BY row_id"
    )
    (plan,) = (await service.ok("run_consolidation"))["plans"]
    merged = plan["memory_id"]
    seen = await service.ok("undo_consolidation", memory_id=merged, dry_run=True)
    await service.record(merged)
    key = {"request_id": request_id()}
    done = await service.ok("undo_consolidation", key, memory_id=merged)
    left_out = {"as_of"}
    assert {k: v for k, v in reported(seen).items() if k not in left_out} == {
        k: v for k, v in reported(done).items() if k not in left_out
    }
    changes = [(each["memory_id"], each["from"], each["to"]) for each in done["results"]]
    assert sorted(changes[:2]) == sorted((memory_id, "archived", "active") for memory_id in ids[:2])
    assert changes[2] == (merged, "active", "deleted")
    after = service.rows(
        "SELECT memory_id, state, memory_tier, importance, importance_at FROM memories ORDER BY row_id"
    )
    assert after == before
    assert (await service.ok("undo_consolidation", key, memory_id=merged))["replayed"]
    await service.fails("memory_not_found", "undo_consolidation", memory_id=merged)
    await service.fails("memory_not_found", "undo_consolidation", {"namespace": "other"}, memory_id=ids[0])


@service_test(**FADING_KIN)
async def test_consolidation_stays_in_the_namespaces_that_are_named(service: Service) -> None:
    for namespace in ("a", "b"):
        for _ in range(2):
            await service.add(TEXT, {"namespace": namespace}, importance=FADING)
    service.clock.ahead_s += 8 * 86_400.0
    await service.settled()
    reply = await service.ok("run_consolidation", namespaces=["b"])
    assert {each["namespace"] for each in reply["results"]} == {"b"}
    assert service.rows("SELECT count(*) FROM memories WHERE namespace = 'a' AND state = 'archived'") == [(0,)]


async def _other(originals: Sequence[Original], budget_chars: int, embed: Embed) -> str:
    return "what somebody else says of them"


@service_test(**FADING_KIN)
async def test_the_digest_is_also_of_what_is_merged_into_what(service: Service) -> None:
    session_id = await service.session()
    for content in ("Ada saw the lake in the rain", "In the rain Ada saw the lake and the train"):
        await service.add(content, parent_id=session_id, importance=FADING)
    await service.settled()
    service.clock.ahead_s += 8 * 86_400.0
    first = await service.ok("run_consolidation", dry_run=True)
    assert first["counts"]["summary"] == 1
    as_of = first["as_of"]
    assert (await service.ok("run_consolidation", dry_run=True, as_of=as_of))["digest"] == first["digest"]
    consolidating = service.runtime._maintaining._merges._consolidating
    with mock.patch.object(consolidating, "_summariser", _other):
        second = await service.ok("run_consolidation", dry_run=True, as_of=as_of)
    assert second["results"] == first["results"]
    assert second["digest"] != first["digest"]
