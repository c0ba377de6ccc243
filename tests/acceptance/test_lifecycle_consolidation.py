"""Fading memories become one with their kin, can be taken apart again, and keep nothing of what was deleted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.lifecycle import DAY_S, Ageing, ageing_orchestrator, faded

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

# Each has a word that no other memory has.
WORDS = ("zanzoli", "quixley", "obelia")
KIN = (
    "The red harbour bridge was painted in spring by Zanzoli.",
    "The red harbour bridge was painted in spring, says Quixley.",
    "The red harbour bridge was painted in spring for Obelia.",
)
NEAR = 1e-4


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Ageing]:
    with ageing_orchestrator(tmp_path) as running:
        yield running


class Family:
    """Memories that fade together, below one parent, eight days after they were stored."""

    def __init__(self, service: Ageing, texts: Sequence[str] = KIN, **data: Any) -> None:
        self.service = service
        self.parent_id = service.add("what was said", importance=1.0, memory_tier="long")
        self.ids = [
            service.add(
                text,
                parent_id=self.parent_id,
                importance=0.4 + number / 20.0,
                tags=["all", f"tag{number}"],
                metadata={"topic": "bridge", "number": number},
                user_id="ada",
                **data,
            )
            for number, text in enumerate(texts)
        ]
        service.vectors_ready()
        service.clock.advance(8 * DAY_S)

    def merge(self) -> str:
        """Consolidate them; the id of what they became."""
        reply = self.service.ok("run_consolidation")
        assert {change["memory_id"] for change in reply["results"]} == set(self.ids)
        [plan] = reply["plans"]
        memory_id: str = plan["memory_id"]
        self.service.vectors_ready()
        return memory_id

    def states(self) -> list[str]:
        return [self.service.record(memory_id)["state"] for memory_id in self.ids]


def changed(service: Ageing, **data: Any) -> set[str]:
    """The memories that a consolidation changes."""
    return {change["memory_id"] for change in service.ok("run_consolidation", limit=1000, **data)["results"]}


def traces(service: Ageing, word: str) -> dict[str, Any]:
    """Where a word is still to be found: searches, and every text of every table."""
    found: dict[str, Any] = {}
    for options in ({}, {"include_archived": True}):
        for action in ("search_memory", "semantic_search"):
            results = service.ok(action, query=word, touch=False, **options)["results"]
            found[f"{action} {options}"] = [m for m in results if word in str(m).lower()]
    tables = service.query("SELECT name FROM sqlite_master WHERE type = 'table'")
    for (table,) in tables:
        found[table] = [row for row in service.query(f'SELECT * FROM "{table}"') if word in str(row).lower()]
    return {place: what for place, what in found.items() if what}


# -- merging ----------------------------------------------------------------------------------------------------


def test_kin_become_one_memory_and_nothing_is_lost(service: Ageing) -> None:
    family = Family(service)
    before = [service.record(memory_id) for memory_id in family.ids]
    merged_id = family.merge()
    merged = service.record(merged_id)
    assert merged["memory_type"] == "consolidated"
    assert merged["state"] == "active"
    assert merged["parent_id"] == family.parent_id
    assert merged["user_id"] == "ada"
    assert set(merged["tags"]) == {"all", "tag0", "tag1", "tag2"}
    assert (merged["metadata"]["topic"], merged["metadata"]["number"]) == ("bridge", [0, 1, 2])
    assert merged["metadata"]["consolidation"]["count"] == 3
    assert merged["occurred_at"] == min(memory["created_at"] for memory in before)
    importances = [faded(0.4 + number / 20.0, 0.1, 8) for number in range(3)]
    apart = math.prod(1.0 - importance for importance in importances)
    assert merged["importance"] == pytest.approx(1.0 - apart, abs=NEAR)

    sentences = [sentence.strip(" .") for sentence in merged["content"].split(". ")]
    originals = [memory["content"].strip(" .") for memory in before]
    assert set(sentences) <= set(originals)  # extracted, not made up
    assert sentences == sorted(sentences, key=originals.index)  # in the order of time
    assert 0 < len(merged["content"]) <= sum(len(text) for text in KIN)

    for memory_id, memory in zip(family.ids, before, strict=True):
        now = service.record(memory_id)
        assert now["state"] == "archived"
        same = now.keys() - {"state", "importance"}
        assert {name: now[name] for name in same} == {name: memory[name] for name in same}
        [related] = service.ok("get_related_memories", memory_id=memory_id)["results"]
        assert related["memory"]["memory_id"] == merged_id
        assert (related["relationship_type"], related["direction"]) == ("consolidated_into", "outgoing")
    assert service.ok("get_related_memories", memory_id=merged_id)["count"] == 3
    children = service.ok("get_children", parent_id=family.parent_id)["results"]
    assert [memory["memory_id"] for memory in children] == [merged_id]


def test_what_was_consolidated_is_found_instead_of_its_originals(service: Ageing) -> None:
    merged_id = Family(service).merge()
    for restart in (False, True):
        if restart:
            service.restart()
            service.vectors_ready()
        for action in ("search_memory", "semantic_search"):
            assert merged_id in service.found("red harbour bridge", action)
            kinds = service.ok(action, query="red harbour bridge", touch=False)["results"]
            assert [memory["memory_id"] for memory in kinds if "bridge" in memory["content"]] == [merged_id]
            assert len(service.found("harbour", action, include_archived=True)) >= 4
    assert service.found("bridge", filters={"memory_type": "consolidated"}) == {merged_id}


def test_a_consolidated_memory_ages_on_and_is_not_merged_again(service: Ageing) -> None:
    family = Family(service)
    merged_id = family.merge()
    start = service.record(merged_id)
    assert start["memory_tier"] == "medium"
    service.clock.advance(20 * DAY_S)
    assert service.record(merged_id)["importance"] == pytest.approx(faded(start["importance"], 0.05, 20), abs=NEAR)
    service.clock.advance(13 * DAY_S)
    assert changed(service) == set()
    service.clock.advance(10 * DAY_S)
    service.ok("run_decay")
    assert service.record(merged_id)["state"] == "archived"


@pytest.mark.parametrize(
    ("texts", "count"),
    [
        (["The very same words", "the VERY same -- words!", "The very same words."], 3),
        (["The very same words, and a longer way to say them at last", "The very same words"], 0),
        (["one two three four five six seven eight nine ten", "ten nine eight seven six five four three two one"], 2),
    ],
)
def test_near_duplicates_are_folded_and_counted(tmp_path: Path, texts: list[str], count: int) -> None:
    with ageing_orchestrator(tmp_path, consolidation__similarity_threshold=0.95) as service:
        ids = [service.add(text, importance=0.5) for text in texts]
        service.vectors_ready()
        service.clock.advance(8 * DAY_S)
        reply = service.ok("run_consolidation")
        assert {change["memory_id"] for change in reply["results"]} == set(ids if count else ())
        if count:
            [plan] = reply["plans"]
            assert plan["kind"] == "duplicates"
            merged = service.record(plan["memory_id"])
            assert merged["content"] in texts
            assert merged["metadata"]["consolidation"]["count"] == count


@pytest.mark.parametrize("difference", ["parent", "user", "type", "namespace", "time", "meaning", "importance"])
def test_what_is_not_kin_stays_apart(service: Ageing, difference: str) -> None:
    parents = [service.add(f"parent {number}", importance=1.0, memory_tier="long") for number in range(2)]
    shared: dict[str, Any] = {"importance": 0.5, "parent_id": parents[0], "user_id": "ada"}
    other: dict[str, Any] = {
        "parent": {"parent_id": parents[1]},
        "user": {"user_id": "bob"},
        "type": {"memory_type": "note"},
        "namespace": {"parent_id": None},
        "importance": {"importance": 1.0},
    }.get(difference, {})
    around = {"namespace": "elsewhere"} if difference == "namespace" else {}
    first = service.add(KIN[0], **shared)
    if difference == "time":
        service.clock.advance(3 * DAY_S)
    text = "Trains are late on Mondays, says Quixley." if difference == "meaning" else KIN[1]
    second = service.add(text, around, **{**shared, **other})
    if difference == "importance":
        service.ok("reinforce_memory", memory_id=second, reinforcement_factor=1.0)
    service.vectors_ready()
    service.vectors_ready(around)
    service.clock.advance(8 * DAY_S)
    assert changed(service) == set()
    assert service.record(first)["state"] == service.record(second, around)["state"] == "active"


def test_related_memories_are_kin_without_a_parent(service: Ageing) -> None:
    ids = [service.add(text, importance=0.5) for text in KIN[:2]]
    stranger = service.add(KIN[2], importance=0.5)
    service.ok("add_relationship", source_id=ids[0], target_id=ids[1], relationship_type="follows")
    service.vectors_ready()
    service.clock.advance(8 * DAY_S)
    assert changed(service) == set(ids)
    assert service.record(stranger)["state"] == "active"


def test_without_vectors_only_equal_texts_are_folded(tmp_path: Path) -> None:
    with ageing_orchestrator(tmp_path, embedding__provider="off") as service:
        parent_id = service.add("above", importance=1.0, memory_tier="long")
        different = [service.add(text, parent_id=parent_id) for text in KIN]
        same = [service.add("just the same", parent_id=parent_id) for _ in range(2)]
        service.clock.advance(8 * DAY_S)
        assert changed(service) == set(same)
        assert {service.record(memory_id)["state"] for memory_id in different} == {"active"}


# -- undo ---------------------------------------------------------------------------------------------------------


def stored(service: Ageing, ids: Sequence[str]) -> list[dict[str, Any]]:
    """All columns of these memories."""
    columns = [name for (name,) in service.query("SELECT name FROM pragma_table_info('memories')")]
    rows = {row[columns.index("memory_id")]: dict(zip(columns, row, strict=True)) for row in service.query(
        f"SELECT {', '.join(columns)} FROM memories"
    )}  # fmt: skip
    return [rows[memory_id] for memory_id in ids]


@pytest.mark.parametrize("restarted", [False, True])
def test_undo_restores_the_originals_as_they_were(service: Ageing, restarted: bool) -> None:
    family = Family(service)
    service.ok("add_relationship", source_id=family.ids[0], target_id=family.parent_id, relationship_type="about")
    before, edges = stored(service, family.ids), service.query("SELECT * FROM relationships")
    children = service.ok("get_children", parent_id=family.parent_id)["results"]
    merged_id = family.merge()
    if restarted:
        service.restart()
    service.clock.advance(2 * DAY_S)
    merged = stored(service, [*family.ids, merged_id])
    said = service.ok("undo_consolidation", memory_id=merged_id, dry_run=True)
    assert stored(service, [*family.ids, merged_id]) == merged
    done = service.ok("undo_consolidation", memory_id=merged_id)
    assert (done["changes"], done["digest"]) == (said["changes"], said["digest"])

    assert stored(service, family.ids) == before
    assert service.query("SELECT * FROM relationships") == edges
    service.fails("memory_not_found", "get_memory", memory_id=merged_id)
    service.vectors_ready()
    for action in ("search_memory", "semantic_search"):
        assert set(family.ids) <= service.found("red harbour bridge", action)
        assert merged_id not in service.found("red harbour bridge", action, include_archived=True)
    again = service.ok("get_children", parent_id=family.parent_id)["results"]
    assert [memory["memory_id"] for memory in again] == [memory["memory_id"] for memory in children]
    assert service.query("SELECT count(*) FROM consolidations") == [(0,)]
    assert service.query("SELECT count(*) FROM consolidation_members") == [(0,)]
    assert changed(service) == set()  # what somebody took apart is not put together again


def test_undo_of_what_is_no_consolidated_memory(service: Ageing) -> None:
    family = Family(service)
    merged_id = family.merge()
    service.fails("invalid_field", "undo_consolidation", memory_id=family.ids[0])
    service.fails("memory_not_found", "undo_consolidation", memory_id="mem-none")
    service.fails("memory_not_found", "undo_consolidation", {"namespace": "elsewhere"}, memory_id=merged_id)
    assert family.states() == ["archived"] * 3
    service.ok("undo_consolidation", memory_id=merged_id)
    service.fails("memory_not_found", "undo_consolidation", memory_id=merged_id)
    assert family.states() == ["active"] * 3


def test_undo_leaves_what_a_later_merge_has_taken(service: Ageing) -> None:
    family = Family(service)
    first_id = family.merge()
    again = family.ids[:2]
    for memory_id in again:
        service.ok("reinforce_memory", memory_id=memory_id)
    service.clock.advance(8 * DAY_S)
    reply = service.ok("run_consolidation")
    assert {change["memory_id"] for change in reply["results"]} == set(again)
    service.ok("undo_consolidation", memory_id=first_id)
    assert family.states() == ["archived", "archived", "active"]
    service.ok("undo_consolidation", memory_id=reply["plans"][0]["memory_id"])
    assert family.states() == ["active"] * 3


def test_deleting_the_consolidated_memory_leaves_the_originals(service: Ageing) -> None:
    family = Family(service)
    service.ok("delete_memory", memory_id=family.merge())
    assert family.states() == ["archived"] * 3
    assert service.found("bridge", include_archived=True) == set(family.ids)
    service.ok("update_memory", memory_id=family.ids[0], update_payload={"state": "active"})
    assert service.record(family.ids[0])["state"] == "active"


# -- deleted means gone -------------------------------------------------------------------------------------------


def in_summary(service: Ageing, merged_id: str) -> int:
    """The number of an original whose own word the consolidated memory has."""
    content = service.record(merged_id)["content"].lower()
    return next(number for number, word in enumerate(WORDS) if word in content)


def remove(service: Ageing, family: Family, number: int, way: str) -> None:
    memory_id = family.ids[number]
    if way == "delete":
        service.ok("delete_memory", memory_id=memory_id)
    elif way == "expire":
        at_s = service.clock.time() + 60.0
        service.ok("update_memory", memory_id=memory_id, update_payload={"expires_at": at_s})
        service.clock.advance(120.0)
        service.ok("run_cleanup")
    else:
        service.ok("update_memory", memory_id=memory_id, update_payload={"user_id": "bob"})
        service.ok("forget", user_id="bob")


@pytest.mark.parametrize("way", ["delete", "expire", "forget"])
def test_words_of_a_deleted_original_are_gone_from_the_consolidated_memory(service: Ageing, way: str) -> None:
    family = Family(service)
    merged_id = family.merge()
    number = in_summary(service, merged_id)
    assert traces(service, WORDS[number]) != {}
    remove(service, family, number, way)
    service.vectors_ready()
    assert traces(service, WORDS[number]) == {}
    service.restart()
    assert traces(service, WORDS[number]) == {}
    service.fails("memory_not_found", "get_memory", memory_id=family.ids[number])
    # The others are still there, and still found by what all of them say.
    assert service.found("red harbour bridge") != set()
    for other in set(range(3)) - {number}:
        assert family.ids[other] in service.found(WORDS[other], include_archived=True)
    merged = service.record(merged_id)
    assert merged["metadata"]["consolidation"]["count"] == 2
    assert number not in merged["metadata"]["number"]
    assert f"tag{number}" not in merged["tags"]


def test_deleting_originals_one_by_one_leaves_nothing_at_last(service: Ageing) -> None:
    family = Family(service)
    merged_id = family.merge()
    for number, memory_id in enumerate(family.ids):
        service.ok("delete_memory", memory_id=memory_id)
        service.vectors_ready()
        assert traces(service, WORDS[number]) == {}
        left = service.found("harbour bridge")
        assert (left != set()) == (number < 2)
    service.fails("memory_not_found", "get_memory", memory_id=merged_id)
    assert service.query("SELECT count(*) FROM consolidations") == [(0,)]


def test_forgetting_a_user_takes_what_was_made_of_their_memories(service: Ageing) -> None:
    family = Family(service)
    merged_id = family.merge()
    service.ok("forget", user_id="ada")
    service.fails("memory_not_found", "get_memory", memory_id=merged_id)
    assert [traces(service, word) for word in (*WORDS, "harbour")] == [{}] * 4


def test_words_are_gone_also_from_the_history_of_the_consolidated_memory(service: Ageing) -> None:
    family = Family(service)
    merged_id = family.merge()
    number = in_summary(service, merged_id)
    content = service.record(merged_id)["content"]
    service.ok("update_memory", memory_id=merged_id, update_payload={"content": f"{content} It is very red."})
    service.ok("delete_memory", memory_id=family.ids[number])
    service.vectors_ready()
    assert traces(service, WORDS[number]) == {}


def test_the_vector_of_deleted_words_is_gone_though_no_other_can_be_made(service: Ageing) -> None:
    family = Family(service)
    merged_id = family.merge()
    number = in_summary(service, merged_id)
    service.restart_with(embedding__provider="off")
    service.ok("delete_memory", memory_id=family.ids[number])
    vectors = "SELECT count(*) FROM embeddings JOIN memories USING (row_id) WHERE memory_id = ?"
    assert service.query(vectors, merged_id) == [(0,)]
    assert WORDS[number] not in service.record(merged_id)["content"].lower()


def test_a_deleted_duplicate_takes_its_own_words_with_it(service: Ageing) -> None:
    texts = ["one two three four five six seven eight nine zanzoli", "one two three four five six seven eight nine ten"]
    first, second = (service.add(text, importance=0.5) for text in texts)
    service.vectors_ready()
    service.restart_with(consolidation__duplicate_similarity=0.8)
    service.clock.advance(8 * DAY_S)
    assert changed(service) == {first, second}
    service.ok("delete_memory", memory_id=first)
    service.vectors_ready()
    assert traces(service, "zanzoli") == {}
    assert service.found("seven eight") != set()


def test_originals_outlive_the_archive_s_limit_while_their_consolidated_memory_does(tmp_path: Path) -> None:
    deletion = {"lifecycle__delete_enabled": "true", "lifecycle__delete_after_days": 10}
    with ageing_orchestrator(tmp_path, **deletion) as service:
        family = Family(service)
        merged_id = family.merge()
        service.clock.advance(20 * DAY_S)
        service.ok("run_cleanup")
        assert family.states() == ["archived"] * 3
        service.clock.advance(100 * DAY_S)
        for _ in range(3):
            service.ok("run_decay")
            service.clock.advance(11 * DAY_S)
            service.ok("run_cleanup")
        assert set(service.rows()) == {family.parent_id}
        service.fails("memory_not_found", "get_memory", memory_id=merged_id)


# -- summarisers of one's own ---------------------------------------------------------------------------------------

SUMMARISERS = """
def shout(originals, budget_chars, embed):
    return " / ".join(original.content.upper() for original in originals)

