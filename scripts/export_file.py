"""An exported file, read line by line: checked as a whole first, then handed on in batches."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

from memory_system.decoding import JSON
from memory_system.errors import InvalidField, InvalidRequest, MemorySystemError
from memory_system.export_models import (
    FORMAT,
    FORMAT_VERSION,
    GroupLine,
    MemberLine,
    ParentLine,
    RelationshipLine,
)
from memory_system.line_reader import ConsolidationItem, HistoryItem, Item, MemoryItem, kind_of, read_line

DEFAULT_NAMESPACE: Final = "default"
# About ten milliseconds of work for the store, so that the requests of others have their turn between two of ours.
BATCH_LINES: Final = 50
BATCH_BYTES: Final = 1024 * 1024
MAX_LINE_BYTES: Final = 4 * 1024 * 1024
_ADVANCE_LINES: Final = 500

Advance = Callable[[float, float | None, str], None]


@dataclass(frozen=True, slots=True)
class Needed:
    """What a line names and the file does not have: it has to be in the store."""

    number: int
    field: str
    namespace: str
    name: str
    is_group: bool = False


@dataclass(frozen=True, slots=True)
class Batch:
    """Lines of one namespace. `numbers`: where each stands in the file; `done_bytes`: where the batch ends."""

    namespace: str
    records: list[dict[str, Any]]
    numbers: list[int]
    done_bytes: int


class ExportFile:
    """`namespace`: where everything is to go; None: where each line says, else `default`."""

    def __init__(self, path: Path, namespace: str | None) -> None:
        self.path = path
        self.size_bytes = path.stat().st_size
        self._namespace = namespace

    def check(self, advance: Advance) -> list[Needed]:
        """Read the whole file; what has to be in the store. Raises InvalidField naming line and field, OSError."""
        seen = _Seen(self)
        count, begun, ended_at = 0, False, 0
        for number, raw, end in self._lines():
            if ended_at:
                raise self.error(number, "kind", f"nothing stands below the end, which is line {ended_at}")
            kind = self._kind(number, raw)
            if not begun:
                self._check_head(number, raw, kind)
                begun = True
            elif kind == "end":
                ended_at = number
                self._check_end(number, raw, count)
            else:
                count += 1
                namespace, body = self._target(number, raw)
                try:
                    item, _ = read_line(JSON, body, namespace)
                except MemorySystemError as error:
                    raise self.refused(number, error) from None
                seen.note(number, namespace, item)
            if number % _ADVANCE_LINES == 0:
                advance(end, self.size_bytes, "")
        if not begun:
            raise self.error(1, "format", "this is no export: it is empty")
        if not ended_at:
            raise self.error(count + 2, "kind", "the file stops before its end: the line of kind end is missing")
        return seen.needed()

    def batches(self) -> Iterator[Batch]:
        """The lines of a checked file, in order."""
        namespace, records, numbers, size = "", list[dict[str, Any]](), list[int](), 0
        done = 0
        for number, raw, end in self._lines():
            if self._kind(number, raw) in ("header", "end"):
                continue
            target, body = self._target(number, raw)
            is_full = len(records) >= BATCH_LINES or size + len(body) > BATCH_BYTES
            if records and (target != namespace or is_full):
                yield Batch(namespace, records, numbers, done)
                records, numbers, size = [], [], 0
            namespace, done = target, end
            records.append(json.loads(body))
            numbers.append(number)
            size += len(body)
        if records:
            yield Batch(namespace, records, numbers, done)

    def error(self, number: int, name: str, text: str) -> InvalidField:
        return InvalidField(name, f"{self.path}, line {number}: {text}", line=number)

    def refused(self, number: int, error: MemorySystemError) -> InvalidField:
        """The error of one line, with the line that it is about."""
        name = error.field if isinstance(error, InvalidField) else ""
        if isinstance(error, InvalidRequest) or name == "data":
            return self.error(number, name, f"this is no JSON object ({error.message.rpartition(': ')[2]})")
        return self.error(number, name, error.message)

    def dangling(self, needed: Needed) -> InvalidField:
        what = "context group" if needed.is_group else "memory"
        text = f"{needed.field}: no {what} {needed.name} above in the file, and none in the store"
        return self.error(needed.number, needed.field, text)

    def _lines(self) -> Iterator[tuple[int, bytes, int]]:
        """Number, text and end of each line that is not empty."""
        with self.path.open("rb") as file:
            end = 0
            for number, raw in enumerate(_bounded(file), 1):
                end += len(raw)
                if len(raw) > MAX_LINE_BYTES:
                    raise self.error(number, "", f"the line has more than {MAX_LINE_BYTES} bytes")
                if raw.strip():
                    yield number, raw, end

    def _kind(self, number: int, raw: bytes) -> str:
        try:
            return kind_of(JSON, raw).kind
        except MemorySystemError as error:
            raise self.refused(number, error) from None

    def _target(self, number: int, raw: bytes) -> tuple[str, bytes]:
        """Where a line is to go, and the line without the namespace that it came from if that is another."""
        try:
            own = kind_of(JSON, raw).namespace
        except MemorySystemError as error:
            raise self.refused(number, error) from None
        if self._namespace is None or own in (None, self._namespace):
            return self._namespace or own or DEFAULT_NAMESPACE, raw
        line = json.loads(raw)
        del line["namespace"]
        return self._namespace, json.dumps(line, ensure_ascii=False, separators=(",", ":")).encode()

    def _check_head(self, number: int, raw: bytes, kind: str) -> None:
        head = json.loads(raw)
        if kind != "header" or head.get("format") != FORMAT:
            raise self.error(number, "format", f"this is no export: its first line is no header of format {FORMAT}")
        if head.get("version") != FORMAT_VERSION:
            version = head.get("version")
            raise self.error(number, "version", f"version {version} of the format is not known, {FORMAT_VERSION} is")

    def _check_end(self, number: int, raw: bytes, count: int) -> None:
        lines = json.loads(raw).get("lines")
        if lines != count:
            raise self.error(number, "lines", f"lines: the file has {count} lines, its end says {lines}")


def _bounded(file: BinaryIO) -> Iterator[bytes]:
    """Lines, and of one that is far too long as much as shows that."""
    while raw := file.readline(MAX_LINE_BYTES + 1):
        yield raw


class _Seen:
    """What the lines so far have, and what they name."""

    def __init__(self, file: ExportFile) -> None:
        self._file = file
        self._memories: dict[tuple[str, str], int] = {}
        self._groups: dict[tuple[str, str], int] = {}
        self._needed: dict[tuple[str, str, bool], Needed] = {}

    def note(self, number: int, namespace: str, item: Item) -> None:
        """Raises InvalidField for a memory that stands in the file twice."""
        if isinstance(item, MemoryItem):
            self._note_memory(number, namespace, item)
            return
        for field, name in _named(item):
            self._need(number, field, namespace, name)
        if isinstance(item, MemberLine) and (namespace, item.group) not in self._groups:
            self._needed.setdefault(
                (namespace, item.group, True), Needed(number, "group", namespace, item.group, is_group=True)
            )
        if isinstance(item, GroupLine):
            self._groups.setdefault((namespace, item.name), number)

    def needed(self) -> list[Needed]:
        """What has to be in the store. Raises InvalidField for a line that names what stands below it."""
        for each in self._needed.values():
            below = (self._groups if each.is_group else self._memories).get((each.namespace, each.name))
            if below is not None and below > each.number:
                text = f"{each.field}: {each.name} stands below, in line {below}; a line names what stands above it"
                raise self._file.error(each.number, each.field, text)
        return list(self._needed.values())

    def _note_memory(self, number: int, namespace: str, item: MemoryItem) -> None:
        memory = item.memory
        first = self._memories.setdefault((namespace, memory.memory_id), number)
        if first != number:
            raise self._file.error(number, "memory_id", f"memory_id: {memory.memory_id} stands in line {first} already")
        if memory.parent_id is not None and not item.parent_follows:
            self._need(number, "parent_id", namespace, memory.parent_id)

    def _need(self, number: int, field: str, namespace: str, name: str) -> None:
        if (namespace, name) not in self._memories:
            self._needed.setdefault((namespace, name, False), Needed(number, field, namespace, name))


def _named(item: Item) -> list[tuple[str, str]]:
    """The memories that a line names, each with its field."""
    if isinstance(item, HistoryItem | MemberLine):
        return [("memory_id", item.memory_id)]
    if isinstance(item, ParentLine):
        return [("memory_id", item.memory_id), ("parent_id", item.parent_id)]
    if isinstance(item, RelationshipLine):
        return [("source_id", item.source_id), ("target_id", item.target_id)]
    if isinstance(item, ConsolidationItem):
        members = [(f"members[{place}].memory_id", name) for place, name in enumerate(item.members)]
        return [("memory_id", item.memory_id), *members]
    return []
