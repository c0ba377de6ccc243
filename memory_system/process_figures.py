"""What the system says of this process and of its disk; cheap enough to be asked every second."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import threading
import time
from pathlib import Path
from typing import Final

_DESCRIPTORS: Final = "/proc/self/fd" if sys.platform == "linux" else "/dev/fd"
# Positions in /proc/self/stat after the name of the program, see proc(5).
_THREADS: Final = 17
_RESIDENT_PAGES: Final = 21


def process_figures() -> dict[str, int | float]:
    """`pid`, `memory_bytes` (resident; the peak where the system has no /proc), `open_files`, `open_files_limit`
    (-1: none), `threads` and `cpu_s` (user and system, of all threads)."""
    memory_bytes, threads = _memory_and_threads()
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return {
        "pid": os.getpid(),
        "memory_bytes": memory_bytes,
        "open_files": open_files(),
        "open_files_limit": -1 if limit == resource.RLIM_INFINITY else limit,
        "threads": threads,
        "cpu_s": round(time.process_time(), 3),
    }


def disk_free_bytes(path: Path | str) -> int | None:
    """What a process without privileges may still write to the disk of this file or folder, which need not exist yet;
    None when the system does not tell."""
    place = Path(path).absolute()
    for candidate in (place, *place.parents):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            try:
                disk = os.statvfs(candidate)
            except PermissionError:
                return None
            return disk.f_bavail * disk.f_frsize
    return None


def _memory_and_threads() -> tuple[int, int]:
    try:
        with open("/proc/self/stat", "rb") as file:
            figures = file.read().rpartition(b")")[2].split()
        return int(figures[_RESIDENT_PAGES]) * resource.getpagesize(), int(figures[_THREADS])
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024), threading.active_count()


def open_files() -> int:
    """How many descriptors are open; -1 when the system does not tell, or none is left to ask with."""
    with contextlib.suppress(OSError):
        # Since Linux 6.2 the folder's size is their number; a list of thousands would cost milliseconds.
        return os.stat(_DESCRIPTORS).st_size if _SIZE_COUNTS else len(os.listdir(_DESCRIPTORS)) - 1
    return -1


def _size_counts() -> bool:
    if sys.platform != "linux":
        return False
    with contextlib.suppress(OSError):
        return os.stat(_DESCRIPTORS).st_size > 0
    return False


_SIZE_COUNTS: Final = _size_counts()
