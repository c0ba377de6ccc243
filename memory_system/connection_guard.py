"""A thread that keeps what ZeroMQ holds for connections within a bound, and warns before files run out.

libzmq has no limit for a message of endlessly many parts, nor, in bytes, for what waits for a client that does not
read. So the process's memory is watched: when it has grown by half of `limits.connection_memory_mb` since it was last
found in order, connections are followed, and when it comes near the bound those are closed who are why (see
connection_judge.py). When nobody is why it has grown, it is in order as it is.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
import time
from collections.abc import Iterator
from typing import Final

from memory_system import allocator, connections
from memory_system.connection_judge import FORGIVE_S, LOOK_FROM, Judge
from memory_system.connections import Connection
from memory_system.log import get_logger
from memory_system.process_figures import open_files

log = get_logger("connection_guard")

TICK_S: Final = 0.1
# While memory is not in order: attackers of the same machine fill a gigabyte in a second. A look at thousands of
# connections takes long, and is followed by a rest of so many times that, up to a tick.
FAST_TICK_S: Final = 0.02
REST: Final = 4.0
# What a connection held is free when ZeroMQ has closed it, in a thread of its own: until then, and at most so long,
# nobody else is judged by it.
RELEASE_S: Final = 0.5
TELL_S: Final = 10.0
TRIM_S: Final = 1.0  # it takes milliseconds, which a program that only has grown should not pay all the time
# Of the files a process may open: from where on is warned, and from where on no more connections are taken, so that
# the program itself (database, modules, log) finds the rest; and from where on all is well again.
FILES_WARNED: Final = 0.8
FILES_KEPT: Final = 0.9
FILES_EASED: Final = 0.7
# Looking through thousands of connections takes long: no more than this share of the time.
FILES_LOOKING: Final = 0.1
# Less than a greeting: such a connection has not said what it wants.
WORDLESS_BYTES: Final = 64
_MIB: Final = 1024 * 1024


class ConnectionGuard:
    """`with guarding(limit_mb):` around a program's life. `cut` counts the connections closed."""

    def __init__(self, limit_mb: float) -> None:
        self.cut = 0
        self._limit_bytes = int(limit_mb * _MIB)
        self._judge = Judge(self._limit_bytes)
        self._calm_bytes = 0
        self._trimmed_s = float("-inf")
        self._leaving: list[Connection] = []  # cut, and not let go of by ZeroMQ until then
        self._leaving_until_s = float("-inf")
        self._told, self._told_s = 0, float("-inf")
        self._warned = self._refusing = False
        self._rests_until_s = float("-inf")
        self._end = threading.Event()
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._thread = threading.Thread(target=self._run, name="connection-guard", daemon=True)

    def __repr__(self) -> str:
        return f"ConnectionGuard({self._limit_bytes // _MIB} MiB, cut={self.cut})"

    def start(self) -> None:
        self._calm_bytes = self._resident()
        self._thread.start()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
        os.close(self._statm)

    def _run(self) -> None:
        forgive_s = time.monotonic()
        wait_s = TICK_S
        while not self._end.wait(wait_s):
            now_s = time.monotonic()
            wait_s = TICK_S
            try:
                if self._watch_memory(now_s):
                    wait_s = min(TICK_S, max(FAST_TICK_S, REST * (time.monotonic() - now_s)))
                self._watch_files(now_s)
                if now_s >= forgive_s:
                    forgive_s = now_s + FORGIVE_S
                    self._judge.forgive(connections.accepted())
            except Exception:  # a guard that fails at one look takes the next
                log.exception("guard_failed")

    def _watch_memory(self, now_s: float) -> bool:
        """Whether there is more to see."""
        is_leaving = self._has_yet_to_leave(now_s)
        if self._grown() <= self._limit_bytes * LOOK_FROM:
            self._judge.calm()
            return False
        if not is_leaving and now_s >= self._trimmed_s + TRIM_S:
            self._trimmed_s = now_s
            allocator.give_back()
        grown_bytes = self._grown()
        if grown_bytes <= self._limit_bytes * LOOK_FROM:
            return False
        finding = self._judge.look(connections.accepted(), now_s, grown_bytes, some_are_leaving=is_leaving)
        closed = [each for each in finding.offenders if connections.cut(each)]
        if closed:
            self.cut += len(closed)
            self._tell(closed, grown_bytes, now_s)
            self._leaving, self._leaving_until_s = self._leaving + closed, now_s + RELEASE_S
        elif finding.is_settled and not is_leaving:
            self._calm_bytes += grown_bytes
        return True

    def _has_yet_to_leave(self, now_s: float) -> bool:
        """Whether ZeroMQ still has something of those who were cut."""
        if not self._leaving:
            return False
        self._leaving = [each for each in self._leaving if connections.is_open(each)]
        if self._leaving and now_s < self._leaving_until_s:
            return True
        self._leaving = []
        self._trimmed_s = float("-inf")
        return False

    def _tell(self, closed: list[Connection], grown_bytes: int, now_s: float) -> None:
        """One line in a while: an attacker who comes back does so many times a second."""
        if now_s < self._told_s + TELL_S:
            return
        log.warning(
            "connections_cut",
            reason="they held more memory than limits.connection_memory_mb: messages without an end, or unread",
            count=self.cut - self._told,
            peer=closed[0].peer,
            grown_mb=grown_bytes // _MIB,
        )
        self._told, self._told_s = self.cut, now_s

    def _watch_files(self, now_s: float) -> None:
        used, limit = open_files(), resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        share = 1.0 if used < 0 else used / limit  # -1: none was left to ask with
        if share >= FILES_WARNED and not self._warned:
            hint = "raise `ulimit -n`: each connection needs a file; near the limit no new client gets in"
            log.warning("few_files_left", used=used, limit=limit, hint=hint)
        self._warned = share >= (FILES_EASED if self._warned else FILES_WARNED)
        if share >= FILES_KEPT:
            if now_s >= self._rests_until_s:
                self._refuse_new()
        elif self._refusing and share < FILES_WARNED:
            connections.refuse_new(False)
            self._refusing = False

    def _refuse_new(self) -> None:
        began_s = time.monotonic()
        self._refusing = True
        connections.refuse_new(True)
        for each in connections.accepted():
            if each.received < WORDLESS_BYTES:
                connections.cut(each)
        ended_s = time.monotonic()
        self._rests_until_s = ended_s + (ended_s - began_s) / FILES_LOOKING

    def _grown(self) -> int:
        """Bytes more than when memory was last found in order."""
        resident_bytes = self._resident()
        self._calm_bytes = min(self._calm_bytes, resident_bytes)
        return resident_bytes - self._calm_bytes

    def _resident(self) -> int:
        """Without what files were mapped for (the vectors of an index): no connection is why that grows."""
        resident, shared = os.pread(self._statm, 100, 0).split()[1:3]
        return (int(resident) - int(shared)) * _PAGE_BYTES


@contextlib.contextmanager
def guarding(limit_mb: float) -> Iterator[None]:
    """Guard this process's connections meanwhile; 0 MiB, or a system without /proc: nothing is done."""
    if not connections.IS_KNOWN or limit_mb <= 0:
        yield
        return
    try:
        guard = ConnectionGuard(limit_mb)
    except OSError as error:  # no /proc here
        log.warning("no_connection_guard", reason=str(error))
        yield
        return
    guard.start()
    try:
        yield
    finally:
        guard.close()


_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
