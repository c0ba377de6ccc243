"""Masks of scopes that were asked for before, kept and patched where rows have changed since.

Deciding a filter for a million rows takes milliseconds; agents ask with the same few scopes again and again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Where = slice | npt.NDArray[np.int64]

# Each takes a byte for each row.
_KEPT: Final = 32
# After so many changes it is cheaper to begin anew.
_CHANGES: Final = 8192


@dataclass(slots=True)
class _Kept:
    mask: Mask
    seen: int  # how many of the changes are in it


class KeptMasks:
    """Masks by key. Not thread-safe: the owner holds a lock around every call, and while it uses a mask."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, _Kept] = OrderedDict()
        self._changed: list[int] = []

    def __repr__(self) -> str:
        return f"<KeptMasks kept={len(self._kept)} changes={len(self._changed)}>"

    def note(self, slot: int) -> None:
        """Something of a slot has changed, or is about to before the next `get`."""
        if self._kept:
            self._changed.append(slot)
            if len(self._changed) > _CHANGES:
                self.clear()

    def clear(self) -> None:
        self._kept.clear()
        self._changed.clear()

    def get(self, key: Hashable, evaluate: Callable[[Where], Mask], top: int) -> Mask:
        """The mask of `top` slots; `evaluate` decides for some of them. It is read-only, and good until a change."""
        kept = self._kept.get(key)
        if kept is None:
            kept = self._kept[key] = _Kept(evaluate(slice(0, top)), len(self._changed))
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        else:
            self._kept.move_to_end(key)
            self._patch(kept, evaluate, top)
        mask = kept.mask[:top]
        mask.flags.writeable = False
        return mask

    def _patch(self, kept: _Kept, evaluate: Callable[[Where], Mask], top: int) -> None:
        if len(kept.mask) < top:
            kept.mask = _longer(kept.mask, top)
        if kept.seen < len(self._changed):
            slots = np.unique(np.array(self._changed[kept.seen :], np.int64))
            kept.mask[slots] = evaluate(slots)
            kept.seen = len(self._changed)


def _longer(mask: Mask, top: int) -> Mask:
    longer: npt.NDArray[Any] = np.zeros(top + top // 4, np.bool_)
    longer[: len(mask)] = mask
    return longer
