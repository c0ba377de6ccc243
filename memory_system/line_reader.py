"""Lines of an export, from a request or from a file: checked in full, and turned into what the store keeps."""

from __future__ import annotations

import base64
import binascii
import difflib
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import UNSET, Raw, Struct

from memory_system import protocol
from memory_system.decoding import Encoding, count_values
from memory_system.digest import content_digest
from memory_system.errors import InvalidField
from memory_system.export_models import (
    LINES,
    AnyLine,
    ConsolidationLine,
    GroupLine,
    HistoryLine,
    HistoryRecord,
    MemberLine,
    MemoryLine,
    ParentLine,
    RelationshipLine,
    SessionPart,
    VectorPart,
)
from memory_system.models import Memory
from memory_system.params import Params

SESSION_TYPE: Final = "session"
# A vector's length may differ from 1 by what float32 rounds off.
_UNIT_TOLERANCE: Final = 1e-2
# The limit of metadata is that of its stored form; in a file it may be written with escapes and spaces.
_LONGEST: Final = 6


class MemoryItem(Struct, frozen=True, kw_only=True):
    """A memory to be stored; its row_id and due_at are still to be given. `vector`: model id and float32 bytes."""

    memory: Memory
    parent_follows: bool
    undone_at: float | None
    session: SessionPart | None
    vector: tuple[str, bytes] | None


class HistoryItem(Struct, frozen=True, kw_only=True):
    memory_id: str
    version: int
    record: dict[str, Any]
    replaced_at: float
    replaced_by: str


class ConsolidationItem(Struct, frozen=True, kw_only=True):
    """`members`: memory_id -> the fields that archiving it changed."""

    memory_id: str
    kind: str
    summariser: str
    created_at: float
    pieces: list[tuple[str, str]] | None
    members: dict[str, dict[str, Any]]


Item = MemoryItem | HistoryItem | ConsolidationItem | GroupLine | ParentLine | RelationshipLine | MemberLine


# Fields of a memory that are taken as its line has them.
_AS_THEY_STAND: Final = (
    "memory_id",
    "content",
    "memory_type",
    "memory_tier",
    "importance",
    "access_count",
    "last_accessed_at",
    "created_at",
    "occurred_at",
    "expires_at",
    "parent_id",
    "session_id",
    "user_id",
    "created_by",
    "version",
    "state",
    "tier_accesses",
    "promote_at",
    "owner",
)


def read_line(encoding: Encoding, raw: bytes | Raw, namespace: str, where: str = "") -> tuple[Item, int]:
    """What one line says, and how many values its free-form parts have.

    `namespace`: where it is to go; a line that names another is refused. Raises InvalidField with the path of the
    field below `where`.
    """
    line = _typed(encoding, raw, where)
    if line.namespace not in (None, namespace):
        raise InvalidField(
            _join(where, "namespace"), f"namespace is {line.namespace}, and the import is about {namespace}"
        )
    if isinstance(line, MemoryLine):
        return _memory(encoding, line, namespace, where)
    if isinstance(line, HistoryLine):
        return _history(encoding, line, where)
    if isinstance(line, ConsolidationLine):
        return _consolidation(encoding, line, where)
    return line, 0


def kind_of(encoding: Encoding, raw: bytes | Raw, where: str = "") -> AnyLine:
    """What a line is about. Raises InvalidField."""
    return encoding.decode(AnyLine, raw, where=where)[0]


def _typed(encoding: Encoding, raw: bytes | Raw, where: str) -> Any:
    kind = kind_of(encoding, raw, where).kind
    cls: type[Params] | None = LINES.get(kind)
    if cls is None:
        near = next(iter(difflib.get_close_matches(kind[:80], LINES, n=1)), None)
        hint = f"; did you mean {near}?" if near else f"; there are {', '.join(LINES)}"
        raise InvalidField(_join(where, "kind"), f"there is no kind {kind[:80]!r} of line{hint}")
    return encoding.decode(cls, raw, where=where)[0]


