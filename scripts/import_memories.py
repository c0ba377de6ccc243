#!/usr/bin/env python3
"""Puts the memories of an exported file into the store, with all that belongs to them.

    import_memories.py FILE [--namespace NAME] [--overwrite] [--dry-run]

The whole file is checked before anything is written. What the store has already is left alone, so an import can be
repeated, and one that was broken off goes on. A memory that is there with other contents is a conflict: it is reported,
and replaced only with --overwrite. Exit status: 0 done, 1 failed, 2 wrong arguments, file or configuration, 3 done but
for conflicts.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from export_file import Batch, ExportFile, Needed
from output import put
from transfer import INTERRUPTED, Advance, add_service_options, bar, endpoint_of, fail, reached

from memory_client import MemoryClient
from memory_system.errors import ConfigError, InvalidField, MemorySystemError
from memory_system.settings import load_settings

PROGRAM: Final = "import_memories"
CONFLICTS: Final = 3
_SHOWN: Final = 20
_LOOKED_UP: Final = 1000


@dataclass
class Outcome:
    """What became of the lines, by kind, and the conflicts in words."""

    counts: dict[str, Counter[str]] = field(
        default_factory=lambda: {name: Counter() for name in ("added", "unchanged", "overwritten", "conflicts")}
    )
    conflicts: list[str] = field(default_factory=list)

    def take(self, reply: dict[str, Any], batch: Batch) -> None:
        for name, counter in self.counts.items():
            counter.update(reply[name])
        for each in reply["results"]:
            fields = ", ".join(each["fields"])
            named = " ".join(str(value) for key, value in each.items() if key not in ("index", "kind", "fields"))
            self.conflicts.append(
                f"line {batch.numbers[each['index']]}: {each['kind']} {named} is there with another {fields}"
            )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Puts the memories of an exported file into the store.")
    parser.add_argument("file", type=Path, help="what export_memories.py wrote")
    parser.add_argument("--namespace", metavar="NAME", help="put everything here (default: where it came from)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there with other contents")
    parser.add_argument("--dry-run", action="store_true", help="change nothing, and show what would be changed")
    add_service_options(parser)
    options = parser.parse_args(arguments)
    if not options.file.name:
        parser.error("FILE is missing: make import FROM=file.jsonl")
    outcome = Outcome()
    try:
        settings = load_settings(options.config)
        endpoint = endpoint_of(settings, options.endpoint)
        file = ExportFile(options.file, options.namespace)
        asked = {"on_conflict": "overwrite" if options.overwrite else "report", "dry_run": options.dry_run}
        with reached(settings, endpoint) as client:
            with bar("checking") as advance:
                look_up(client, file, file.check(advance))
            with bar("importing") as advance:
                send(client, file, asked, advance, outcome)
    except ConfigError as error:
        return fail(PROGRAM, error.message, 2)
    except InvalidField as error:
        return fail(PROGRAM, f"{error.message}\n{told(outcome, options.dry_run)}", 2)
    except MemorySystemError as error:
        return fail(PROGRAM, f"{error.message}\n{told(outcome, options.dry_run)}", 1)
    except OSError as error:
        return fail(PROGRAM, f"{error.filename or options.file}: {error.strerror}", 2)
    except KeyboardInterrupt:
        return fail(PROGRAM, f"interrupted; run it again to go on\n{told(outcome, options.dry_run)}", INTERRUPTED)
    put(told(outcome, options.dry_run))
    return CONFLICTS if outcome.counts["conflicts"] else 0


def look_up(client: MemoryClient, file: ExportFile, needed: list[Needed]) -> None:
    """Raise InvalidField for a line that names what is neither in the file nor in the store."""
    for namespace in dict.fromkeys(each.namespace for each in needed):
        client.namespace = namespace
        wanted = [each for each in needed if each.namespace == namespace]
        memories = [each for each in wanted if not each.is_group]
        for start in range(0, len(memories), _LOOKED_UP):
            some = memories[start : start + _LOOKED_UP]
            reply = client.call("batch_get_memories", {"memory_ids": [each.name for each in some], "touch": False})
            missing = set(reply["missing"])
            for each in some:
                if each.name in missing:
                    raise file.dangling(each)
        groups = [each for each in wanted if each.is_group]
        known = group_names(client) if groups else set()
        for each in groups:
            if each.name not in known:
                raise file.dangling(each)


def group_names(client: MemoryClient) -> set[str]:
    names: set[str] = set()
    reply = client.call("list_context_groups", {"limit": _LOOKED_UP})
    names.update(group["name"] for group in reply["results"])
    while "next_cursor" in reply:
        reply = client.call("list_context_groups", {"limit": _LOOKED_UP, "cursor": reply["next_cursor"]})
        names.update(group["name"] for group in reply["results"])
    return names


def send(client: MemoryClient, file: ExportFile, asked: dict[str, Any], advance: Advance, outcome: Outcome) -> None:
    """Raises InvalidField naming the line, MemorySystemError."""
    for batch in file.batches():
        client.namespace = batch.namespace
        try:
            reply = client.call("import_memories", {"records": batch.records, **asked})
        except MemorySystemError as error:
            index = error.details.get("index")
            if isinstance(index, int):
                raise file.refused(batch.numbers[index], error) from None
            raise
        outcome.take(reply, batch)
        advance(batch.done_bytes, file.size_bytes, "")


def told(outcome: Outcome, dry_run: bool) -> str:
    lines = []
    for name, counter in outcome.counts.items():
        if counter:
            lines.append(f"{name}: {', '.join(f'{count} {kind}' for kind, count in counter.items())}")
    shown = outcome.conflicts[:_SHOWN]
    if len(outcome.conflicts) > len(shown):
        shown.append(f"and {outcome.counts['conflicts'].total() - len(shown)} more")
    nothing = "nothing would be changed" if dry_run else "nothing was changed"
    return "\n".join([*(lines or [nothing]), *shown])


if __name__ == "__main__":
    sys.exit(main())
