"""The keyword side: which memories have the query's words, and how much of the query a text has."""

from __future__ import annotations

import math
import re
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Protocol

from memory_system.lifecycle_settings import LifecycleSettings
from memory_system.search.scope import Scope
from memory_system.search.tokens import Tokenizer, query_words

# More words than this make a query slower, not better: the rarest stay.
MAX_WORDS: Final = 64
_COUNTS_AGE_S: Final = 10.0
_COUNTS_KEPT: Final = 50_000
_DEFAULT_TOKENIZE: Final = "unicode61"


@dataclass(frozen=True, slots=True)
class KeywordQuery:
    """A prepared query: the words to look for, and each of their terms with its idf."""

    words: tuple[str, ...]
    idf: dict[str, float]


class KeywordIndex(Protocol):
    """What a keyword side offers. Every call gets a connection whose read transaction is the search's."""

    def prepare(self, conn: sqlite3.Connection, text: str) -> KeywordQuery:
        """Words and weights of a query text."""

    def candidates(
        self, conn: sqlite3.Connection, query: KeywordQuery, scope: Scope, k: int
    ) -> list[tuple[int, float]]:
        """Up to k (row_id, bm25 score > 0) in scope, best first, equal scores by row_id."""

    def shares(self, query: KeywordQuery, texts: list[str]) -> list[float]:
        """For each text, the share (0..1) of the query's idf whose terms occur in it."""

    def close(self) -> None:
        """Release what the index holds."""


class FtsKeywordIndex:
    """The keyword side on SQLite's FTS5: tables memory_fts and memory_terms. Safe to use from several threads."""

    def __init__(self, lifecycle: LifecycleSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._lifecycle = lifecycle
        self._clock = clock
        self._lock = threading.Lock()
        self._tokenizer: Tokenizer | None = None
        self._counts: dict[str, int] = {}
        self._texts = 0
        self._counted_at_s = -math.inf

    def close(self) -> None:
        if self._tokenizer is not None:
            self._tokenizer.close()

    def prepare(self, conn: sqlite3.Connection, text: str) -> KeywordQuery:
        tokenizer = self._ensure_tokenizer(conn)
        words = query_words(text)
        terms = dict(zip(words, tokenizer.terms(words), strict=True))
        idf = self._idf(conn, {term for found in terms.values() for term in found})
        if len(words) > MAX_WORDS:
            words.sort(key=lambda word: (-max((idf[term] for term in terms[word]), default=0.0), word))
            words = words[:MAX_WORDS]
        kept = {term: idf[term] for word in words for term in terms[word]}
        return KeywordQuery(tuple(word for word in words if terms[word]), kept)

    def candidates(
        self, conn: sqlite3.Connection, query: KeywordQuery, scope: Scope, k: int
    ) -> list[tuple[int, float]]:
        if not query.words or k <= 0:
            return []
        where, params = scope.where(self._lifecycle)
        # CROSS JOIN fixes the order: the index of words first, then the rows it names.
        sql = (
            "SELECT m.row_id, -bm25(memory_fts) AS score FROM memory_fts CROSS JOIN memories AS m"
            f" ON m.row_id = memory_fts.rowid WHERE memory_fts MATCH ? AND {where}"
            " ORDER BY score DESC, m.row_id LIMIT ?"
        )
        match = " OR ".join(f'"{word}"' for word in query.words)  # a word has letters and digits only
        return [(row_id, max(score, 0.0)) for row_id, score in conn.execute(sql, [match, *params, k])]

    def shares(self, query: KeywordQuery, texts: list[str]) -> list[float]:
        total = sum(query.idf.values())
        if total <= 0.0 or self._tokenizer is None:
            return [0.0] * len(texts)
        found = self._tokenizer.text_terms(texts)
        weights = (sum(weight for term, weight in query.idf.items() if term in terms) for terms in found)
        return [min(1.0, weight / total) for weight in weights]

    def _ensure_tokenizer(self, conn: sqlite3.Connection) -> Tokenizer:
        with self._lock:
            if self._tokenizer is None:
                row = conn.execute("SELECT sql FROM sqlite_master WHERE name = 'memory_fts'").fetchone()
                option = re.search(r"tokenize\s*=\s*'([^']*)'", row[0])
                self._tokenizer = Tokenizer(option[1] if option else _DEFAULT_TOKENIZE)
            return self._tokenizer

    def _idf(self, conn: sqlite3.Connection, terms: set[str]) -> dict[str, float]:
        """ln(1 + (N - n + ½) / (n + ½)), never negative; counts are up to 10 s old."""
        with self._lock:
            now_s = self._clock()
            if now_s - self._counted_at_s > _COUNTS_AGE_S or len(self._counts) > _COUNTS_KEPT:
                self._counts.clear()
                (self._texts,) = conn.execute("SELECT count(*) FROM memory_fts_docsize").fetchone()
                self._counted_at_s = now_s
            for term in terms - self._counts.keys():
                row = conn.execute("SELECT doc FROM memory_terms WHERE term = ?", (term,)).fetchone()
                self._counts[term] = row[0] if row else 0
            counts = {term: self._counts[term] for term in terms}
            texts = max(self._texts, *counts.values(), 1) if counts else 1
        return {term: math.log1p((texts - n + 0.5) / (n + 0.5)) for term, n in counts.items()}
