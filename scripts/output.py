"""Writing for a reader that may have seen enough, as in `make status | head -1`."""

from __future__ import annotations

import os
import sys


def put(text: str) -> None:
    """Print a text; once whoever reads it has gone, nothing more: the work, and its exit status, stay as they are."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard()


def discard() -> None:
    """Nobody reads any more. What is still buffered must not fail once more at the end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
