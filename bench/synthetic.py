"""Synthetic memories in any number: texts of halves of real turns, and vectors that no model has made.

A vector has the spectrum that all-MiniLM-L6-v2 gives to turns of conversations (mean, and variance of each principal
axis), three tenths of it shared by a session. Only how near things lie is as with real ones, not what they mean: such
vectors measure speed, and the recall of an approximate search against an exact one.
"""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_system.digest import content_digest
from memory_system.embedding.interface import EmbedderState, StateCallback, StateListeners
from memory_system.storage import database

Vectors = npt.NDArray[np.float32]

DIMENSION: Final = 384
MODEL_ID: Final = f"synthetic-{DIMENSION}"
NAMESPACE: Final = "bench"
USERS: Final = 1000
TURNS: Final = 20  # of a session, at most
START_S: Final = 1_700_000_000.0
_BATCH: Final = 2000
# As measured on 2,760 turns of conversations.
_MEAN_NORM: Final = 0.525
_SHARED: Final = 0.3
_SESSION_S: Final = 3600.0
_TURN_S: Final = 20.0

_MEMORY: Final = (
    "INSERT INTO memories (row_id, namespace, memory_id, content, content_digest, memory_type, memory_tier, importance,"
    " importance_at, created_at, updated_at, occurred_at, tier_since, parent_id, session_id, user_id, created_by)"
    " VALUES (?, ?, ?, ?, ?, ?, 'short', 0.5, ?, ?, ?, ?, ?, ?, ?, ?, 'bench')"
)


class Space:
    """Where synthetic vectors lie; the same in every process."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        axis = np.arange(DIMENSION)
        variance = np.exp(-axis / 200.0) / (1.0 + axis / 5.0)
        rotation = np.linalg.qr(rng.standard_normal((DIMENSION, DIMENSION)))[0]
        spread = np.sqrt((1.0 - _MEAN_NORM**2) * variance / variance.sum())
        self._axes = (spread[:, None] * rotation).astype(np.float32)
        mean = rng.standard_normal(DIMENSION)
        self._mean = (_MEAN_NORM * mean / np.linalg.norm(mean)).astype(np.float32)

    def vectors(self, shared: Vectors, own: Vectors) -> Vectors:
        """Unit vectors from standard normal numbers: those of the session, and those of the text alone."""
        made = (_SHARED**0.5 * shared + (1.0 - _SHARED) ** 0.5 * own) @ self._axes + self._mean
        unit: Vectors = made / np.linalg.norm(made, axis=1, keepdims=True)
        return unit


def session_numbers(session: int) -> Vectors:
    """The standard normal numbers of a session."""
    return np.random.default_rng((1, session)).standard_normal(DIMENSION, dtype=np.float32)


class SyntheticEmbedder:
    """Stands for a model: a text's vector follows from its digest alone, and is as near to one session as a turn is."""

    reason: str | None = None

    def __init__(self, sessions: int) -> None:
        self.model_id: str | None = MODEL_ID
        self.dimension: int | None = DIMENSION
        self._sessions = sessions
        self._space = Space()
        self._listeners = StateListeners("starting")
        self._vector = lru_cache(maxsize=4096)(self.vector)

    @property
    def state(self) -> EmbedderState:
        return self._listeners.state

    def on_state(self, callback: StateCallback) -> None:
        self._listeners.add(callback)

    async def start(self) -> None:
        self._listeners.set("ready")

    async def encode(self, texts: Sequence[str]) -> Vectors:
        return np.stack([self._vector(text) for text in texts])

    async def close(self) -> None:
        self._listeners.set("down")

    def vector(self, text: str) -> Vectors:
        seed = int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        own = np.random.default_rng(seed).standard_normal((1, DIMENSION), dtype=np.float32)
        return self._space.vectors(session_numbers(seed % self._sessions)[None], own)[0]


def texts(turns: Sequence[str], count: int) -> Iterator[str]:
    """Memories of the first half of one turn and the second half of another."""
    rng = random.Random(1)
    words = [turn.split() for turn in turns]
    for _ in range(count):
        first, second = rng.choice(words), rng.choice(words)
        yield " ".join(first[: max(3, len(first) // 2)] + second[len(second) // 2 :])


def session_turns(memories: int) -> int:
    """Turns of each session: fewer where there would not be a session for each user."""
    return max(1, min(TURNS, memories // USERS))


def fill(path: Path, turns: Sequence[str], memories: int, advance: Callable[[int], None]) -> None:
    """Make a store of this many memories, with vectors, inserted directly into its tables."""
    with contextlib.closing(database.open_store(path, "NORMAL")) as db:
        made = texts(turns, memories)
        space, rng = Space(), np.random.default_rng(2)
        length = session_turns(memories)
        for start in range(0, memories, _BATCH):
            count = min(_BATCH, memories - start)
            numbers = np.arange(start, start + count)
            with database.transaction(db):
                row_ids = _insert(db, [next(made) for _ in range(count)], numbers, length)
                first, last = start // length, (start + count - 1) // length
                shared = np.stack([session_numbers(session) for session in range(first, last + 1)])
                own = rng.standard_normal((count, DIMENSION), dtype=np.float32)
                _embed(db, row_ids, space.vectors(shared[numbers // length - first], own))
            advance(count)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()


def _insert(db: sqlite3.Connection, contents: list[str], numbers: npt.NDArray[np.int64], length: int) -> list[int]:
    """Insert memories, and each session before its first turn; the memories' row ids."""
    rows, sessions, row_ids = [], [], []
    for number, content in zip(numbers.tolist(), contents, strict=True):
        session, turn = divmod(number, length)
        session_id, user_id = f"ses-{session:09d}", f"user-{session % USERS}"
        row_id = number + session + 2
        at_s = START_S + _SESSION_S * (session // USERS) + _TURN_S * turn
        if turn == 0:
            rows.append(_row(row_id - 1, session_id, "", "session", at_s, None, None, user_id))
            sessions.append((row_id - 1, "conversation"))
        rows.append(_row(row_id, f"mem-{number:09d}", content, "turn", at_s, session_id, session_id, user_id))
        row_ids.append(row_id)
    db.executemany(_MEMORY, rows)
    db.executemany("INSERT INTO sessions (row_id, session_type) VALUES (?, ?)", sessions)
    return row_ids


def _row(
    row_id: int,
    memory_id: str,
    content: str,
    kind: str,
    at_s: float,
    parent_id: str | None,
    session_id: str | None,
    user_id: str,
) -> tuple[object, ...]:
    times = (at_s, at_s, at_s, at_s, at_s)
    return row_id, NAMESPACE, memory_id, content, content_digest(content), kind, *times, parent_id, session_id, user_id


def _embed(db: sqlite3.Connection, row_ids: list[int], vectors: Vectors) -> None:
    db.executemany(
        "INSERT INTO embeddings (row_id, model_id, digest, vector)"
        " SELECT row_id, ?, content_digest, ? FROM memories WHERE row_id = ?",
        ((MODEL_ID, vector.tobytes(), row_id) for vector, row_id in zip(vectors, row_ids, strict=True)),
    )
