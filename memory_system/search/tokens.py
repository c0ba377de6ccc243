"""Words of a query or a text as terms: folded and stemmed.

SQLite's own tokenizers do it (Unicode folding, Porter stems), asked through a private FTS5 table in memory. Answers
are kept per word, so that a text costs little more than looking its words up.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

TOKENIZE: Final = "porter unicode61 remove_diacritics 2"

Hashes = npt.NDArray[np.uint64]

# What lies between separators of ASCII; what else separates is left to the tokenizer itself.
RUN = re.compile(r"[0-9A-Za-z\u0080-\U0010ffff]+")
_WORD = re.compile(r"[^\W_]+")
_GENERATION: Final = 50_000
# The terms of a longer run are never what a query asks for, and would fill the cache.
_MAX_RUN_CHARS: Final = 256

_STOP_WORDS: Final = """
    a about after again all also am an and any are as at be because been before being both but by can could d
    did do does doing don down during each few for from further had has have having he her here hers herself
    him himself his how i if in into is it its itself just ll m me more most my myself no nor not now of off
    on once only or other our ours ourselves out over own re s same shall she should so some such t than that
    the their theirs them themselves then there these they this those through to too under until up us ve very
    was we were what when where which while who whom whose why will with would you your yours yourself
    yourselves
"""
STOP_WORDS: Final = frozenset(_STOP_WORDS.split())


def query_words(text: str) -> list[str]:
    """The distinct words of a query, without stop words unless there is nothing else."""
    words = list({word.lower(): word for word in _WORD.findall(unicodedata.normalize("NFC", text))}.values())
    return [word for word in words if word.lower() not in STOP_WORDS] or words


def term_hash(term: str) -> int:
    """What stands for a term in the index: 64 bits of its BLAKE2b digest. No word can be read there."""
    return int.from_bytes(blake2b(term.encode(), digest_size=8).digest(), "little")


class Terms(NamedTuple):
    """The terms of one run of letters and digits, mostly one, and what stands for each in the index."""

    texts: tuple[str, ...]
    hashes: tuple[int, ...]


class Tokenizer:
    """Terms of words and texts. Safe to use from several threads."""

    def __init__(self, tokenize: str = TOKENIZE) -> None:
        """`tokenize`: FTS5's tokenize option, such as `porter unicode61`."""
        self._lock = threading.Lock()
        self._probe = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        option = tokenize.replace("'", "''")
        self._probe.execute(f"CREATE VIRTUAL TABLE probe USING fts5 (word, content = '', tokenize = '{option}')")
        self._probe.execute("CREATE VIRTUAL TABLE probe_terms USING fts5vocab ('probe', 'instance')")
        self.identity = f"{tokenize}, SQLite {sqlite3.sqlite_version}"
        # Two generations: a word that was used since the last turn-over survives the next one.
        self._young: dict[str, Terms] = {}
        self._old: dict[str, Terms] = {}

    def close(self) -> None:
        with self._lock:
            self._probe.close()

    def terms(self, words: Iterable[str]) -> dict[str, Terms]:
        """The terms of each word."""
        with self._lock:
            return self._lookup(set(words))

    def hashes(self, texts: Sequence[str]) -> tuple[Hashes, npt.NDArray[np.int64]]:
        """What stands for the terms of all texts, one text after the other, and how many each has."""
        runs = [RUN.findall(text) for text in texts]
        known = self.terms(chain.from_iterable(runs))
        # By numbers of words, so that no Python runs for each word.
        number = {run: at for at, run in enumerate(known)}
        each = np.array(list(map(number.__getitem__, chain.from_iterable(runs))), np.int64)
        sizes = np.array([len(terms.hashes) for terms in known.values()], np.int64)
        begins = np.cumsum(sizes) - sizes
        hashes = np.array([one for terms in known.values() for one in terms.hashes], np.uint64)
        ends = np.concatenate([[0], np.cumsum(sizes[each])])
        at = np.repeat(begins[each] - ends[:-1], sizes[each]) + np.arange(ends[-1])
        of_text = np.cumsum([0, *map(len, runs)])
        return hashes[at], np.diff(ends[of_text])

    def _lookup(self, words: set[str]) -> dict[str, Terms]:
        known = {word: terms for word in words if (terms := self._young.get(word)) is not None}
        unknown = words - known.keys()
        if not unknown:
            return known
        if len(self._young) + len(unknown) > _GENERATION:
            self._old, self._young = self._young, {}
        learnt = {word: self._old[word] for word in unknown if word in self._old}
        learnt |= self._ask([word for word in unknown if word not in learnt])
        self._young.update((word, terms) for word, terms in learnt.items() if len(word) <= _MAX_RUN_CHARS)
        return known | learnt

    def _ask(self, words: list[str]) -> dict[str, Terms]:
        if not words:
            return {}
        self._probe.execute("BEGIN")
        self._probe.execute("INSERT INTO probe (probe) VALUES ('delete-all')")
        self._probe.executemany("INSERT INTO probe (rowid, word) VALUES (?, ?)", enumerate(words))
        found: dict[int, list[str]] = {}
        for row, term in self._probe.execute("SELECT doc, term FROM probe_terms"):
            found.setdefault(row, []).append(term)
        self._probe.execute("COMMIT")
        texts = (tuple(found.get(row, ())) for row in range(len(words)))
        return {
            word: Terms(some, tuple(term_hash(term) for term in some)) for word, some in zip(words, texts, strict=True)
        }
