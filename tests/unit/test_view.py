"""Rows of the index that come, change and go: what is known of the one before is forgotten with it."""

from __future__ import annotations

import random
import threading

import numpy as np
import pytest

from memory_system.search import vectors, view
from memory_system.search.columns import Columns
from memory_system.search.keywords import WordIndex
from memory_system.search.rows import Row
from memory_system.search.tokens import Tokenizer
from memory_system.search.vectors import VectorIndex
from memory_system.search.view import View
from memory_system.settings import SearchSettings

DIMENSION = 8
LOCK = threading.Lock()


def empty_view(exact_max: int = 50) -> View:
    columns = Columns()
    index = VectorIndex(columns, DIMENSION, SearchSettings(exact_max=exact_max))
    return View(columns, index, WordIndex(Tokenizer()), "model", "epoch", 0)


def entry(row_id: int, text: int, blob: bytes | None) -> tuple[Row, bytes | None]:
    digest = text.to_bytes(16, "big")
    return Row(row_id, "default", "t", "short", "active", None, None, None, None, digest), blob


def vector(number: int) -> bytes:
    made = np.random.default_rng(number).standard_normal(DIMENSION, dtype=np.float32)
    return (made / np.linalg.norm(made)).astype("<f4").tobytes()


def alive(found: View) -> int:
    return int(np.count_nonzero(found.columns.has_vector))


@pytest.mark.parametrize("blob", [None, vector(1), b"short"], ids=["later", "at once", "of another model"])
def test_a_vector_goes_with_the_text_it_is_of(blob: bytes | None) -> None:
    found = empty_view()
    view.put(found, entry(1, 1, vector(0)))
    view.put(found, entry(1, 2, blob))
    assert found.vectors is not None
    assert found.vectors.count == alive(found) == int(blob == vector(1))
    view.put(found, entry(1, 2, vector(1)))
    assert found.vectors.count == alive(found) == 1


def test_vectors_are_counted_whatever_comes_and_goes() -> None:
    found, rng = empty_view(), random.Random(4)
    assert found.vectors is not None
    for _ in range(3000):
        row_id = rng.randrange(1, 60)
        if rng.random() < 0.2:
            view.remove(found, row_id)
        else:
            view.put(found, entry(row_id, rng.randrange(4), rng.choice([None, b"short", vector(row_id)])))
        assert found.vectors.count == alive(found)


def test_changed_texts_want_no_axes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_CELLS_FROM", 10_000)
    found = empty_view()
    assert found.vectors is not None
    for row_id in range(1, 101):
        view.put(found, entry(row_id, 0, vector(row_id)))
    while found.vectors.improve(LOCK):
        pass
    for text in range(1, 6):
        for row_id in range(1, 101):
            view.put(found, entry(row_id, text, None))
            view.put(found, entry(row_id, text, vector(text * 1000 + row_id)))
    assert found.vectors.count == 100 and not found.vectors.improve(LOCK)
