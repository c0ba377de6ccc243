"""How the C library keeps memory: in few arenas, and what is free of it given back. glibc alone needs either."""

from __future__ import annotations

import ctypes
import os
from typing import Final

# What free memory a thread's arena has is of no use to the others, and up to eight for each core are made.
ARENAS: Final = 2
_M_ARENA_MAX: Final = -8  # see malloc.h
_LIBRARY: Final = ctypes.CDLL(None)
_MALLOPT: Final = getattr(_LIBRARY, "mallopt", None)
_TRIM: Final = getattr(_LIBRARY, "malloc_trim", None)


def use_few_arenas() -> bool:
    """Have the threads that this process makes from now on share ARENAS arenas; whether that was done.

    Not where the C library has no arenas, nor where the environment says how many it is to have.
    """
    chosen = "MALLOC_ARENA_MAX" in os.environ or "malloc.arena_" in os.environ.get("GLIBC_TUNABLES", "")
    return not chosen and _MALLOPT is not None and bool(_MALLOPT(_M_ARENA_MAX, ARENAS))


def give_back() -> None:
    """Have the C library return what was freed to the system; it takes milliseconds, in which arenas are locked."""
    if _TRIM is not None:
        _TRIM(0)
