"""Files of a derived index on disk, named by a manifest that carries their digests and one of its own.

Files are written first, synced, and then named by the manifest in one rename: a crash leaves the old set or the new
one. Nothing is handed out that is not, byte for byte, what was written.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class SnapshotRefused(Exception):
    """The snapshot cannot be used; the message says why."""


def publish(path: Path, body: Mapping[str, Any], written: Iterable[Path]) -> None:
    """Make `body` the manifest at `path`, once the files just written are on disk. Raises OSError."""
    temporary = path.with_name(f"{path.stem}-{secrets.token_hex(4)}.tmp")
    temporary.write_text(json.dumps({**body, "digest": digest_of(body)}))
    for file in (*written, temporary):
        sync(file)
    os.replace(temporary, path)
    sync(path.parent)


def read(path: Path) -> dict[str, Any]:
    """The manifest. Raises SnapshotRefused when there is none, or it is damaged."""
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SnapshotRefused("there is none") from error
    except (OSError, ValueError, RecursionError) as error:
        raise SnapshotRefused(f"its manifest cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("digest", None) != digest_of(manifest):
        raise SnapshotRefused("its manifest is damaged")
    return manifest


def check(manifest: Mapping[str, Any], expected: Mapping[str, Any], max_seq: int) -> None:
    """Raise SnapshotRefused unless the manifest has what is expected and is of a state up to `max_seq`."""
    for key, value in expected.items():
        if manifest.get(key) != value:
            raise SnapshotRefused(f"it has another {key}")
    if not 0 <= whole(manifest, "seq") <= max_seq:
        raise SnapshotRefused("it is newer than the database")


def whole(manifest: Mapping[str, Any], key: str) -> int:
    value = manifest.get(key)
    return value if isinstance(value, int) else -1


def hasher() -> hashlib.blake2b:
    """The digest that a manifest gives of a file, to be fed."""
    return hashlib.blake2b(digest_size=32)


def describe(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, hasher).hexdigest()
    return {"size": path.stat().st_size, "blake2b": digest}


def describe_bytes(data: bytes | bytearray) -> dict[str, Any]:
    """The same of what is, or is to be, in a file."""
    digest = hasher()
    digest.update(data)
    return {"size": len(data), "blake2b": digest.hexdigest()}


def digest_of(body: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(body, sort_keys=True).encode(), digest_size=16).hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_others(folder: Path, patterns: Iterable[str], keep: set[str]) -> None:
    """Remove what earlier or interrupted snapshots left; only names of these patterns."""
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.name not in keep:
                path.unlink(missing_ok=True)
