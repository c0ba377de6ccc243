"""Which texts the embedder failed at, so that one that kills it is found and set aside."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Final

STRIKES: Final = 3
_MAX_KNOWN: Final = 4096


class Strikes:
    """Counts failures by digest of the text; only failures of a text on its own count. Bounded."""

    def __init__(self) -> None:
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def suspected(self, digest: bytes) -> bool:
        """Whether the text must be encoded on its own."""
        return digest in self._counts

    def out(self, digest: bytes) -> bool:
        """Whether the text must not be encoded again."""
        return self._counts.get(digest, 0) >= STRIKES

    def failed(self, digests: list[bytes]) -> None:
        """The embedder failed at these texts, encoded together."""
        alone = len(digests) == 1
        for digest in digests:
            self._counts[digest] = self._counts.get(digest, 0) + alone
            self._counts.move_to_end(digest)
        while len(self._counts) > _MAX_KNOWN:
            self._counts.popitem(last=False)

    def passed(self, digests: Iterable[bytes]) -> None:
        """These texts were encoded."""
        if self._counts:
            for digest in digests:
                self._counts.pop(digest, None)
