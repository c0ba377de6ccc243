"""An exported file is checked as a whole: what is wrong is named by line and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import export_file
import pytest
from export_file import BATCH_LINES, ExportFile, Needed

from memory_system.errors import InvalidField

Line = dict[str, Any]

GROUP: Line = {"kind": "group", "name": "people", "created_at": 1.0}
FIRST: Line = {"kind": "memory", "memory_id": "first", "content": "one", "created_at": 1.0}
SECOND: Line = {**FIRST, "memory_id": "second", "parent_id": "first"}
EARLY: Line = {**FIRST, "memory_id": "early", "parent_id": "second", "parent_follows": True}
PARENT: Line = {"kind": "parent", "memory_id": "early", "parent_id": "second"}
RECORD = {"memory_id": "first", "content": "as it was"}
HISTORY: Line = {"kind": "history", "memory_id": "first", "version": 1, "record": RECORD, "replaced_at": 1.0}
ENDS = {"source_id": "first", "target_id": "second"}
TIE: Line = {"kind": "relationship", **ENDS, "relationship_type": "follows", "created_at": 1.0}
MEMBER: Line = {"kind": "member", "group": "people", "memory_id": "first", "added_at": 1.0}
MERGED: Line = {
    **{"kind": "consolidation", "memory_id": "second", "consolidation_kind": "summary", "created_at": 1.0},
    "members": [{"memory_id": "first", "before": {"due_at": None}}],
}
GOOD = [GROUP, FIRST, EARLY, SECOND, PARENT, HISTORY, TIE, MEMBER, MERGED]
HEAD: Line = {"kind": "header", "format": "memory-export", "version": 1}


def write(folder: Path, lines: list[Any], *, head: Any = HEAD, end: Any = None) -> ExportFile:
    every = [head, *lines, {"kind": "end", "lines": len(lines)} if end is None else end]
    file = folder / "file.jsonl"
    file.write_text("".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in every if each))
    return ExportFile(file, None)


def check(file: ExportFile) -> list[Needed]:
    return file.check(lambda done, total, what: None)


def refusal(file: ExportFile) -> str:
    with pytest.raises(InvalidField) as caught:
        check(file)
    message = caught.value.message
    assert message.startswith(f"{file.path}, line {caught.value.details['line']}: ")
    return message.removeprefix(f"{file.path}, ")


def test_a_whole_file_needs_nothing_of_the_store(tmp_path: Path) -> None:
    assert check(write(tmp_path, GOOD)) == []
    assert check(write(tmp_path, [])) == []


def test_what_is_not_in_the_file_has_to_be_in_the_store(tmp_path: Path) -> None:
    lines = [SECOND, {**TIE, "target_id": "third"}, {**MEMBER, "namespace": "other"}]
    assert check(write(tmp_path, lines)) == [
        Needed(2, "parent_id", "default", "first"),
        Needed(3, "target_id", "default", "third"),
        Needed(4, "memory_id", "other", "first"),
        Needed(4, "group", "other", "people", is_group=True),
    ]


WRONG: dict[str, Any] = {
    "line 5: importance: expected float <= 1.0": {**SECOND, "importance": 7},
    "line 5: created_at: expected float, got str": {**SECOND, "created_at": "today"},
    "line 5: created_at is required": {**FIRST, "memory_id": "second", "created_at": None},
    "line 5: unknown field importanse; did you mean importance?": {**SECOND, "importanse": 0.5},
    "line 5: there is no kind 'memori' of line; did you mean memory?": {**SECOND, "kind": "memori"},
    "line 5: memory_id: first stands in line 3 already": FIRST,
    "line 5: metadata has a NUL character in a string": {**SECOND, "metadata": {"a": "\0"}},
    "line 5: this is no JSON object": '{"kind": "memory"',
    "line 5: this is no JSON object ": "[1, 2]",
    "line 5: vector.data is not base64": {**SECOND, "vector": {"model_id": "m", "data": "????"}},
}


@pytest.mark.parametrize("told", WRONG)
def test_a_wrong_line_is_named_with_its_field(tmp_path: Path, told: str) -> None:
    line = WRONG[told]
    if isinstance(line, dict):
        line = {name: value for name, value in line.items() if value is not None}
    assert refusal(write(tmp_path, [*GOOD[:3], line, *GOOD[4:]])).startswith(told)


def test_a_line_names_only_what_stands_above_it(tmp_path: Path) -> None:
    assert "line 2: source_id: first stands below, in line 4" in refusal(write(tmp_path, [TIE, *GOOD[:4]]))
    assert "line 3: group: people stands below, in line 4" in refusal(write(tmp_path, [FIRST, MEMBER, GROUP]))
    assert "line 2: parent_id: first stands below" in refusal(write(tmp_path, [SECOND, FIRST]))


def test_a_file_that_is_cut_off_or_is_something_else_is_refused(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, GOOD, end=" ")).startswith("line 11: the file stops before its end")
    assert refusal(write(tmp_path, GOOD, end={"kind": "end", "lines": 8})) == (
        "line 11: lines: the file has 9 lines, its end says 8"
    )
    assert "nothing stands below the end, which is line 3" in refusal(
        write(tmp_path, [FIRST, {"kind": "end", "lines": 1}, SECOND])
    )
    for head in (FIRST, {**HEAD, "format": "notes"}):
        assert refusal(write(tmp_path, GOOD, head=head)).startswith("line 1: this is no export")
    assert refusal(write(tmp_path, GOOD, head={**HEAD, "version": 2})).startswith("line 1: version 2 of the format")
    assert refusal(write(tmp_path, [], head=" ", end=" ")).startswith("line 1: this is no export")


def test_a_line_without_an_end_fills_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_file, "MAX_LINE_BYTES", 2000)
    file = write(tmp_path, [FIRST, {**SECOND, "content": "x" * 5000}])
    assert refusal(file) == "line 3: the line has more than 2000 bytes"


def test_batches_are_of_one_namespace_and_bounded(tmp_path: Path) -> None:
    names = ["one"] * 3 + ["two"] * (BATCH_LINES + 1) + ["one"]
    lines = [{**FIRST, "memory_id": f"mem-{n}", "namespace": name} for n, name in enumerate(names)]
    file = write(tmp_path, lines)
    assert check(file) == []
    found = list(file.batches())
    assert [(batch.namespace, len(batch.records)) for batch in found] == [
        ("one", 3),
        ("two", BATCH_LINES),
        ("two", 1),
        ("one", 1),
    ]
    assert [line for batch in found for line in batch.records] == lines
    assert [number for batch in found for number in batch.numbers] == list(range(2, len(lines) + 2))
    assert 0 < found[0].done_bytes < found[-1].done_bytes < file.size_bytes


def test_everything_goes_into_the_namespace_that_is_named(tmp_path: Path) -> None:
    file = ExportFile(write(tmp_path, [{**FIRST, "namespace": "one"}, SECOND]).path, "three")
    assert check(file) == []
    (batch,) = file.batches()
    assert batch.namespace == "three"
    assert batch.records == [FIRST, SECOND]