def _memory(encoding: Encoding, line: MemoryLine, namespace: str, where: str) -> tuple[MemoryItem, int]:
    if (line.memory_type == SESSION_TYPE) != (line.session is not None):
        raise InvalidField(
            _join(where, "session"), f"session stands with memories of type {SESSION_TYPE}, and only with them"
        )
    if line.parent_id == line.memory_id:
        raise InvalidField(_join(where, "parent_id"), "parent_id is the memory itself")
    metadata = _metadata(encoding, line.metadata, _join(where, "metadata"))
    item = MemoryItem(
        memory=_stored(line, namespace, metadata),
        parent_follows=line.parent_follows,
        undone_at=line.undone_at,
        session=line.session,
        vector=None if line.vector is None else _vector(line.vector, _join(where, "vector.data")),
    )
    return item, count_values(metadata)


def _stored(line: MemoryLine, namespace: str, metadata: dict[str, Any]) -> Memory:
    updated_at = _or(line.updated_at, line.created_at)
    return Memory(
        **{name: getattr(line, name) for name in _AS_THEY_STAND},
        row_id=0,
        namespace=namespace,
        content_digest=content_digest(line.content),
        importance_at=_or(line.importance_at, line.created_at),
        updated_at=updated_at,
        tier_since=_or(line.tier_since, line.created_at),
        due_at=None,
        metadata=metadata,
        tags=list(dict.fromkeys(line.tags or ())),
        archived_at=_or(line.archived_at, updated_at) if line.state == "archived" else None,
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _history(encoding: Encoding, line: HistoryLine, where: str) -> tuple[HistoryItem, int]:
    record, where = line.record, _join(where, "record")
    if record.memory_id != line.memory_id:
        raise InvalidField(_join(where, "memory_id"), "record.memory_id is another memory's")
    if record.version not in (UNSET, line.version):
        raise InvalidField(_join(where, "version"), "record.version is not the version of the line")
    metadata = _metadata(encoding, record.metadata, _join(where, "metadata"))
    values = {name: getattr(record, name) for name in HistoryRecord.__struct_fields__} | {"metadata": metadata}
    opened = {name: value for name, value in values.items() if value is not UNSET}
    item = HistoryItem(
        memory_id=line.memory_id,
        version=line.version,
        record=opened,
        replaced_at=line.replaced_at,
        replaced_by=line.replaced_by,
    )
    return item, count_values(metadata)


def _consolidation(encoding: Encoding, line: ConsolidationLine, where: str) -> tuple[ConsolidationItem, int]:
    members, values = dict[str, dict[str, Any]](), 0
    for position, member in enumerate(line.members):
        before = _metadata(encoding, member.before, _join(where, f"members[{position}].before"))
        values += count_values(before)
        members[member.memory_id] = before
    for position, (memory_id, _) in enumerate(line.pieces or ()):
        if memory_id not in members:
            path = _join(where, f"pieces[{position}]")
            raise InvalidField(path, f"{path}: {memory_id} is none of the members")
    item = ConsolidationItem(
        memory_id=line.memory_id,
        kind=line.consolidation_kind,
        summariser=line.summariser,
        created_at=line.created_at,
        pieces=line.pieces,
        members=members,
    )
    return item, values


def _metadata(encoding: Encoding, raw: Raw, where: str) -> dict[str, Any]:
    """The opened map, {} when it is absent."""
    value = encoding.free_form(raw, where, _LONGEST * protocol.MAX_METADATA_BYTES)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidField(where, f"{where} is a map, not a {type(value).__name__}")
    if len(msgspec.json.encode(value)) > protocol.MAX_METADATA_BYTES:
        raise InvalidField(where, f"{where} has more than {protocol.MAX_METADATA_BYTES} bytes as JSON")
    return value


def _vector(part: VectorPart, where: str) -> tuple[str, bytes]:
    try:
        data = base64.b64decode(part.data, validate=True)
    except (binascii.Error, ValueError):
        raise InvalidField(where, f"{where} is not base64") from None
    if len(data) % 4:
        raise InvalidField(where, f"{where} has {len(data)} bytes, which are no float32 values")
    values = np.frombuffer(data, "<f4")
    if not np.isfinite(values).all() or abs(float(np.linalg.norm(values)) - 1.0) > _UNIT_TOLERANCE:
        raise InvalidField(where, f"{where} is not a vector of unit length")
    return part.model_id, data


def _join(first: str, second: str) -> str:
    return f"{first}.{second}" if first else second
