"""The graph's parts on disk: each is written once, verified before it is loaded, and counts as far as the database
agrees.

hnswlib writes without checksum and trusts what it reads (a flipped header byte is a crash or wrong answers), so the
manifest carries a digest of each file, checked before anything is loaded, and the header is checked on top of it.
The graph is derived: whatever is wrong with a snapshot, the answer is to build it anew.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from memory_system.log import get_logger
from memory_system.search import manifest
from memory_system.search.blocks import Floats
from memory_system.search.graph import Part, empty_graph
from memory_system.search.manifest import SnapshotRefused
from memory_system.search.view import View
from memory_system.settings import SearchSettings

log = get_logger(__name__)

FORMAT: Final = 2
MANIFEST: Final = "manifest.json"
_PATTERNS: Final = ("graph-*.bin", "rows-*.bin", "axes-*.bin", "manifest-*.tmp")
ROWS_DTYPE: Final = np.dtype([("row_id", "<i8"), ("digest", "V16")])
# offsetLevel0, max_elements, count, element size, label offset, data offset, max level, entry point, maxM, maxM0, M,
# mult, ef_construction: hnswlib's HierarchicalNSW::saveIndex.
_HEADER: Final = struct.Struct("<6QiI3QdQ")


@dataclass(frozen=True, slots=True)
class Identity:
    """What a graph belongs to; a snapshot of any other identity is stale."""

    store_epoch: str
    model_id: str
    dimension: int
    hnsw_m: int
    hnsw_ef_construction: int


def restore(folder: Path, view: View, settings: SearchSettings) -> None:
    """Take over the saved parts, row by row as far as they agree with the database."""
    vectors, columns = view.vectors, view.columns
    if vectors is None or vectors.count < settings.graph_from:
        return
    try:
        axes, parts = load(folder, _identity(view, vectors.dimension, settings), view.seq)
    except SnapshotRefused as refusal:
        log.info("search_snapshot_refused", reason=str(refusal), action="the graph is built anew")
        return
    for part in parts:
        slots = columns.lookup(part.row_ids)
        held = slots >= 0
        held[held] = columns.has_vector[slots[held]] & (columns.digests[slots[held]] == part.digests[held])
        part.slots[:] = np.where(held, slots, -1)
    vectors.graph.adopt(axes, parts)
    log.info("search_snapshot_loaded", rows=vectors.graph.count, missing=vectors.count - vectors.graph.count)


def save(folder: Path, view: View, settings: SearchSettings) -> bool:
    """Save the parts that are not on disk, if any changed; whether it was saved. A failure is logged."""
    vectors = view.vectors
    if vectors is None or not vectors.graph.changed or vectors.graph.axes is None:
        return False
    vectors.graph.changed = False
    try:
        parts = list(vectors.graph.parts)
        write(folder, vectors.graph.axes, parts, _identity(view, vectors.dimension, settings), view.seq)
    except (OSError, RuntimeError) as error:
        vectors.graph.changed = True
        log.warning("search_snapshot_failed", reason=str(error))
        return False
    log.info("search_snapshot_saved", rows=sum(map(len, parts)), seq=view.seq)
    return True


def write(folder: Path, axes: Floats, parts: list[Part], identity: Identity, seq: int) -> None:
    """Make the snapshot these parts. Raises OSError, RuntimeError."""
    folder.mkdir(parents=True, exist_ok=True)
    known = _known(folder)
    entries, written = [], []
    for part in parts:
        entry = known.get(part.file or "")
        if entry is None:
            entry = _write_part(folder, part)
            written += [folder / file["name"] for file in entry.values()]
        entries.append(entry)
    of_axes = _described(folder / f"axes-{secrets.token_hex(8)}.bin", axes.astype("<f4").tobytes())
    written.append(folder / of_axes["name"])
    body = {"format": FORMAT, **asdict(identity), "seq": seq, "axes": of_axes, "parts": entries}
    manifest.publish(folder / MANIFEST, body, written)
    names = {entry[kind]["name"] for entry in entries for kind in ("graph", "rows")}
    manifest.remove_others(folder, _PATTERNS, {of_axes["name"], *names})


def load(folder: Path, identity: Identity, max_seq: int) -> tuple[Floats, list[Part]]:
    """The verified axes and parts, whose slots are to be found. Raises SnapshotRefused; never hands hnswlib
    unverified bytes."""
    body = manifest.read(folder / MANIFEST)
    manifest.check(body, {"format": FORMAT, **asdict(identity)}, max_seq)
    try:
        axes = np.frombuffer(_verified(folder, body["axes"]).read_bytes(), "<f4").reshape(identity.dimension, -1)
        return axes, [_part(folder, entry, axes.shape[1], identity) for entry in body["parts"]]
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, MemoryError) as error:
        raise SnapshotRefused(f"it cannot be read: {error}") from error


def discard(folder: Path) -> None:
    """Remove the snapshot's files, manifest first."""
    (folder / MANIFEST).unlink(missing_ok=True)
    if folder.is_dir():
        manifest.remove_others(folder, _PATTERNS, set())


