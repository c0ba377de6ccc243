"""Finding the phrases of a word list in the words of a sentence.

`*` at the end of a phrase's word stands for any ending, `#` for a number, `^` before a phrase for the beginning of the
sentence. Words are compared in small letters.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

_WORD: Final = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
_SENTENCE: Final = re.compile(r"(?<=[.!?…])\s+|\s*\n\s*")
_APOSTROPHES: Final = str.maketrans("\u2019\u2018\u02bc", "'''")
Words = Sequence[str]


def words_of(text: str) -> list[str]:
    """The words of a text as they are written, all apostrophes alike: `I'm`, `taga-Cebu`."""
    return _WORD.findall(text.translate(_APOSTROPHES))


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, none empty; a new line begins a new one."""
    return [sentence for sentence in _SENTENCE.split(text.strip()) if sentence]


class Phrases:
    """A word list, ready to be looked for. Cost: a look-up for each word, and a comparison where one may begin."""

    def __init__(self, phrases: Iterable[str]) -> None:
        self._by_word: dict[str, list[_Phrase]] = defaultdict(list)
        self._by_stem: list[tuple[str, _Phrase]] = []  # those whose first word may end in any way
        self._by_number: list[_Phrase] = []
        for phrase in sorted({_Phrase.of(text) for text in phrases}, key=lambda each: each.words):
            first = phrase.words[0]
            if first == "#":
                self._by_number.append(phrase)
            elif first.endswith("*"):
                self._by_stem.append((first[:-1], phrase))
            else:
                self._by_word[first].append(phrase)

    def at(self, words: Words, place: int = 0) -> int:
        """How many words, all in small letters, from `place` on are a phrase of the list; 0: none begins there."""
        if place >= len(words):
            return 0
        word = words[place]
        begun = list(self._by_word.get(word, ()))
        begun += [phrase for stem, phrase in self._by_stem if word.startswith(stem)]
        if self._by_number and word[0].isdigit():
            begun += self._by_number
        return max((len(phrase.words) for phrase in begun if phrase.is_at(words, place)), default=0) if begun else 0

    def places(self, words: Words) -> set[int]:
        """The places of all words that belong to a phrase."""
        return {at + offset for at in range(len(words)) for offset in range(self.at(words, at))}

    def any(self, words: Words) -> bool:
        return any(self.at(words, place) for place in range(len(words)))


@dataclass(frozen=True, slots=True)
class _Phrase:
    """`first`: it counts at the beginning of a sentence only."""

    words: tuple[str, ...]
    first: bool

    @classmethod
    def of(cls, text: str) -> _Phrase:
        plain = text.translate(_APOSTROPHES).lower()
        return cls(tuple(plain.removeprefix("^").split()), plain.startswith("^"))

    def is_at(self, words: Words, place: int) -> bool:
        if (self.first and place) or place + len(self.words) > len(words):
            return False
        return all(_same(wanted, words[place + offset]) for offset, wanted in enumerate(self.words))


def _same(wanted: str, word: str) -> bool:
    if wanted == "#":
        return word[0].isdigit()
    return word.startswith(wanted[:-1]) if wanted.endswith("*") else word == wanted
