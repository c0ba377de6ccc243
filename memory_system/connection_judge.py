"""Which connections are why a program's memory has grown: those whose messages do not end, and those who do not read.

What a client sends, and what waits for it, looks the same at any one moment whether it is honest or not; what tells
them apart is time, and what it has sent before. So each connection is followed from when memory is not in order: for
how long it has been sending the same message, or has left unread what is there for it. Below the bound whoever keeps to
a limit of time is left alone. Near it those go who hold more than any request may have; then those who have taken the
longest, and of these first who has not yet sent as much that ended as what it holds now. Never do those go who hold the
most bytes as such: as soon as others send small parts, of which each takes many times its size, these are the honest
ones with large requests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from memory_system.connections import LEDGER, Connection, Key
from memory_system.protocol import SOCKET_MAX_MESSAGE_BYTES

# ZeroMQ keeps 64 bytes for a part of which two came over the wire.
MAX_AMPLIFICATION: Final = 40
# More than one message may have: who holds that is waited for no longer once memory is short.
MOST_HELD_BYTES: Final = SOCKET_MAX_MESSAGE_BYTES + 65_536
# Of the limit: from where on it is looked, from where on memory is short, and beyond what nobody has patience.
LOOK_FROM: Final = 0.5
SHORT_FROM: Final = 0.75
ENOUGH_FROM: Final = 1.25
# A message that has not ended by then, or a reply that stands unread for so long: before memory is short, when it is,
# and beyond the limit.
PATIENT_S: Final = 5.0
SHORT_S: Final = 1.0
BEYOND_S: Final = 0.5
# How long it has to be so that nobody takes longer than IN_TIME_S until memory is in order as it is: where many are
# served, some bytes always wait, in either direction.
SETTLED_S: Final = 2.0
IN_TIME_S: Final = 1.0
# Of those who have not ended their message: with the one who has taken the longest go all who took nearly as long.
NEARLY: Final = 0.75
# Who has only just begun is not judged before the limit is passed.
BEGUN_S: Final = 0.25
# Handshakes and heartbeats are never taken: what is up to this much in this time does not count. Encrypted, a
# handshake has 600 bytes, and the heartbeats of one of our clients 750 a minute.
FORGIVEN_BYTES: Final = 2048
FORGIVE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What a look at the connections came to: which are to be closed, and whether that is all there is to say."""

    offenders: list[Connection]
    is_settled: bool


