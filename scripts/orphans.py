"""Programs that outlived their supervisord: finding them and ending them.

A killed supervisord leaves its programs running, where nothing starts or stops them any more. Each is known by what
supervisord gave it: its name, and the folder of the run-time files.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervision import POLL_S, RunDir, is_alive

TERM_S: Final = 10.0
_NAME: Final = "SUPERVISOR_PROCESS_NAME"
_RUN_DIR: Final = "MEMORY_RUN_DIR"


@dataclass(frozen=True, slots=True)
class Orphan:
    name: str
    pid: int


def find(run: RunDir) -> list[Orphan]:
    """The programs of this run folder, by /proc; empty on a system without. Asked when no supervisord answers."""
    return sorted(filter(None, (_orphan(folder, run.path) for folder in _processes())), key=lambda each: each.pid)


def end(orphans: Iterable[Orphan]) -> None:
    """SIGTERM, so that they finish what they accepted; after TERM_S SIGKILL. Returns when they are gone."""
    left = list(orphans)
    for number, patience_s in ((signal.SIGTERM, TERM_S), (signal.SIGKILL, TERM_S)):
        for each in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, number)
        deadline_s = time.monotonic() + patience_s
        while (left := [each for each in left if is_alive(each.pid)]) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)


def _processes() -> list[Path]:
    try:
        return [folder for folder in Path("/proc").iterdir() if folder.name.isdigit()]
    except OSError:
        return []


def _orphan(folder: Path, run_path: Path) -> Orphan | None:
    try:
        pairs = (folder / "environ").read_bytes().split(b"\0")
        command = (folder / "cmdline").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile, or somebody else's
        return None
    environ = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
    # What a program starts itself, such as the embedding worker, inherits all this and ends with it.
    is_program = len(command) > 1 and command[1].endswith(b".py") and _NAME.encode() in environ
    if not is_program or environ.get(_RUN_DIR.encode()) != os.fsencode(run_path):
        return None
    return Orphan(environ[_NAME.encode()].decode("utf-8", "replace"), int(folder.name))
