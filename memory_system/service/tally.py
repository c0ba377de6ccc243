"""What a run changed, or would change: counted, digested, and the first of it kept to be shown. Pure."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import msgspec

_BITS: Final = 128
_encode = msgspec.json.Encoder(order="sorted").encode


class Tally:
    """Changes of one run. `limit`: how many are kept; `counts`: by kind of change, and whatever else a run counts."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._sum = 0
        self.changes = 0
        self.counts: Counter[str] = Counter()
        self.results: list[Mapping[str, Any]] = []

    def __repr__(self) -> str:
        return f"Tally({self.changes} changes, {self.digest})"

    @property
    def digest(self) -> str:
        """32 hex digits over all changes, in whatever order they came.

        It is the sum of the changes' hashes modulo 2^128 (the incremental AdHash of M. Bellare and D. Micciancio, "A
        New Paradigm for Collision-free Hashing", 1997): two runs that did the same have the same digest.
        """
        return f"{self._sum:0{_BITS // 4}x}"

    def add(self, kind: str, change: Mapping[str, Any]) -> None:
        """Take one change: what it did to which memory, as JSON can hold it."""
        self.changes += 1
        self.counts[kind] += 1
        hashed = hashlib.blake2b(_encode(change), digest_size=_BITS // 8).digest()
        self._sum = (self._sum + int.from_bytes(hashed)) % 2**_BITS
        if len(self.results) < self._limit:
            self.results.append(change)

    def mark(self, digest: bytes) -> None:
        """Let the digest of all changes depend on this one too: of how some of them hang together."""
        self._sum = (self._sum + int.from_bytes(digest)) % 2**_BITS

    def reply(self) -> dict[str, Any]:
        """counts, changes, digest, results, count."""
        return {
            "counts": dict(sorted(self.counts.items())),
            "changes": self.changes,
            "digest": self.digest,
            "results": list(self.results),
            "count": len(self.results),
        }