@dataclass(slots=True)
class _Message:
    """One that a connection has not ended. `grew_s`: when more of it was last seen to have come."""

    taken: int
    received: int
    since_s: float
    grew_s: float


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
        self._begun: dict[Key, _Message] = {}
        self._since_s: float | None = None  # since when everybody has kept to IN_TIME_S, memory not being in order

    def forgive(self, found: list[Connection]) -> None:
        """While memory is in order: what a connection holds by now, if it is a trifle, does not count later."""
        before = self._forgiven
        self._forgiven = {}
        for each in found:
            held, known = self._held(each), before.get(each.key, 0)
            self._forgiven[each.key] = held if held - known <= FORGIVEN_BYTES else known

    def calm(self) -> None:
        self._moved.clear()
        self._begun.clear()
        self._since_s = None

    def look(
        self, found: list[Connection], now_s: float, grown_bytes: int, *, some_are_leaving: bool = False
    ) -> Finding:
        """Whom to close, the memory having grown by so much; to be asked again until it is settled.

        `some_are_leaving`: what others held is not free yet, so that nobody can be judged by it but beyond the limit
        those who hold more than a message may have.
        """
        held = {each: counted for each in found if (counted := self._counted(each))}
        self._follow(held, now_s)
        unread_s = self._unread(found, now_s)
        share = grown_bytes / self._limit_bytes
        if some_are_leaving:
            offenders = _large(held) if share > 1.0 else []
        else:
            offenders = self._offenders(held, unread_s, now_s, share)
        late = [each for each in held if self._stood_s(each, now_s) >= IN_TIME_S]
        in_time = not self._is_why(late, held) and max(unread_s.values(), default=0.0) < IN_TIME_S
        if offenders or not in_time or self._since_s is None:
            self._since_s = now_s
        # Of a program that has not taken all that is there, nobody can tell whose messages have no end.
        known = not self._is_why(list(held), held) or self._nothing_left_s() >= self._since_s + IN_TIME_S
        waits = bool(unread_s) or self._is_why(list(held), held)
        is_settled = not offenders and in_time and known and (not waits or now_s - self._since_s >= SETTLED_S)
        return Finding(offenders, is_settled)

    def _counted(self, connection: Connection) -> int:
        held = self._held(connection) - self._forgiven.get(connection.key, 0)
        return held if held > FORGIVEN_BYTES else 0

    def _is_why(self, suspects: list[Connection], held: dict[Connection, int]) -> bool:
        """Whether memory can have gone to what these hold; else the program itself has grown."""
        return sum(held[each] for each in suspects) * MAX_AMPLIFICATION > self._limit_bytes / 2

    # -- messages without an end ----------------------------------------------------------------------------------

    def _follow(self, held: dict[Connection, int], now_s: float) -> None:
        before, self._begun = self._begun, {}
        for each in held:
            taken, message = each.received - self._held(each), before.get(each.key)
            if message is None or message.taken != taken:
                message = _Message(taken, each.received, now_s, now_s)
            elif each.received > message.received:
                message.received, message.grew_s = each.received, now_s
            self._begun[each.key] = message

    def _stood_s(self, connection: Connection, now_s: float) -> float:
        """For how long its message has certainly not ended: the program had nothing else to take at the end of it."""
        return min(now_s, self._nothing_left_s()) - self._begun[connection.key].since_s

    def _going_s(self, connection: Connection, now_s: float) -> float:
        """For how long it has been sending a message. One that was sent and is not taken yet grows no older by that."""
        message = self._begun[connection.key]
        return max(message.grew_s - message.since_s, self._stood_s(connection, now_s))

    def _offenders(
        self, held: dict[Connection, int], unread_s: dict[Connection, float], now_s: float, share: float
    ) -> list[Connection]:
        patience_s = BEYOND_S if share > 1.0 else SHORT_S if share > SHORT_FROM else PATIENT_S
        found = [each for each, waited_s in unread_s.items() if waited_s >= patience_s]
        if not self._is_why(list(held), held):
            return found
        if share > SHORT_FROM:
            endless = self._longest(held, now_s, share)
        else:
            endless = [each for each in held if self._stood_s(each, now_s) >= PATIENT_S]
        return list(dict.fromkeys(found + endless))

    def _longest(self, held: dict[Connection, int], now_s: float, share: float) -> list[Connection]:
        """Memory being short: those who hold more than a message may have; else who took the longest over theirs."""
        if large := _large(held):
            return large
        strangers = [each for each in held if not self._is_proven(each, held)]
        if self._is_why(strangers, held):
            return self._nearly_longest(strangers, now_s, 0.0 if share > 1.0 else BEGUN_S)
        least_s = 0.0 if share > ENOUGH_FROM else SHORT_S if share > 1.0 else PATIENT_S
        return self._nearly_longest(list(held), now_s, least_s)

    def _nearly_longest(self, found: list[Connection], now_s: float, least_s: float) -> list[Connection]:
        going_s = {each: self._going_s(each, now_s) for each in found}
        longest_s = max(going_s.values(), default=0.0)
        return [each for each, taken_s in going_s.items() if taken_s >= max(least_s, NEARLY * longest_s)]

    def _is_proven(self, connection: Connection, held: dict[Connection, int]) -> bool:
        """Whether it has sent as much that ended as what it holds now."""
        return self._begun[connection.key].taken >= held[connection]

    # -- replies that nobody reads --------------------------------------------------------------------------------

    def _unread(self, found: list[Connection], now_s: float) -> dict[Connection, float]:
        """For how long nothing was read by those for whom something waits."""
        waiting = {each.key: (each.acknowledged, now_s) for each in found if each.unsent}
        known = {key: was for key, was in self._moved.items() if key in waiting and waiting[key][0] == was[0]}
        self._moved = waiting | known
        return {each: now_s - self._moved[each.key][1] for each in found if each.unsent}


def _large(held: dict[Connection, int]) -> list[Connection]:
    return [each for each, count in held.items() if count > MOST_HELD_BYTES]
