"""How many texts make one batch: as many as take about the wished time, by what the last batches took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# A text's cost grows with its length up to what the model reads of it, on top of a part that every text costs.
_BASE_CHARS: Final = 50
_READ_CHARS: Final = 1200
_FIRST_SPEED: Final = 5000.0
_NEWEST_WEIGHT: Final = 0.2


def cost(text: str) -> int:
    """The work that a text is, in characters."""
    return _BASE_CHARS + min(len(text), _READ_CHARS)


class Pace:
    """Measures the embedder and sizes the batches for it. Pure: durations are passed in."""

    def __init__(self, batch_ms: float, batch_texts: int) -> None:
        self._batch_s = batch_ms / 1000
        self._batch_texts = batch_texts
        self.chars_per_s = _FIRST_SPEED

    def fitting(self, texts: Sequence[str]) -> int:
        """How many of the first `texts` make one batch: at least 1 (if there is one), at most batch_texts."""
        budget = self.chars_per_s * self._batch_s
        for index, text in enumerate(texts[: self._batch_texts]):
            budget -= cost(text)
            if budget < 0:
                return max(1, index)
        return min(len(texts), self._batch_texts)

    def measured(self, texts: Sequence[str], duration_s: float) -> None:
        """Learn from a batch that took `duration_s`."""
        speed = sum(map(cost, texts)) / max(duration_s, 1e-6)
        self.chars_per_s += _NEWEST_WEIGHT * (speed - self.chars_per_s)
