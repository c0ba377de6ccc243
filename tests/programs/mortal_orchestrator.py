"""An orchestrator whose authenticator dies at the next connection, and is not started again, while there is a file at
the path in MORTAL_FLAG."""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import orchestrator
from memory_system.errors import CannotStart
from memory_system.security.authenticator import Authenticator

FLAG = Path(os.environ["MORTAL_FLAG"])

_answer, _start = Authenticator._answer, Authenticator.start


def answer(self: Authenticator, frames: list[bytes]) -> list[bytes]:
    if FLAG.exists():
        raise SystemExit
    return _answer(self, frames)


def start(self: Authenticator) -> None:
    if FLAG.exists():
        raise CannotStart("not while the file is there")
    _start(self)


Authenticator._answer = answer  # type: ignore[method-assign]
Authenticator.start = start  # type: ignore[method-assign]

if __name__ == "__main__":
    sys.exit(orchestrator.main())
