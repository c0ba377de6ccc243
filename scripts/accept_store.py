#!/usr/bin/env python3
"""Accepts the store as it is, after the service refused to start because acknowledged writes are missing from it.

    accept_store.py

First look for the file that is missing, or restore a backup: what is accepted as missing stays missing. Refuses while
an orchestrator has the store open. Exit status: 0 done or nothing to do, 1 refused or failed, 2 wrong arguments or
configuration.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from output import put

from memory_system.errors import ConfigError, MemorySystemError
from memory_system.settings import load_settings
from memory_system.storage.accept import Accepted, accept


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Accepts a store that lacks acknowledged writes, as it is.")
    parser.add_argument("--config", metavar="FILE", help="YAML file laid over the defaults (else MEMORY_CONFIG)")
    options = parser.parse_args(arguments)
    try:
        settings = load_settings(options.config)
    except ConfigError as error:
        return fail(error.message, 2)
    store = Path(settings.storage.path)
    try:
        put(told(accept(store), store))
    except MemorySystemError as error:
        return fail(error.message, 1)
    return 0


def told(done: Accepted, store: Path) -> str:
    if not done.missing:
        return f"{store} lacks no acknowledged write; nothing was changed"
    what = "the next start makes an empty store" if done.is_gone else "the store is accepted as it is"
    return f"{done.missing} acknowledged writes are given up; {what}\nstart the service again (make start-pc2)"


def fail(text: str, status: int) -> int:
    sys.stderr.write(f"accept-store: {text}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
