#!/usr/bin/env python3
"""Writes all memories to a file, one JSON object a line, with all that belongs to them.

    export_memories.py FILE [--namespace NAME] [--vectors]

The file is one state of the store, however much is written meanwhile, and appears when it is whole. docs/backup.md
describes its lines. Exit status: 0 done, 1 failed, 2 wrong arguments or configuration.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import msgspec
from output import put
from transfer import INTERRUPTED, Advance, add_service_options, bar, endpoint_of, fail, reached

from memory_client import MemoryClient
from memory_system.errors import ConfigError, InvalidCursor, MemorySystemError
from memory_system.export_models import FORMAT, FORMAT_VERSION
from memory_system.settings import load_settings
from memory_system.storage.backup import publish

PROGRAM: Final = "export_memories"
_PAGE: Final = 500
_ATTEMPTS: Final = 3

_encode = msgspec.json.Encoder().encode
Reply = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Writes all memories to a file of JSON lines.")
    parser.add_argument("file", type=Path, help="the file to write; one that is there is replaced at the end")
    parser.add_argument("--namespace", metavar="NAME", help="this one alone (default: all)")
    parser.add_argument("--vectors", action="store_true", help="with the vectors, which can be made again")
    add_service_options(parser)
    options = parser.parse_args(arguments)
    if not options.file.name:
        parser.error("FILE is missing: make export TO=file.jsonl")
    try:
        settings = load_settings(options.config)
        endpoint = endpoint_of(settings, options.endpoint)
        with reached(settings, endpoint, options.namespace or "default") as client, bar("exporting") as advance:
            asked = {"all_namespaces": options.namespace is None, "vectors": options.vectors, "limit": _PAGE}
            written = export(client, asked, options.file, advance)
    except ConfigError as error:
        return fail(PROGRAM, error.message, 2)
    except MemorySystemError as error:
        return fail(PROGRAM, error.message, 1)
    except OSError as error:
        return fail(PROGRAM, f"{error.filename or options.file}: {error.strerror}", 1)
    except KeyboardInterrupt:
        return fail(PROGRAM, f"interrupted; {options.file} is as it was", INTERRUPTED)
    counts = ", ".join(f"{count} {kind}" for kind, count in written.items()) or "nothing"
    put(f"{options.file}: {counts}")
    return 0


def export(client: MemoryClient, asked: dict[str, Any], target: Path, advance: Advance) -> Counter[str]:
    """Write the file; how many lines it has of each kind. Raises MemorySystemError, OSError."""
    partial = target.with_name(target.name + ".partial")
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                with open(os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o600), "wb") as file:
                    written = write(client, asked, file, advance)
                break
            except InvalidCursor:  # the service was started anew, and the state that was read is gone
                if attempt == _ATTEMPTS:
                    raise
        publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return written


def write(client: MemoryClient, asked: dict[str, Any], file: BinaryIO, advance: Advance) -> Counter[str]:
    written, total = Counter[str](), 0
    for page in pages(client, asked):
        if "totals" in page:
            total = sum(page["totals"].values())
            file.write(_encode(head(page)) + b"\n")
        for line in page["results"]:
            file.write(_encode(line) + b"\n")
            written[line["kind"]] += 1
        advance(written.total(), total, "")
    file.write(_encode({"kind": "end", "lines": written.total()}) + b"\n")
    file.flush()
    os.fsync(file.fileno())
    return written


def head(first: Reply) -> dict[str, Any]:
    as_of = datetime.fromtimestamp(first["as_of"], UTC).isoformat(timespec="milliseconds")
    return {
        "kind": "header",
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "exported_at": as_of,
        "totals": first["totals"],
    }


def pages(client: MemoryClient, asked: dict[str, Any]) -> Iterator[Reply]:
    reply = client.call("export_memories", asked)
    yield reply
    while "next_cursor" in reply:
        reply = client.call("export_memories", {**asked, "cursor": reply["next_cursor"]})
        yield reply


if __name__ == "__main__":
    sys.exit(main())
