"""The pure parts of consolidation: sentences, summaries, families, fields, plans."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.consolidation import kin, rules, summary
from memory_system.consolidation.plan import Plan, compose
from memory_system.consolidation.summarisers import Original, extractive, load, summarise
from memory_system.consolidation_settings import ConsolidationSettings
from memory_system.digest import content_digest
from memory_system.errors import ConfigError
from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.models import Memory
from memory_system.protocol import MAX_METADATA_BYTES, MAX_TAGS

SETTINGS = ConsolidationSettings()
LIFECYCLE = LifecycleSettings()
DAY_S = 86_400.0
NOW_S = 1_700_000_000.0


def unit_rows(*rows: Sequence[float]) -> Any:
    vectors = np.array(rows, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def memory(row_id: int = 1, content: str = "a memory", **fields: Any) -> Memory:
    """One that faded: eight days old by NOW_S."""
    old_s = NOW_S - 8 * DAY_S
    values: dict[str, Any] = {
        "row_id": row_id,
        "namespace": "default",
        "memory_id": f"mem-{row_id}",
        "content": content,
        "content_digest": content_digest(content),
        "memory_type": "general",
        "memory_tier": "short",
        "importance": 0.5,
        "importance_at": old_s,
        "access_count": 0,
        "last_accessed_at": None,
        "created_at": old_s + row_id,
        "updated_at": old_s,
        "occurred_at": None,
        "expires_at": None,
        "tier_since": old_s,
        "due_at": old_s + 7 * DAY_S,
        "metadata": {},
        "tags": [],
        "parent_id": None,
        "session_id": None,
        "user_id": None,
        "created_by": "ada",
        "version": 1,
        "state": "active",
    }
    return Memory(**(values | fields))


# -- sentences --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("   \n ", []),
        ("No end", ["No end"]),
        ("One. Two! Three? Four…Five", ["One.", "Two!", "Three?", "Four…Five"]),
        ("Dr. Ada met Mr. Bob at 3.5 km. They ran.", ["Dr. Ada met Mr. Bob at 3.5 km.", "They ran."]),
        ('He said "Stop!" Then he left.', ['He said "Stop!"', "Then he left."]),
        ("It cost 3. 50 of them came.", ["It cost 3.", "50 of them came."]),
        ("see e.g. this. and that.", ["see e.g. this. and that."]),
        ("line one\nline two\n\n- item", ["line one", "line two", "- item"]),
        ("So do I. Good!", ["So do I.", "Good!"]),
        ("J. R. Smith wrote it. Éva read it.", ["J. R. Smith wrote it.", "Éva read it."]),
        ("今日は。明日", ["今日は。明日"]),
    ],
)
def test_sentences(text: str, wanted: list[str]) -> None:
    assert summary.sentences(text) == wanted


@given(st.text(max_size=300))
def test_sentences_have_all_the_words(text: str) -> None:
    assert " ".join(summary.sentences(text)).split() == text.split()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Ada: I saw it.", "Ada"),
        ("Ada Lovelace: I saw it.", "Ada Lovelace"),
        ("I saw it: a bird.", "I saw it"),
        ("At 5: nothing", "At 5"),
        ("5:30 is early", None),
        ("http://x.y is a page", None),
        ("Stop. Now: go", None),
        ("Ada:", None),
        (f"{'x' * 41}: too long", None),
    ],
)
def test_labels(text: str, wanted: str | None) -> None:
    assert summary.label(text) == wanted


# -- the choice of sentences ------------------------------------------------------------------------------------------


def chosen(texts: Sequence[str], vectors: Any, budget: int) -> list[str]:
    found = summary.split(texts)
    return [found[at].text for at in summary.choose(found, vectors, budget)]


def test_each_text_is_heard_before_any_is_heard_twice() -> None:
    texts = ["The cat sat down. The cat sat here. The cat sat there.", "Dogs bark at night."]
    vectors = unit_rows([1, 0.3, 0.3], [1, 0.7, 0], [1, 0, 0.7], [0.2, 1, 1])
    assert chosen(texts, vectors, 40) == ["The cat sat down.", "Dogs bark at night."]


def test_what_was_said_is_not_said_again() -> None:
    texts = ["The cat sat down.", "The cat sat down!", "Dogs bark at night."]
    assert chosen(texts, unit_rows([1, 0.01], [1, 0], [0.5, 1]), 1000) == ["The cat sat down.", "Dogs bark at night."]


def test_what_says_nothing_is_left_out_unless_there_is_nothing_else() -> None:
    vectors = unit_rows([1, 0], [0.9, 0.5])
    assert chosen(["Ada: Thanks, Bob!", "The cat sat down."], vectors, 1000) == ["The cat sat down."]
    assert chosen(["Wow!", "Ada: Ok."], vectors, 1000) == ["Wow!", "Ada: Ok."]


def test_long_sentences_weigh_more() -> None:
    texts = ["One two three.", "Four five six seven eight nine ten.", "Four five six seven eight nine ten eleven."]
    vectors = unit_rows([1, 0], [0.1, 1], [0.3, 1])
    assert chosen(texts, vectors, 45) == [texts[2]]


def test_one_sentence_is_always_told() -> None:
    assert chosen(["The cat sat down.", "Dogs bark at night."], unit_rows([1, 0], [1, 0.1]), 3)
    assert summary.choose([], np.zeros((0, 2), np.float32), 10) == []


@given(
    st.lists(st.text("ab .", min_size=1, max_size=30), min_size=1, max_size=6),
    st.integers(1, 80),
    st.integers(0, 2**32 - 1),
)
def test_a_choice_fits_and_keeps_the_order(texts: list[str], budget: int, seed: int) -> None:
    found = summary.split(texts)
    vectors = unit_rows(*np.random.default_rng(seed).normal(size=(max(1, len(found)), 4)))[: len(found)]
    picked = summary.choose(found, vectors, budget)
    assert picked == sorted(set(picked))
    assert bool(picked) == bool(found)
    if len(picked) > 1:
        assert sum(len(found[at].text) + 1 for at in picked) <= budget + 1
    # The last bits of a vector, which differ from batch to batch, do not change it.
    assert summary.choose(found, vectors * np.float32(1 + 1e-6), budget) == picked


# -- families ---------------------------------------------------------------------------------------------------------


def texts(
    vectors: Any, normalised: Sequence[str] | None = None, at_s: Sequence[float] | None = None, **fields: Any
) -> kin.Texts:
    count = len(normalised) if normalised is not None else len(vectors)
    return kin.Texts(
        normalised=[f"text {at}" for at in range(count)] if normalised is None else normalised,
        chars=fields.get("chars", [100] * count),
        at_s=[float(at) for at in range(count)] if at_s is None else at_s,
        vectors=vectors,
        sections=fields.get("sections", [0] * count),
        usual_chars=fields.get("usual_chars", 100.0),
    )


ALIKE = unit_rows([1, 0], [1, 0.5], [1, 0.9])


def test_neighbours_that_are_alike_are_a_family() -> None:
    vectors = unit_rows([1, 0], [1, 0.5], [0, 1], [-1, 0], [-1, 0.5])
    assert kin.families(texts(vectors), SETTINGS) == [("summary", [0, 1]), ("summary", [3, 4])]


def test_what_is_alike_but_no_neighbour_is_none() -> None:
    assert kin.families(texts(unit_rows([1, 0], [-1, 1], [1, 0.5])), SETTINGS) == []
    assert kin.families(texts(ALIKE[:2], sections=[0, 1]), SETTINGS) == []


def test_families_have_limits() -> None:
    assert kin.families(texts(ALIKE), SETTINGS) == [("summary", [0, 1, 2])]
    few = replace(SETTINGS, max_related_memories=2)
    assert [len(members) for _, members in kin.families(texts(ALIKE), few)] == [2]
    many = replace(SETTINGS, min_related_memories=4)
    assert kin.families(texts(ALIKE), many) == []
    near = replace(SETTINGS, window_h=1.0)
    assert kin.families(texts(ALIKE, at_s=[0.0, 3600.0, 3601.0]), near) == [("summary", [1, 2])]
    alike = replace(SETTINGS, similarity_threshold=0.99)
    assert kin.families(texts(ALIKE), alike) == []


def test_a_family_has_no_more_text_than_two_memories_usually_have() -> None:
    assert kin.families(texts(ALIKE, chars=[150, 150, 150]), SETTINGS) == [("summary", [1, 2])]
    assert kin.families(texts(ALIKE, chars=[400, 400, 100], usual_chars=300.0), SETTINGS) == [("summary", [1, 2])]
    assert kin.families(texts(ALIKE[:2], chars=[400, 400], usual_chars=400.0), SETTINGS) == [("summary", [0, 1])]


def test_duplicates_are_one_family_and_count_as_one_memory() -> None:
    vectors = unit_rows([1, 0], [1, 0.001], [1, 0.6], [1, 0.001], [1, 0.002], [0, 1])
    assert kin.families(texts(vectors), SETTINGS) == [("summary", [0, 1, 2, 3, 4])]
    far = unit_rows([1, 0], [1, 0.001], [0, 1])
    assert kin.families(texts(far), SETTINGS) == [("duplicates", [0, 1])]


def test_equal_words_are_duplicates_whatever_the_vectors() -> None:
    assert kin.normalised("The  Door-code is: 4711!") == kin.normalised("the door code IS 4711")
    assert kin.normalised("Strasse") == kin.normalised("STRASSE") == kin.normalised("straße")
    assert kin.families(texts(None, ["a b", "c", "a b", ""]), SETTINGS) == [("duplicates", [0, 2])]
    zeros = np.zeros((3, 2), np.float32)
    assert kin.families(texts(zeros, ["a", "a", "b"]), SETTINGS) == [("duplicates", [0, 1])]
    # Texts without a word say nothing that could be equal.
    assert kin.families(texts(None, ["", ""]), SETTINGS) == []


def test_copies_are_folded_by_fifty() -> None:
    sizes = [len(members) for _, members in kin.families(texts(None, ["same"] * 120), SETTINGS)]
    assert sizes == [50, 50, 20]
    same = unit_rows(*[[1, 0]] * 120)
    assert all(len(members) <= 50 for _, members in kin.families(texts(same), SETTINGS))


def test_kin_by_relationship() -> None:
    vectors = unit_rows([1, 0], [0, 1], [1, 0.3], [1, 0.1], [1, 0.2])
    assert kin.around(texts(vectors), SETTINGS) == [0, 3, 4]
    assert kin.around(texts(vectors, chars=[100, 1, 50, 200, 50]), SETTINGS) == [0, 3]
    assert kin.around(texts(vectors, chars=[200, 1, 50, 150, 50]), SETTINGS) == [0, 2, 4]
    assert kin.around(texts(None, ["a", "b"]), SETTINGS) == [0]


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_families_are_disjoint_and_within_their_limits(count: int, seed: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    settings = replace(SETTINGS, max_related_memories=most, duplicate_similarity=1.0)
    found = texts(
        unit_rows(*(rng.normal(size=(count, 3)) + 1.0)),
        chars=rng.integers(1, 200, count).tolist(),
        at_s=np.sort(rng.uniform(0, 1e6, count)).tolist(),
        sections=np.sort(rng.integers(0, 4, count)).tolist(),
    )
    made = kin.families(found, settings)
    members = [at for _, family in made for at in family]
    assert len(set(members)) == len(members)
    for _, family in made:
        assert family == list(range(family[0], family[-1] + 1))
        assert 2 <= len(family) <= most
        assert found.at_s[family[-1]] - found.at_s[family[0]] <= settings.window_h * 3600.0
        assert sum(found.chars[at] for at in family) <= 300
        assert found.sections[family[0]] == found.sections[family[-1]]
    # What was left alone stays alone once the families are gone.
    left = [at for at in range(count) if at not in members]
    gone_before = [sum(other < at for other in members) for at in left]
    if left:
        again = kin.Texts(
            normalised=[found.normalised[at] for at in left],
            chars=[found.chars[at] for at in left],
            at_s=[found.at_s[at] for at in left],
            vectors=found.vectors[left] if found.vectors is not None else None,
            sections=[found.sections[at] + 100 * before for at, before in zip(left, gone_before, strict=True)],
            usual_chars=100.0,
        )
        assert kin.families(again, settings) == []


# -- fields -----------------------------------------------------------------------------------------------------------


def test_what_may_be_merged() -> None:
    assert rules.may_merge(LIFECYCLE, memory(), NOW_S)
    others: list[dict[str, Any]] = [
        {"state": "archived", "archived_at": NOW_S - 1},
        {"expires_at": NOW_S + 1e6},
        {"memory_type": "consolidated"},
        {"memory_type": "session"},
        {"tier_since": NOW_S - DAY_S},
        {"importance": 1.0, "importance_at": NOW_S - 2 * DAY_S},
        {"importance": 0.05},
    ]
    assert [rules.may_merge(LIFECYCLE, memory(**fields), NOW_S) for fields in others] == [False] * len(others)


def test_fields_of_a_merged_memory() -> None:
    originals = [
        memory(2, importance=0.4, importance_at=NOW_S, access_count=3, last_accessed_at=5.0, occurred_at=70.0),
        memory(1, importance=0.5, importance_at=NOW_S, memory_tier="medium", session_id="s", occurred_at=50.0),
        memory(3, importance=0.1, importance_at=NOW_S, last_accessed_at=9.0, session_id="s", occurred_at=90.0),
    ]
    fields = rules.merged(LIFECYCLE, originals, "summary", NOW_S)
    assert fields.memory_tier == "long"
    assert fields.importance == pytest.approx(1.0 - 0.6 * 0.5 * 0.9)
    assert (fields.access_count, fields.last_accessed_at, fields.occurred_at) == (3, 9.0, 50.0)
    assert (fields.session_id, fields.parent_id, fields.user_id) == (None, None, None)
    assert fields.metadata == {"consolidation": {"kind": "summary", "count": 3, "first_at": 50.0, "last_at": 90.0}}


@given(st.lists(st.floats(0, 1), min_size=2, max_size=20))
def test_importance_together_is_no_less_than_any(importances: list[float]) -> None:
    originals = [memory(at, importance=each, importance_at=NOW_S) for at, each in enumerate(importances)]
    together = rules.merged(LIFECYCLE, originals, "summary", NOW_S).importance
    assert max(importances) <= together <= 1.0


def test_the_highest_tier_stays() -> None:
    assert rules.merged(LIFECYCLE, [memory(memory_tier="long")] * 2, "summary", NOW_S).memory_tier == "long"


def test_metadata_and_tags_are_merged() -> None:
    originals = [
        memory(1, metadata={"a": 1, "b": [1, 2], "c": {"x": 1}, "d": True, "consolidation": "old"}, tags=["t", "u"]),
        memory(2, metadata={"a": 1, "b": [3], "c": {"x": 2}, "d": 1, "e": None}, tags=["v", "t"]),
    ]
    found = rules.metadata_of(originals, "duplicates")
    assert found.pop("consolidation")["kind"] == "duplicates"
    assert found == {"a": 1, "b": [1, 2, 3], "c": [], "d": [True, 1], "e": None}
    assert [type(value) for value in found["d"]] == [bool, int]
    assert rules.tags_of(originals) == ["t", "u", "v"]
    many = [memory(at, tags=[f"{at}-{n}" for n in range(40)]) for at in range(2)]
    assert len(rules.tags_of(many)) == MAX_TAGS


def test_metadata_stays_within_its_limit() -> None:
    originals = [memory(at, metadata={"small": at, "large": "ä" * 10_000 + str(at)}) for at in range(3)]
    found = rules.metadata_of(originals, "summary")
    assert len(json.dumps(found, ensure_ascii=False).encode()) <= MAX_METADATA_BYTES
    assert found.keys() == {"small", "consolidation"}


# -- plans and summarisers --------------------------------------------------------------------------------------------


def test_who_says_it_is_told_where_the_speaker_changes() -> None:
    pieces = [(1, "Ada: One."), (1, "Ada: Two."), (2, "Bob: Three."), (3, "Four."), (1, "Ada: Five.")]
    assert compose(pieces) == "Ada: One. Two. Bob: Three. Four. Ada: Five."
    assert compose([pieces[1]]) == "Ada: Two."


def plan(**fields: Any) -> Plan:
    originals = (memory(1), memory(2))
    values: dict[str, Any] = {
        "kind": "summary",
        "namespace": "default",
        "as_of_s": NOW_S,
        "originals": originals,
        "content": "both",
        "pieces": ((1, "both"),),
        "summariser": "extractive",
        "fields": rules.merged(LIFECYCLE, originals, "summary", NOW_S),
    }
    return Plan(**(values | fields))


def test_a_digest_stands_for_the_whole_plan() -> None:
    one = plan()
    assert one.digest == plan().digest
    assert len(one.digest) == 16
    others = [
        plan(content="other"),
        plan(kind="duplicates"),
        plan(as_of_s=NOW_S + 1),
        plan(originals=(memory(1), memory(3))),
        plan(originals=(memory(1), memory(2, version=2))),
        plan(fields=msgspec.structs.replace(one.fields, tags=["t"])),
    ]
    assert len({each.digest for each in [one, *others]}) == len(others) + 1
    assert one.as_dict()["members"] == ["mem-1", "mem-2"]
    assert json.dumps(one.as_dict())


async def embed(found: Sequence[str]) -> Any:
    return unit_rows(*([1.0, 0.01 * len(text)] for text in found))


ORIGINALS = [
    Original("mem-1", "Ada: The tomatoes are ripe. Shall I pick them?", 1.0),
    Original("mem-2", "They are very good this year.", 2.0),
]


def test_the_extractive_summary_tells_where_it_is_from() -> None:
    async def scattered(found: Sequence[str]) -> Any:
        return unit_rows(*np.eye(len(found)))

    pieces = asyncio.run(extractive(ORIGINALS, 1000, scattered))
    assert pieces == [
        (0, "Ada: The tomatoes are ripe."),
        (0, "Ada: Shall I pick them?"),
        (1, "They are very good this year."),
    ]
    assert [source for source, _ in asyncio.run(extractive(ORIGINALS, 60, scattered))] == [0, 1]


def test_a_summary_is_checked() -> None:
    def made(result: Any) -> Any:
        return asyncio.run(summarise(lambda *_: result, ORIGINALS, 100, embed))

    assert made(" a text ") == ("a text", None)
    assert made([(0, " one "), (1, "two")]) == ("", [(0, "one"), (1, "two")])
    for wrong in ("", " ", "nul\x00", [], [(2, "x")], [(-1, "x")], [(0, "")], [(0, 5)], None, [("x", "y")]):
        with pytest.raises((ValueError, TypeError)):
            made(wrong)


def test_summarisers_are_loaded_by_name() -> None:
    assert load("extractive") is extractive
    assert load(f"{__name__}:embed") is embed
    for name in ("nowhere_at_all:x", f"{__name__}:nothing", f"{__name__}:ORIGINALS"):
        with pytest.raises(ConfigError):
            load(name)
