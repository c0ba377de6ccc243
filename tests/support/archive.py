"""A store with something of every kind in it, and its way through an export."""

from __future__ import annotations

from typing import Any

from memory_system.export_models import LINES
from tests.support.runs import DAY_S
from tests.support.service import Service

OTHER = {"namespace": "other"}
# What `fill` leaves: a run of consolidation needs a clock that may be moved.
SETTINGS = {"clock__jump_s": 1e9, "clock__settle_s": 0}

Line = dict[str, Any]


async def fill(service: Service) -> dict[str, str]:
    """Something of every kind; the ids of some of it by name."""
    ids = {"session": await service.session(session_metadata={"topic": "trains"})}
    carried = {"session_id": ids["session"], "agent_id": "planner"}
    await service.ok("resume_session", session_id=ids["session"])
    ids["ended"] = await service.session(user_id="bob", idle_timeout_s=3600)
    await service.ok("end_session", session_id=ids["ended"], summary="said little")
    metadata = {"a": 1.0, "b": [1, {"c": None}], "ü": "ж\u2028", "big": 2**62, "small": 5e-324}
    ids["first"] = await service.add(
        "Ada prefers trains to planes.", carried, metadata=metadata, tags=["travel", "ж"], importance=0.9, occurred_at=5
    )
    for number in range(3):
        await service.ok("update_memory", memory_id=ids["first"], update_payload={"content": f"version {number} of it"})
    ids["later"] = await service.add("made later, and a parent all the same", memory_tier="long")
    await service.ok("update_memory", memory_id=ids["first"], update_payload={"parent_id": ids["later"]})
    ids["expiring"] = await service.add("gone in a day", expires_at=service.clock.time() + DAY_S)
    ids["of expiring"] = await service.add("below what is gone in a day", parent_id=ids["expiring"])
    await service.ok("reinforce_memory", memory_id=ids["later"])
    await tie(service, ids)
    await consolidate(service, ids)
    ids["archived"] = await service.add("not needed any more")
    await service.ok("update_memory", memory_id=ids["archived"], update_payload={"state": "archived"})
    await service.add("of another tenant", OTHER)
    await service.settled()
    return ids


async def tie(service: Service, ids: dict[str, str]) -> None:
    for kind, strength in (("supports", 0.25), ("mentions", 1.0)):
        await service.ok(
            "add_relationship",
            source_id=ids["first"],
            target_id=ids["later"],
            relationship_type=kind,
            strength=strength,
        )
    for name, around in (("Journeys", {}), ("Elsewhere", OTHER), ("Empty", {})):
        made = await service.ok("create_context_group", around, name=name, description=f"what {name} is about")
        if name == "Journeys":
            for memory_id in (ids["later"], ids["first"]):
                await service.ok("add_to_group", group_id=made["group_id"], memory_id=memory_id)


async def consolidate(service: Service, ids: dict[str, str]) -> None:
    """Two pairs of equal memories, a week later folded into one each; one of the two is undone."""
    for topic in ("tea", "rain"):
        parent = await service.add(f"about {topic}", memory_tier="long", importance=1.0)
        for _ in range(2):
            await service.add(f"Ada spoke of {topic}.", parent_id=parent, importance=0.3)
    await service.settled()
    service.clock.ahead_s += 8 * DAY_S
    done = await service.ok("run_consolidation")
    assert len(done["plans"]) == 2, done
    found = await service.walk("list_memories", filters={"memory_type": "consolidated"})
    ids["consolidated"], undone = (memory["memory_id"] for memory in found)
    await service.ok("undo_consolidation", memory_id=undone)


async def lines_of(service: Service, around: dict[str, Any] | None = None, /, **data: Any) -> list[Line]:
    return await service.walk("export_memories", around, **data)


async def put_in(service: Service, lines: list[Line], size: int = 7, **data: Any) -> dict[str, dict[str, int]]:
    """Import lines in batches of one namespace each; what became of them, by kind."""
    outcome: dict[str, dict[str, int]] = {name: {} for name in ("added", "unchanged", "overwritten", "conflicts")}
    for namespace in dict.fromkeys(line["namespace"] for line in lines):
        of_it = [line for line in lines if line["namespace"] == namespace]
        for start in range(0, len(of_it), size):
            batch = of_it[start : start + size]
            reply = await service.ok("import_memories", {"namespace": namespace}, records=batch, **data)
            for name, counts in outcome.items():
                for kind, count in reply[name].items():
                    counts[kind] = counts.get(kind, 0) + count
    return outcome


def totals(lines: list[Line]) -> dict[str, int]:
    found = {kind: sum(line["kind"] == kind for line in lines) for kind in LINES}
    return {kind: count for kind, count in found.items() if count}
