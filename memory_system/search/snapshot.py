"""The graph on disk: written so that a crash leaves the old or the new one, read so that damage cannot reach hnswlib.

hnswlib writes without checksum and trusts what it reads (a flipped header byte is a crash or wrong answers), so the
manifest carries a digest of each file, checked before anything is loaded, and the header is checked on top of it.
The graph is derived: whatever is wrong with a snapshot, the answer is to build it anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from memory_system.search.vectors import empty_graph

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
ROWS_DTYPE: Final = np.dtype([("row_id", "<i8"), ("digest", "V16")])
# offsetLevel0, max_elements, count, element size, label offset, data offset, max level, entry point, maxM, maxM0, M,
# mult, ef_construction: hnswlib's HierarchicalNSW::saveIndex.
_HEADER: Final = struct.Struct("<6QiI3QdQ")

Rows = npt.NDArray[np.void]


class SnapshotRefused(Exception):
    """The snapshot cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a graph belongs to; a snapshot of any other identity is stale."""

    store_epoch: str
    model_id: str
    dimension: int
    hnsw_m: int
    hnsw_ef_construction: int


def save(folder: Path, graph: Any, rows: Rows, identity: Identity, seq: int) -> None:
    """Write a snapshot of `graph`, whose live labels and content digests are `rows`. Raises OSError, RuntimeError."""
    folder.mkdir(parents=True, exist_ok=True)
    tag = secrets.token_hex(4)
    files = {"graph": f"graph-{tag}.bin", "rows": f"rows-{tag}.bin"}
    graph.save_index(str(folder / files["graph"]))
    (folder / files["rows"]).write_bytes(rows.tobytes())
    body = {
        "format": FORMAT,
        **asdict(identity),
        "seq": seq,
        "count": len(rows),
        "files": {kind: {"name": name, **_describe(folder / name)} for kind, name in files.items()},
    }
    temporary = folder / f"manifest-{tag}.tmp"
    temporary.write_text(json.dumps({**body, "digest": _body_digest(body)}))
    for path in (*(folder / name for name in files.values()), temporary):
        _sync(path)
    os.replace(temporary, folder / MANIFEST)
    _sync(folder)
    _remove_others(folder, {MANIFEST, *files.values()})


def load(folder: Path, identity: Identity, max_seq: int) -> tuple[Any, Rows]:
    """The verified graph and its rows. Raises SnapshotRefused; never hands hnswlib unverified bytes."""
    manifest = _manifest(folder)
    for key, expected in {"format": FORMAT, **asdict(identity)}.items():
        if manifest.get(key) != expected:
            raise SnapshotRefused(f"it has another {key}")
    if not 0 <= _whole(manifest, "seq") <= max_seq:
        raise SnapshotRefused("it is newer than the database")
    try:
        paths = {kind: _verified(folder, manifest["files"][kind]) for kind in ("graph", "rows")}
        rows = np.frombuffer(paths["rows"].read_bytes(), ROWS_DTYPE)
        _check_header(paths["graph"], identity)
        graph = empty_graph(identity.dimension)
        graph.load_index(str(paths["graph"]))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise SnapshotRefused(f"it cannot be read: {error}") from error
    if len(rows) != _whole(manifest, "count") or not np.isin(rows["row_id"], graph.get_ids_list()).all():
        raise SnapshotRefused("its row table is not the graph's")
    return graph, rows


def discard(folder: Path) -> None:
    """Remove the snapshot's files, manifest first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.is_dir():
        _remove_others(folder, set())


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError as error:
        raise SnapshotRefused("there is none") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SnapshotRefused(f"its manifest cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != _body_digest(manifest):
        raise SnapshotRefused("its manifest is damaged")
    return manifest


def _whole(manifest: dict[str, Any], key: str) -> int:
    value = manifest.get(key)
    return value if isinstance(value, int) else -1


def _verified(folder: Path, entry: dict[str, Any]) -> Path:
    path = folder / Path(str(entry["name"])).name
    if _describe(path) != {"size": entry["size"], "blake2b": entry["blake2b"]}:
        raise ValueError(f"{path.name} is not what was written")
    return path


def _check_header(path: Path, identity: Identity) -> None:
    """A file can be whole and still not be what the manifest says; hnswlib would read past its buffers."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError("the graph file is too short")
    level0, capacity, count, size, label, data, _, entry, max_m, max_m0, m, _, ef = _HEADER.unpack(header)
    consistent = (
        label - data == 4 * identity.dimension
        and size == label + 8
        and level0 == 0
        and count <= capacity
        and (entry < count or count == 0)
        and (m, max_m, max_m0) == (identity.hnsw_m, identity.hnsw_m, 2 * identity.hnsw_m)
        and ef == identity.hnsw_ef_construction
        and path.stat().st_size >= _HEADER.size + count * (size + 4)
    )
    if not consistent:
        raise ValueError("the graph file's header does not fit its manifest")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32)).hexdigest()
    return {"size": path.stat().st_size, "blake2b": digest}


def _body_digest(body: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_others(folder: Path, keep: set[str]) -> None:
    """Remove what earlier or interrupted snapshots left; only names that this module writes."""
    for pattern in ("graph-*.bin", "rows-*.bin", "manifest-*.tmp"):
        for path in folder.glob(pattern):
            if path.name not in keep:
                path.unlink(missing_ok=True)
