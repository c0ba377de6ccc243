"""Taking turns: first in, first out for each client, and the clients one after the other."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from contextvars import ContextVar
from itertools import chain, islice
from typing import Final, Generic, Protocol, TypeVar

# The connection whose request is being worked on; empty for the program's own work.
CLIENT: Final[ContextVar[bytes]] = ContextVar("CLIENT", default=b"")

# For so many turns a client's last ones are remembered: more than that can hardly be waiting.
_REMEMBERED: Final = 4096
# What one request takes: a list is several queries.
_IN_A_ROUND: Final = 4
_EVERY: Final = 4


class HasClient(Protocol):
    @property
    def client(self) -> bytes: ...


T = TypeVar("T", bound=HasClient)


class Lanes(Generic[T]):
    """What waits, in a lane for each client.

    One client with 64 batches of 1,000 rows under way would otherwise hold up everybody's writes for seconds. Who comes
    anew and has had few turns in this round goes before those who always have more, but for every fourth turn.
    """

    def __init__(self) -> None:
        self._fresh: OrderedDict[bytes, deque[T]] = OrderedDict()
        self._lanes: OrderedDict[bytes, deque[T]] = OrderedDict()
        self._count = 0
        self._turns = 0
        # Tuples: a deque takes .6 kB, and there is one for every connection that has been here of late.
        self._last_turns: OrderedDict[bytes, tuple[int, ...]] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    def add(self, item: T) -> None:
        client = item.client
        lane = self._fresh.get(client)
        if lane is None:
            lane = self._lanes.get(client)
        if lane is None:
            lane = (self._fresh if self._is_behind(client) else self._lanes)[client] = deque()
        lane.append(item)
        self._count += 1

    def first(self) -> T:
        """The one whose turn it is; raises StopIteration when there is none."""
        return next(iter(self._next().values()))[0]

    def pop(self) -> T:
        """Take that one; its client goes to the end of the row."""
        lanes = self._next()
        client, lane = next(iter(lanes.items()))
        item = lane.popleft()
        self._count -= 1
        self._note_turn(client)
        del lanes[client]
        if lane:
            self._lanes[client] = lane
        return item

    def soon(self, most: int) -> list[T]:
        """The one whose turn it is, and others whose turn comes soon, about in that order; none of them is taken."""
        rows = (self._lanes, self._fresh) if self._next() is self._lanes else (self._fresh, self._lanes)
        lanes = list(islice(chain.from_iterable(row.values() for row in rows), most))
        found, depth = [lane[0] for lane in lanes], 1
        while len(found) < min(most, self._count) and (deep := [lane for lane in lanes if len(lane) > depth]):
            found += [lane[depth] for lane in deep]
            depth += 1
        return found[:most]

    def take_all(self) -> list[T]:
        return [self.pop() for _ in range(self._count)]

    def _next(self) -> OrderedDict[bytes, deque[T]]:
        """Whose turn it is, of the two rows; empty when nothing waits."""
        is_theirs = not self._fresh or self._turns % _EVERY == _EVERY - 1
        return self._lanes if self._lanes and is_theirs else self._fresh

    def _is_behind(self, client: bytes) -> bool:
        """Whether it has had less than its turns in this round."""
        turns = self._last_turns.get(client)
        waiting = len(self._fresh) + len(self._lanes)
        return turns is None or len(turns) < _IN_A_ROUND or self._turns - turns[0] >= waiting

    def _note_turn(self, client: bytes) -> None:
        self._turns += 1
        self._last_turns[client] = (*self._last_turns.pop(client, ())[1 - _IN_A_ROUND :], self._turns)
        # As many turns ago as nobody waits: it makes no difference. Each turn, one client at most gets that old.
        if self._turns - next(iter(self._last_turns.values()))[-1] >= _REMEMBERED:
            self._last_turns.popitem(last=False)


class _Waiter:
    __slots__ = ("client", "turn")

    def __init__(self, client: bytes) -> None:
        self.client = client
        self.turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Turns:
    """A number of places on the event loop's side of a pool; clients that wait for one get it in turn.

    async with turns:
        await ...
    """

    def __init__(self, places: int) -> None:
        self._free = places
        self._waiting: Lanes[_Waiter] = Lanes()

    def __repr__(self) -> str:
        return f"Turns({self._free} free, {len(self._waiting)} waiting)"

    async def __aenter__(self) -> None:
        if self._free:
            self._free -= 1
            return
        waiter = _Waiter(CLIENT.get())
        self._waiting.add(waiter)
        try:
            await waiter.turn
        except asyncio.CancelledError:
            if waiter.turn.done() and not waiter.turn.cancelled():
                self._pass_on()  # it was given the place in this very moment
            raise

    async def __aexit__(self, *_: object) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            waiter = self._waiting.pop()
            if not waiter.turn.done():
                waiter.turn.set_result(None)
                return
        self._free += 1
