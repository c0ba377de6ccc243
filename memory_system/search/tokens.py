"""Words of a query or a text as the full-text index's own tokenizer sees them.

The tokenizer is asked itself, through a private FTS5 table in memory, so that there is no second implementation of
its folding and stemming. Answers are kept per word.
"""

from __future__ import annotations

import re
import sqlite3
import threading
import unicodedata
from typing import Final

# The tokenizer's separators among ASCII; what else separates is left to the tokenizer itself.
_RUN = re.compile(r"[0-9A-Za-z\u0080-\U0010ffff]+")
_WORD = re.compile(r"[^\W_]+")
_GENERATION: Final = 50_000
# FTS5 tokens of a longer run are never what a query asks for, and would fill the cache.
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


class Tokenizer:
    """Terms of words and texts. Safe to use from several threads."""

    def __init__(self, tokenize: str) -> None:
        """`tokenize`: the tokenize option of the full-text table, such as `porter unicode61`."""
        self._lock = threading.Lock()
        self._probe = sqlite3.connect(":memory:", check_same_thread=False, isolation_level=None)
        option = tokenize.replace("'", "''")
        self._probe.execute(f"CREATE VIRTUAL TABLE probe USING fts5 (word, content = '', tokenize = '{option}')")
        self._probe.execute("CREATE VIRTUAL TABLE probe_terms USING fts5vocab ('probe', 'instance')")
        # Two generations: a word that was used since the last turn-over survives the next one.
        self._young: dict[str, tuple[str, ...]] = {}
        self._old: dict[str, tuple[str, ...]] = {}

    def close(self) -> None:
        with self._lock:
            self._probe.close()

    def text_terms(self, texts: list[str]) -> list[set[str]]:
        """The distinct terms of each text."""
        runs = [set(_RUN.findall(text)) for text in texts]
        with self._lock:
            known = self._lookup({run for some in runs for run in some})
        return [{term for run in some for term in known[run]} for some in runs]

    def terms(self, words: list[str]) -> list[tuple[str, ...]]:
        """The terms of each word."""
        with self._lock:
            known = self._lookup(set(words))
        return [known[word] for word in words]

    def _lookup(self, words: set[str]) -> dict[str, tuple[str, ...]]:
        known = {word: terms for word in words if (terms := self._young.get(word)) is not None}
        unknown = words - known.keys()
        if len(self._young) + len(unknown) > _GENERATION:
            self._old, self._young = self._young, {}
        learnt = {word: self._old[word] for word in unknown if word in self._old}
        learnt |= self._ask([word for word in unknown if word not in learnt])
        self._young.update((word, terms) for word, terms in learnt.items() if len(word) <= _MAX_RUN_CHARS)
        return known | learnt

    def _ask(self, words: list[str]) -> dict[str, tuple[str, ...]]:
        if not words:
            return {}
        self._probe.execute("BEGIN")
        self._probe.execute("INSERT INTO probe (probe) VALUES ('delete-all')")
        self._probe.executemany("INSERT INTO probe (rowid, word) VALUES (?, ?)", enumerate(words))
        terms: dict[int, list[str]] = {}
        for row, term in self._probe.execute("SELECT doc, term FROM probe_terms"):
            terms.setdefault(row, []).append(term)
        self._probe.execute("COMMIT")
        return {word: tuple(terms.get(row, ())) for row, word in enumerate(words)}
