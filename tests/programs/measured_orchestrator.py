"""The orchestrator, with a thread that writes down every ten seconds what its memory is made of. For tests alone.

MEASURED=file   a line of JSON each time: what malloc has `in_use` and `free` (in its heaps and arenas) and `mapped` (in
                blocks of their own), what `sqlite` has of it, Rss, Pss and Pss_Anon of /proc/self/smaps_rollup, all in
                KiB; and how many `blocks`, of 512 bytes and less, the interpreter has given out
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import threading
import time
from ctypes.util import find_library
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import orchestrator

EVERY_S = 10.0
RESIDENT = re.compile(r"^(Rss|Pss|Pss_Anon): +([0-9]+) kB$", re.MULTILINE)
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class Mallinfo(ctypes.Structure):
    """struct mallinfo2 of malloc.h."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def watch(path: str) -> None:
    library, sqlite = ctypes.CDLL(None), ctypes.CDLL(find_library("sqlite3"))
    library.mallinfo2.restype = Mallinfo
    sqlite.sqlite3_memory_used.restype = ctypes.c_int64
    while True:
        info = library.mallinfo2()
        figures = {"in_use": info.uordblks, "free": info.fordblks, "mapped": info.hblkhd}
        figures["sqlite"] = sqlite.sqlite3_memory_used()
        line = {name: value // 1024 for name, value in figures.items()} | {"blocks": sys.getallocatedblocks()}
        line |= {name: int(value) for name, value in RESIDENT.findall(Path("/proc/self/smaps_rollup").read_text())}
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        time.sleep(EVERY_S)


if __name__ == "__main__":
    threading.Thread(target=watch, args=(os.environ["MEASURED"],), name="measured", daemon=True).start()
    sys.exit(orchestrator.main())
