#!/usr/bin/env python3
"""Takes a backup of the store, while the service runs or not.

    backup.py [--dry-run]

The running service is asked for it; when none answers and none has the store open, the backup is taken here. Either
way it goes to backup.dir, and what backup.keep and backup.keep_days no longer hold is removed. Exit status: 0 done,
1 failed, 2 wrong arguments or configuration.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from output import put
from transfer import INTERRUPTED, add_service_options, answers, bar, endpoint_of, fail, make_client

from memory_system.errors import ConfigError, MemorySystemError, StorageFailed
from memory_system.settings import Settings, load_settings
from memory_system.storage import backup
from memory_system.storage.database import StoreLock

PROGRAM: Final = "backup"
_LONGEST_MS: Final = 12 * 3_600_000.0
_LOOK_S: Final = 0.3

Found = Mapping[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Takes a backup of the store.")
    parser.add_argument("--dry-run", action="store_true", help="show what it would need and remove")
    add_service_options(parser)
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config)
        endpoint = endpoint_of(settings, options.endpoint)
        found = take(settings, endpoint, options.dry_run)
    except ConfigError as error:
        return fail(PROGRAM, error.message, 2)
    except MemorySystemError as error:
        return fail(PROGRAM, error.message, 1)
    except KeyboardInterrupt:
        return fail(PROGRAM, "interrupted; a running service completes the backup all the same", INTERRUPTED)
    put(told(found, options.dry_run))
    return 0


def take(settings: Settings, endpoint: str, dry_run: bool) -> Found:
    """By the running service, or here where none runs. Raises MemorySystemError."""
    return asked(settings, endpoint, dry_run) if answers(settings, endpoint) else taken_here(settings, dry_run)


def asked(settings: Settings, endpoint: str, dry_run: bool) -> Found:
    """The reply of the running service. Raises MemorySystemError."""
    with (
        make_client(settings, endpoint, timeout_ms=_LONGEST_MS) as client,
        make_client(settings, endpoint) as onlooker,
        ThreadPoolExecutor(1) as executor,
        bar("backing up") as advance,
    ):
        reply = executor.submit(client.call, "backup", {"dry_run": dry_run})
        try:
            while not reply.done():
                time.sleep(_LOOK_S)
                runs = onlooker.call("list_runs", {"job": "backup", "run_state": "running", "limit": 1})["results"]
                for progress in (run["progress"] for run in runs if run.get("progress", {}).get("total")):
                    advance(progress["done"], progress["total"], "")
        except BaseException:
            client.close()  # so that nobody waits for the reply
            raise
        return reply.result()


def taken_here(settings: Settings, dry_run: bool) -> Found:
    """A backup of a store that no service has open. Raises MemorySystemError."""
    store, folder = Path(settings.storage.path), backup.folder_of(settings)
    kept = (settings.backup.keep, settings.backup.keep_days)
    now_s = time.time()
    if not store.exists():
        raise StorageFailed(f"there is no store {store}")
    try:
        lock = StoreLock(store)
    except StorageFailed as error:
        raise StorageFailed(f"no service answers, but {error.message.partition(';')[0]}") from None
    try:
        if dry_run:
            return backup.plan(store, folder, *kept, now_s)
        made, contents = backup.back_up(store, folder, now_s)
        removed = backup.rotate(folder, store, *kept, now_s)
    finally:
        lock.release()
    return {
        "path": str(made.path),
        "size_bytes": made.size_bytes,
        "contents": contents.counts(),
        "removed": removed,
    }


def told(found: Found, dry_run: bool) -> str:
    going = "".join(f"\n{'would remove' if dry_run else 'removed'} {name}" for name in found["removed"])
    if dry_run:
        free = found["free_bytes"]
        room = "" if free is None else f" of {free / 2**20:,.1f} MiB free"
        return f"would write {found['path']}: about {found['needed_bytes'] / 2**20:,.1f} MiB{room}{going}"
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in found["contents"].items())
    return f"{found['path']}: {found['size_bytes'] / 2**20:,.1f} MiB, {counts}{going}"


if __name__ == "__main__":
    sys.exit(main())
