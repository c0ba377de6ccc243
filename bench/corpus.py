"""Sentences for the benchmarks: seeded, of a vocabulary with a few common and many rare words."""

from __future__ import annotations

import random
from typing import Final

_COMMON_WORDS: Final = """
the a of to and in that it was for on with as at by from she he they we had has have been this not but will about after
before when where then there some more other into over every again still just only back
"""
_TOPIC_WORDS: Final = """
train journey harbour bridge market garden kitchen letter teacher doctor brother sister neighbour window morning evening
winter summer river mountain village station ticket concert guitar painting camera bicycle engine battery sensor signal
report meeting project budget deadline customer invoice contract office server backup network password keyboard printer
coffee bread cheese apple dinner recipe birthday wedding holiday hotel passport island forest storm weather museum
library novel chapter lesson exam school football chess swimming running doctor hospital medicine headache dentist
apartment furniture carpet ceiling heating electricity insurance savings salary promotion interview agreement argument
bought sold lost found repaired cancelled moved planned visited finished started forgot remembered promised explained
painted cooked borrowed returned measured called wrote learned answered expected preferred avoided noticed decided
quiet early late broken cheap expensive heavy bright narrow famous local urgent careful nervous tired cheerful
"""
_ONSET_LIST: Final = "b br d f g gr h k kl l m n p r s st t tr v w"
_VOWEL_LIST: Final = "a e i o u ai ea ou"
_CODA_LIST: Final = "n r l s t m nd rk sh"
_RARE_WORDS: Final = 4000

_COMMON, _TOPICS = _COMMON_WORDS.split(), _TOPIC_WORDS.split()
_ONSETS, _VOWELS, _CODAS = _ONSET_LIST.split(), _VOWEL_LIST.split(), _CODA_LIST.split()


def _names(rng: random.Random, count: int) -> list[str]:
    """Made-up words, as rare as names and places are."""
    made: dict[str, None] = {}
    while len(made) < count:
        parts = [rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(2)]
        made["".join(parts) + rng.choice(_CODAS)] = None
    return list(made)


class Corpus:
    """An endless supply of sentences and queries; the same seed gives the same ones."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        # The vocabulary belongs to all seeds: queries of one process find the memories of another.
        self._rare = _names(random.Random(1), _RARE_WORDS)

    def sentence(self) -> str:
        """About 20 words: half of them common, a third topical, the rest rare."""
        rng = self._rng
        words = rng.choices(_COMMON, k=10) + rng.choices(_TOPICS, k=rng.randint(5, 8)) + self._rare_words(3)
        rng.shuffle(words)
        return " ".join(words).capitalize() + "."

    def query(self) -> str:
        """Six words of the kind that sentences have: two common, three topical, one rare."""
        rng = self._rng
        words = rng.choices(_COMMON, k=2) + rng.choices(_TOPICS, k=3) + self._rare_words(1)
        rng.shuffle(words)
        return " ".join(words)

    def memory(self) -> dict[str, object]:
        """The fields of one memory for add_memory and batch_add_memories."""
        rng = self._rng
        return {
            "content": self.sentence(),
            "memory_type": "episode",
            "importance": round(rng.uniform(0.3, 0.9), 2),
            "tags": rng.sample(_TOPICS, 2),
            "metadata": {"topic": rng.choice(_TOPICS), "turn": rng.randrange(1000)},
        }

    def _rare_words(self, count: int) -> list[str]:
        # A power law: the first words turn up a hundred times as often as the last ones.
        return [self._rare[int(_RARE_WORDS * self._rng.random() ** 3)] for _ in range(count)]
