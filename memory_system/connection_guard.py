"""A thread that keeps what ZeroMQ holds for connections within a bound, and warns before files run out.

libzmq has no limit for a message of endlessly many parts, nor, in bytes, for what waits for a client that does not
read. So the process's memory is watched: when it has grown by more than `limits.connection_memory_mb` since it was last
found in order, the connections that hold most of what was not taken are closed, and those that read nothing of what
waits for them. A large request on its way looks like the beginning of a message without an end, so it is looked already
when memory has grown by half as much: who then goes on within a second is left alone, and when nobody is why it has
grown, it is in order as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from memory_system import connections
from memory_system.connections import LEDGER, Connection, Key
from memory_system.log import get_logger
from memory_system.process_figures import open_files

log = get_logger("connection_guard")

TICK_S: Final = 0.1
TELL_S: Final = 10.0
TRIM_S: Final = 1.0  # it takes milliseconds, which a program that only has grown should not pay all the time
# ZeroMQ keeps 64 bytes for a part of which two came over the wire.
MAX_AMPLIFICATION: Final = 40
# A client whose acknowledgements stand still for so long, while bytes wait for it, does not read.
STALLED_S: Final = 0.5
# Below the limit both have this long.
PATIENT_S: Final = 1.0
PATIENT_FROM: Final = 0.5  # of the limit
# Until then it is looked whether there is one who does not read, or who holds: where many are served, some bytes always
# wait, in either direction.
SETTLED_S: Final = 2.0
# Handshakes and heartbeats are never taken: what is up to this much in this time does not count. Encrypted, a
# handshake has 600 bytes, and the heartbeats of one of our clients 750 a minute.
FORGIVEN_BYTES: Final = 2048
FORGIVE_S: Final = 60.0
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


@dataclass(frozen=True, slots=True)
class Finding:
    """What a look at the connections came to: which are to be closed, and whether that is all there is to say."""

    offenders: list[Connection]
    is_settled: bool


class Judge:
    """Decides which connections are why the memory has grown. No I/O; times are monotonic seconds."""

    def __init__(
        self,
        limit_bytes: int,
        held: Callable[[Connection], int] = LEDGER.held,
        nothing_left_s: Callable[[], float] = lambda: LEDGER.nothing_left_s,
    ) -> None:
        self._limit_bytes = limit_bytes
        self._held = held
        self._nothing_left_s = nothing_left_s
        self._forgiven: dict[Key, int] = {}
        self._moved: dict[Key, tuple[int, float]] = {}  # bytes acknowledged, and since when no more
        self._taken: dict[Key, tuple[int, float]] = {}  # bytes taken, and since when no more
        self._since_s: float | None = None  # since when nobody was found, the memory being beyond the limit

    def forgive(self, found: list[Connection]) -> None:
        """While memory is in order: what a connection holds by now, if it is a trifle, does not count later."""
        before = self._forgiven
        self._forgiven = {}
        for each in found:
            held, known = self._held(each), before.get(each.key, 0)
            self._forgiven[each.key] = held if held - known <= FORGIVEN_BYTES else known

    def look(self, found: list[Connection], now_s: float, grown_bytes: int) -> Finding:
        """Whom to close, the memory having grown by so much; to be asked again until it is settled."""
        held = {each.key: self._counted(each) for each in found}
        patient = grown_bytes <= self._limit_bytes
        stalled, waiting = self._stalled(found, now_s, PATIENT_S if patient else STALLED_S)
        suspects, waiting_for_more = self._suspects(found, held, now_s, PATIENT_S if patient else 0.0)
        offenders = {each.key: each for each in stalled}
        if self._is_why(suspects, held):
            offenders |= {each.key: each for each in _largest_half(suspects, held)}
        if offenders or self._since_s is None:
            self._since_s = now_s
        # Of a program that has not taken all that is there, nobody can tell whose messages have no end.
        known = not waiting_for_more or self._nothing_left_s() >= self._since_s + PATIENT_S
        is_over = not (waiting or waiting_for_more) or (known and now_s - self._since_s >= SETTLED_S)
        return Finding(list(offenders.values()), is_settled=not offenders and is_over)

    def calm(self) -> None:
        self._moved.clear()
        self._taken.clear()
        self._since_s = None

    def _counted(self, connection: Connection) -> int:
        held = self._held(connection) - self._forgiven.get(connection.key, 0)
        return held if held > FORGIVEN_BYTES else 0

    def _is_why(self, suspects: list[Connection], held: dict[Key, int]) -> bool:
        """Whether memory can have gone to what these hold; else the program itself has grown."""
        return sum(held[each.key] for each in suspects) * MAX_AMPLIFICATION > self._limit_bytes / 2

    def _stalled(self, found: list[Connection], now_s: float, after_s: float) -> tuple[list[Connection], bool]:
        """Who does not read, and whether there are some of whom it is not known yet."""
        waited = _standing(self._moved, {each: each.acknowledged for each in found if each.unsent}, now_s)
        stalled = [each for each, waited_s in waited.items() if waited_s >= after_s]
        return stalled, len(stalled) < len(waited)

    def _suspects(
        self, found: list[Connection], held: dict[Key, int], now_s: float, after_s: float
    ) -> tuple[list[Connection], bool]:
        """Of whom nothing was taken for so long although they hold something and the program had nothing else to take
        by then; and whether it is not known yet of some who hold enough to matter."""
        taken = {each: each.received - self._held(each) for each in found if held[each.key]}
        waited = _standing(self._taken, taken, now_s)
        if after_s > 0.0:
            untaken_s = now_s - self._nothing_left_s()
            waited = {each: waited_s - untaken_s for each, waited_s in waited.items()}
        suspects = [each for each, waited_s in waited.items() if waited_s >= after_s]
        return suspects, self._is_why([each for each in waited if waited[each] < after_s], held)


def _standing(
    before: dict[Key, tuple[int, float]], counts: dict[Connection, int], now_s: float
) -> dict[Connection, float]:
    """For how many seconds each of these counts has not changed. `before` is what was seen last, and is brought up."""
    seen = {each.key: (count, now_s) for each, count in counts.items()}
    seen |= {key: known for key, known in before.items() if key in seen and seen[key][0] == known[0]}
    before.clear()
    before.update(seen)
    return {each: now_s - seen[each.key][1] for each in counts}


def _largest_half(found: list[Connection], held: dict[Key, int]) -> list[Connection]:
    """The fewest of these connections that together hold half of what they hold."""
    half, chosen = sum(held[each.key] for each in found) / 2, []
    for each in sorted(found, key=lambda one: held[one.key], reverse=True):
        if half <= 0:
            break
        half -= held[each.key]
        chosen.append(each)
    return chosen


class ConnectionGuard:
    """`with guarding(limit_mb):` around a program's life. `cut` counts the connections closed."""

    def __init__(self, limit_mb: float) -> None:
        self.cut = 0
        self._limit_bytes = int(limit_mb * _MIB)
        self._judge = Judge(self._limit_bytes)
        self._calm_bytes = 0
        self._trimmed_s = float("-inf")
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
        while not self._end.wait(TICK_S):
            now_s = time.monotonic()
            try:
                self._watch_memory(now_s)
                self._watch_files(now_s)
                if now_s >= forgive_s:
                    forgive_s = now_s + FORGIVE_S
                    self._judge.forgive(connections.accepted())
            except Exception:  # a guard that fails at one look takes the next
                log.exception("guard_failed")

    def _watch_memory(self, now_s: float) -> None:
        if self._grown() <= self._limit_bytes * PATIENT_FROM:
            self._judge.calm()
            return
        if now_s >= self._trimmed_s + TRIM_S:
            self._trimmed_s = now_s
            _give_back_memory()
        grown_bytes = self._grown()
        if grown_bytes <= self._limit_bytes * PATIENT_FROM:
            return
        finding = self._judge.look(connections.accepted(), now_s, grown_bytes)
        closed = [each for each in finding.offenders if connections.cut(each)]
        if closed:
            self.cut += len(closed)
            self._tell(closed, grown_bytes, now_s)
            self._trimmed_s = float("-inf")  # ZeroMQ lets go of it in its own thread, until the next tick
        elif finding.is_settled:
            self._calm_bytes += grown_bytes

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


def _give_back_memory() -> None:
    """Have the C library return what was freed to the system: it keeps what small parts were in."""
    if _TRIM is not None:
        _TRIM(0)


_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_TRIM: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl needs none
