"""The orchestrator, which notes when each request arrived: also one that it refuses or cannot answer.

TEST_ARRIVALS names a file of 32-bit counters, one for each tenth of a second of the monotonic clock since the time that
is its first eight bytes. It outlives the process, so a test sees the arrivals at all lives of the service.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import orchestrator
from memory_system.router import Router

SLOTS_PER_S = 10
_HEAD = struct.Struct("d")


def count_arrivals(path: str) -> None:
    with open(path, "r+b") as file:
        shared = mmap.mmap(file.fileno(), 0)
    (began_s,) = _HEAD.unpack_from(shared)
    counters = memoryview(shared)[_HEAD.size :].cast("I")
    deliver = Router._deliver

    def counted(self: Router, *arguments: Any) -> None:
        counters[int((time.monotonic() - began_s) * SLOTS_PER_S)] += 1
        deliver(self, *arguments)

    Router._deliver = counted  # type: ignore[method-assign]


if __name__ == "__main__":
    count_arrivals(os.environ["TEST_ARRIVALS"])
    sys.exit(orchestrator.main())