async def first(originals, budget_chars, embed):
    await embed(["anything"])
    return [(0, originals[0].content)]

def broken(originals, budget_chars, embed):
    raise RuntimeError("a defect of somebody else")

number = 7
"""


def with_summariser(tmp_path: Path, name: str) -> Any:
    (tmp_path / "house_style.py").write_text(SUMMARISERS)
    return ageing_orchestrator(tmp_path, start=False, consolidation__summariser=f"house_style:{name}")


def on_path(service: Ageing, tmp_path: Path) -> None:
    service.orchestrator.environ["PYTHONPATH"] += f":{tmp_path}"


@pytest.mark.parametrize(("name", "content"), [("shout", " / ".join(KIN).upper()), ("first", KIN[0])])
def test_a_summariser_is_plugged_in_by_name(tmp_path: Path, name: str, content: str) -> None:
    with with_summariser(tmp_path, name) as service:
        on_path(service, tmp_path)
        service.orchestrator.start()
        family = Family(service)
        merged_id = family.merge()
        assert service.record(merged_id)["content"] == content
        service.ok("delete_memory", memory_id=family.ids[0])
        service.vectors_ready()
        assert traces(service, WORDS[0]) == {}
        for word in WORDS[1:]:
            assert service.found(word, include_archived=True) != set()


def test_a_summariser_with_a_defect_harms_nothing(tmp_path: Path) -> None:
    with with_summariser(tmp_path, "broken") as service:
        on_path(service, tmp_path)
        service.orchestrator.start()
        family = Family(service)
        assert changed(service) == set()
        assert family.states() == ["active"] * 3
        assert service.ok("health_check")["state"] == "healthy"


@pytest.mark.parametrize("name", ["number", "absent"])
def test_a_summariser_that_cannot_be_loaded_is_told_at_the_start(tmp_path: Path, name: str) -> None:
    with with_summariser(tmp_path, name) as service:
        on_path(service, tmp_path)
        service.orchestrator.start(wait=False)
        assert service.orchestrator.process is not None
        assert service.orchestrator.process.wait(30) == 2
        line = service.orchestrator.errors()
        assert "consolidation.summariser" in line
        assert f"house_style:{name}" in line
