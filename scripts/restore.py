#!/usr/bin/env python3
"""Puts a backup in the place of the store.

    restore.py FILE      (or `latest`: the newest backup in backup.dir)

Without FILE it lists the backups. Refuses while an orchestrator has the store open; checks the backup before anything
is touched; keeps the replaced store beside the new one. Killed at any moment, it leaves the one store or the other,
and can be run again. Exit status: 0 done, 1 refused or failed, 2 wrong arguments or configuration.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from output import put

from memory_system.errors import ConfigError, MemorySystemError
from memory_system.settings import load_settings
from memory_system.storage.backup import Backup, backups, folder_of
from memory_system.storage.restore import Restored, restore

LATEST: Final = "latest"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Puts a backup in the place of the store.")
    parser.add_argument("file", nargs="?", help=f"the backup, or `{LATEST}`; without it the backups are listed")
    parser.add_argument("--config", metavar="FILE", help="YAML file laid over the defaults (else MEMORY_CONFIG)")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config)
    except ConfigError as error:
        return fail(error.message, 2)
    store, folder = Path(settings.storage.path), folder_of(settings)
    found = backups(folder, store)
    if not options.file:
        return fail(f"which one? restore.py FILE, or make restore FROM=FILE\n{listed(found, folder)}", 2)
    if options.file == LATEST and not found:
        return fail(f"there is no backup in {folder}", 1)
    source = found[0].path if options.file == LATEST else Path(options.file).expanduser().absolute()
    try:
        done = restore(source, store, time.time(), put)
    except MemorySystemError as error:
        return fail(error.message, 1)
    put(told(done, source, store))
    return 0


def listed(found: Sequence[Backup], folder: Path) -> str:
    if not found:
        return f"there is no backup in {folder}"
    lines = (
        f"{datetime.fromtimestamp(each.taken_at_s):%Y-%m-%d %H:%M:%S}  {each.size_bytes / 2**20:9.1f} MiB  {each.path}"
        for each in found
    )
    return "\n".join(("backups, newest first:", *lines))


def told(done: Restored, source: Path, store: Path) -> str:
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in done.contents.counts().items())
    kept = f"\nthe replaced store is {done.kept}; remove it when it is not needed" if done.kept else ""
    return f"{store} holds what {source} holds: {counts}{kept}\nstart the service again (make start-pc2)"


def fail(text: str, status: int) -> int:
    sys.stderr.write(f"restore: {text}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
