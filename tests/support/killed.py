"""Runs a script that kills itself, with SIGKILL, just before its n-th step on the file system.

    python killed.py N FOLDER SCRIPT [ARGUMENT ...]

Steps are what Python tells its audit hooks of files below FOLDER: opening, renaming, linking, removing, and opening of
databases. Less than N steps: the script runs to its end, and its exit status is that of this program.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from typing import Any

STEPS = frozenset(
    {
        "open",
        "os.rename",
        "os.link",
        "os.remove",
        "os.chmod",
        "os.chown",
        "os.rmdir",
        "shutil.rmtree",
        "sqlite3.connect",
    }
)


def main() -> None:
    limit, folder, script = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    sys.argv = sys.argv[3:]
    sys.path.insert(0, os.path.dirname(script))
    steps = 0

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal steps
        if event not in STEPS or not any(folder in os.fsdecode(each) for each in arguments if _is_path(each)):
            return
        steps += 1
        if steps >= limit:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
    runpy.run_path(script, run_name="__main__")


def _is_path(argument: object) -> bool:
    return isinstance(argument, str | bytes | os.PathLike)


if __name__ == "__main__":
    main()
