"""Few arenas of the C library for all threads of a program, unless the environment says otherwise."""

from __future__ import annotations

import asyncio
import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memory_system import allocator
from memory_system.housekeeping import give_back_memory

PROJECT = Path(__file__).resolve().parents[2]
THREADS = 12
pytestmark = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="this C library has no arenas")

# Threads that all hold something at once; then each arena as the C library tells it.
PROGRAM = f"""
import ctypes, sys, tempfile, threading
from memory_system.allocator import give_back, use_few_arenas

done = use_few_arenas() if sys.argv[1] == "few" else False
all_hold = threading.Barrier({THREADS} + 1)

def hold():
    held = bytearray(5_000)
    all_hold.wait(30)
    all_hold.wait(30)

threads = [threading.Thread(target=hold) for _ in range({THREADS})]
for thread in threads:
    thread.start()
all_hold.wait(30)
give_back()
library = ctypes.CDLL(None)
library.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(library.fopen(file.name.encode(), b"w"))
    library.malloc_info(0, stream)
    library.fclose(stream)
    arenas = file.read().count(b"<heap nr")
all_hold.wait(30)
print(done, arenas)
"""


def arenas(how: str, **environ: str) -> tuple[str, int]:
    """What a program with threads was told, and how many arenas it has."""
    kept = {name: value for name, value in os.environ.items() if name not in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env={**kept, **environ},
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    told, count = done.stdout.split()
    return told, int(count)


def test_threads_share_few_arenas() -> None:
    assert arenas("few") == ("True", allocator.ARENAS)


def test_without_it_threads_make_more() -> None:
    """The negative control."""
    told, count = arenas("many")
    assert told == "False"
    assert count > allocator.ARENAS


@pytest.mark.parametrize("chosen", [{"MALLOC_ARENA_MAX": "5"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=5"}])
def test_what_the_environment_says_holds(chosen: dict[str, str]) -> None:
    assert arenas("few", **chosen) == ("False", 5)


def test_nothing_is_done_where_the_c_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_MALLOPT", None)
    monkeypatch.setattr(allocator, "_TRIM", None)
    assert allocator.use_few_arenas() is False
    allocator.give_back()


def test_memory_is_given_back_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = []
    monkeypatch.setattr(allocator, "give_back", lambda: threads.append(threading.current_thread()))
    asyncio.run(give_back_memory())
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()
