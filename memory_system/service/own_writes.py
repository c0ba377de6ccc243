"""Which rows a caller wrote that have no vector yet, so that its next search can wait for them a moment."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Final

Caller = tuple[str, str]  # (namespace, agent_id)

_MAX_CALLERS: Final = 10_000
_MAX_ROWS: Final = 1_000
# A vector that has not come by then (a backlog, a text that cannot be embedded) is not waited for any more.
_GIVE_UP_S: Final = 5.0


class OwnWrites:
    """Rows by caller, bounded. `has_vector(row_id, digest)` asks the index, `hurry` tells it that somebody waits, and
    `advanced` tells that it moved on."""

    def __init__(self, has_vector: Callable[[int, bytes], bool], hurry: Callable[[], None]) -> None:
        self._has_vector = has_vector
        self._hurry = hurry
        # Ordered, because a plain dict that loses its first key over and over takes ever longer to find it.
        self._rows: OrderedDict[Caller, OrderedDict[int, tuple[bytes, float]]] = OrderedDict()
        self._moved = asyncio.Event()

    def note(self, caller: Caller, texts: Mapping[int, bytes]) -> None:
        """The caller wrote these: row_id -> content digest."""
        now_s = time.monotonic()
        rows = self._rows.setdefault(caller, OrderedDict())
        for row_id, digest in texts.items():
            rows[row_id] = (digest, now_s)
        while len(rows) > _MAX_ROWS:
            rows.popitem(last=False)
        self._rows.move_to_end(caller)
        if len(self._rows) > _MAX_CALLERS:
            self._rows.popitem(last=False)

    def discard(self, caller: Caller, row_ids: Iterable[int]) -> None:
        """The caller deleted these rows: no vector will come."""
        rows = self._rows.get(caller)
        if rows is not None:
            for row_id in row_ids:
                rows.pop(row_id, None)

    def advanced(self) -> None:
        """The index applied more changes: whoever waits looks again."""
        self._moved.set()

    async def wait(self, caller: Caller, timeout_s: float) -> None:
        """Return when all rows of the caller have their vector, or after `timeout_s`."""
        deadline_s = time.monotonic() + timeout_s
        while self._waiting(caller):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return
            self._moved.clear()
            self._hurry()
            try:
                await asyncio.wait_for(self._moved.wait(), left_s)
            except TimeoutError:
                return

    def _waiting(self, caller: Caller) -> bool:
        rows = self._rows.get(caller)
        if rows is None:
            return False
        given_up_s = time.monotonic() - _GIVE_UP_S
        left = OrderedDict(
            (row_id, (digest, noted_s))
            for row_id, (digest, noted_s) in rows.items()
            if noted_s > given_up_s and not self._has_vector(row_id, digest)
        )
        if left:
            self._rows[caller] = left
            return True
        del self._rows[caller]
        return False
