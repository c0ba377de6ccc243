"""Segments of the keyword index on disk. A segment never changes, so each is written once, and a save writes new ones
only. What it says of a row counts as far as the database agrees: row id and content digest stand beside each text.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.search import manifest, notes
from memory_system.search.manifest import SnapshotRefused
from memory_system.search.segment import Segment

FORMAT: Final = 1
MANIFEST: Final = "words.json"
_PATTERNS: Final = ("words-*.bin", "words-*.tmp")


@dataclass(frozen=True, slots=True)
class Identity:
    """What the words belong to; a snapshot of any other identity is stale."""

    store_epoch: str
    tokenizer: str
    notes_version: int = notes.VERSION


@dataclass(frozen=True, slots=True)
class Rows:
    """The row and the content digest of each text of a segment; row 0 for one that is gone."""

    row_ids: npt.NDArray[np.int64]
    digests: npt.NDArray[np.void]


def save(folder: Path, segments: Sequence[Segment], rows: Mapping[int, Rows], identity: Identity, seq: int) -> int:
    """Make the snapshot these segments; how many of them had to be written. `rows`: by id() of each that has no file.
    Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    entries, written = [], []
    for segment in segments:
        entry = known.get(segment.file or "")
        if segment.file is not None and entry is None:
            segment.file = None
            raise OSError(f"a file that the snapshot needs is gone from {folder}; the next one has it again")
        if entry is None:
            name = f"words-{secrets.token_hex(8)}.bin"
            entry = {"name": name, **_write(folder / name, segment, rows[id(segment)])}
            written.append((segment, name))
        entries.append(entry)
    body = {"format": FORMAT, **asdict(identity), "seq": seq, "segments": entries}
    manifest.publish(folder / MANIFEST, body, [folder / name for _, name in written])
    for segment, name in written:
        segment.file = name
    manifest.remove_others(folder, _PATTERNS, {entry["name"] for entry in entries})
    return len(written)


def load(folder: Path, identity: Identity, max_seq: int) -> list[tuple[Segment, Rows]]:
    """The verified segments, the oldest first; their texts have no slots yet. Raises SnapshotRefused."""
    body = manifest.read(folder / MANIFEST)
    manifest.check(body, {"format": FORMAT, **asdict(identity)}, max_seq)
    try:
        return [_read(folder, entry) for entry in body["segments"]]
    except (OSError, KeyError, TypeError, ValueError, MemoryError) as error:
        raise SnapshotRefused(f"it cannot be read: {error}") from error


def discard(folder: Path) -> None:
    """Remove the snapshot's files, manifest first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.is_dir():
        manifest.remove_others(folder, _PATTERNS, set())


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    """The segments of the snapshot that is there, as far as it can be told."""
    try:
        body = manifest.read(folder / MANIFEST)
        return {entry["name"]: entry for entry in body["segments"] if (folder / entry["name"]).is_file()}
    except (SnapshotRefused, KeyError, TypeError):
        return {}


def _fields(texts: int, keys: int, postings: int) -> list[tuple[str, Any, int]]:
    """What stands in a segment's file: name, type and number, in this order."""
    return [
        ("keys", "<u8", keys),
        ("starts", "<i8", keys + 1),
        ("row_ids", "<i8", texts),
        ("notes", "<u8", texts),
        ("digests", "V16", texts),
        ("lengths", "<i4", texts),
        ("docs", "<u4", postings),
        ("counts", "u1", postings),
    ]


def _write(path: Path, segment: Segment, rows: Rows) -> dict[str, Any]:
    """Write a segment's file; what the manifest says of it."""
    sizes = {"texts": len(segment), "keys": len(segment.keys), "postings": segment.postings}
    digest, size = manifest.hasher(), 0
    # Straight from the arrays: large writes and digests let go of the interpreter, copies would hold it.
    with path.open("wb", buffering=0) as file:
        for name, dtype, _ in _fields(**sizes):
            owner = rows if name in ("row_ids", "digests") else segment
            data = np.ascontiguousarray(getattr(owner, name), dtype).view(np.uint8).data
            digest.update(data)
            _write_all(file, data)
            size += data.nbytes
    return {**sizes, "size": size, "blake2b": digest.hexdigest()}


def _write_all(file: FileIO, data: memoryview) -> None:
    """A single write to a raw file may take less than all."""
    while data.nbytes:
        data = data[file.write(data) :]


def _read(folder: Path, entry: dict[str, Any]) -> tuple[Segment, Rows]:
    path = folder / Path(str(entry["name"])).name
    data = path.read_bytes()
    if manifest.describe_bytes(data) != {"size": entry["size"], "blake2b": entry["blake2b"]}:
        raise ValueError(f"{path.name} is not what was written")
    parts: dict[str, Any] = {}
    offset = 0
    for name, dtype, count in _fields(*(int(entry[size]) for size in ("texts", "keys", "postings"))):
        parts[name] = np.frombuffer(data, dtype, count, offset)
        offset += parts[name].nbytes
    _check(parts, len(data) - offset)
    rows = Rows(parts.pop("row_ids"), parts.pop("digests"))
    return Segment(**parts, slots=np.full(len(rows.row_ids), -1, np.int32), file=path.name), rows


def _check(parts: dict[str, Any], rest: int) -> None:
    """A file can be whole and still not be what its manifest says."""
    starts, docs = parts["starts"], parts["docs"]
    sound = (
        rest == 0
        and starts[0] == 0
        and starts[-1] == len(docs)
        and bool((np.diff(starts) > 0).all())
        and bool((np.diff(parts["keys"].astype(np.float64)) >= 0).all())
        and int(docs.max(initial=0)) < max(1, len(parts["lengths"]))
        and (len(docs) == 0 or len(parts["lengths"]) > 0)
    )
    if not sound:
        raise ValueError("its parts do not fit each other")