def _write_part(folder: Path, part: Part) -> dict[str, dict[str, Any]]:
    tag = secrets.token_hex(8)
    rows = np.zeros(len(part), ROWS_DTYPE)
    rows["row_id"], rows["digest"] = part.row_ids, part.digests
    path = folder / f"graph-{tag}.bin"
    part.graph.save_index(str(path))
    part.file = path.name
    graph = {"name": path.name, **manifest.describe(path)}
    return {"graph": graph, "rows": _described(folder / f"rows-{tag}.bin", rows.tobytes())}


def _described(path: Path, data: bytes) -> dict[str, Any]:
    """Write a file; what the manifest says of it."""
    path.write_bytes(data)
    return {"name": path.name, **manifest.describe_bytes(data)}


def _identity(view: View, dimension: int, settings: SearchSettings) -> Identity:
    return Identity(view.epoch, view.model_id or "", dimension, settings.hnsw_m, settings.hnsw_ef_construction)


def _known(folder: Path) -> dict[str, dict[str, Any]]:
    """The parts of the snapshot that is there, by the name of the graph's file, as far as it can be told."""
    try:
        entries = manifest.read(folder / MANIFEST)["parts"]
        return {entry["graph"]["name"]: entry for entry in entries if _is_there(folder, entry)}
    except (SnapshotRefused, KeyError, TypeError):
        return {}


def _is_there(folder: Path, entry: dict[str, Any]) -> bool:
    return all((folder / entry[kind]["name"]).is_file() for kind in ("graph", "rows"))


def _part(folder: Path, entry: dict[str, Any], length: int, identity: Identity) -> Part:
    rows = np.frombuffer(_verified(folder, entry["rows"]).read_bytes(), ROWS_DTYPE)
    path = _verified(folder, entry["graph"])
    _check_header(path, length, identity)
    graph = empty_graph(length)
    graph.load_index(str(path))
    if sorted(graph.get_ids_list()) != list(range(len(rows))):
        raise ValueError("its row table is not the graph's")
    return Part(graph, np.full(len(rows), -1, np.int32), rows["row_id"].copy(), rows["digest"].copy(), file=path.name)


def _verified(folder: Path, entry: dict[str, Any]) -> Path:
    path = folder / Path(str(entry["name"])).name
    if manifest.describe(path) != {"size": entry["size"], "blake2b": entry["blake2b"]}:
        raise ValueError(f"{path.name} is not what was written")
    return path


def _check_header(path: Path, length: int, identity: Identity) -> None:
    """A file can be whole and still not be what the manifest says; hnswlib would read past its buffers."""
    with path.open("rb") as file:
        header = file.read(_HEADER.size)
    if len(header) < _HEADER.size:
        raise ValueError("the graph file is too short")
    level0, capacity, count, size, label, data, _, entry, max_m, max_m0, m, _, ef = _HEADER.unpack(header)
    consistent = (
        label - data == 4 * length
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
