"""The postings against a plain count of words: scores, changes, merges, and what a query is told."""

from __future__ import annotations

import math
import random
import threading
from collections import Counter
from collections.abc import Iterator
from io import FileIO
from typing import cast

import numpy as np
import pytest

from memory_system.search import keywords, postings, segment, word_file
from memory_system.search.keywords import WordIndex, bm25, shares
from memory_system.search.tokens import Tokenizer

VOCABULARY = [f"word{n}" for n in range(60)]


@pytest.fixture
def index() -> Iterator[WordIndex]:
    tokenizer = Tokenizer()
    yield WordIndex(tokenizer)
    tokenizer.close()


class Plain:
    """The same by counting: slot -> (namespace, words)."""

    def __init__(self, index: WordIndex) -> None:
        self.index = index
        self.texts: dict[int, tuple[str, list[str]]] = {}

    def add(self, texts: dict[int, tuple[str, str]]) -> None:
        words = self.index.analyse([text for _, text in texts.values()])
        self.index.add(list(texts), [namespace for namespace, _ in texts.values()], words)
        self.texts |= {slot: (namespace, text.split()) for slot, (namespace, text) in texts.items()}

    def remove(self, slot: int) -> None:
        self.index.remove(slot)
        del self.texts[slot]

    def scores(self, namespace: str, asked: list[str]) -> dict[int, float]:
        own = {slot: Counter(words) for slot, (name, words) in self.texts.items() if name == namespace}
        average = sum(sum(words.values()) for words in own.values()) / max(1, len(own))
        found: Counter[int] = Counter()
        for word in set(asked):
            having = [slot for slot, words in own.items() if words[word]]
            idf = math.log1p((len(own) - len(having) + 0.5) / (len(having) + 0.5))
            for slot in having:
                often, length = own[slot][word], sum(own[slot].values())
                norm = keywords.K1 * (1 - keywords.B + keywords.B * length / max(1.0, average))
                found[slot] += idf * often * (keywords.K1 + 1) / (often + norm)
        return dict(found)


def some_text(rng: random.Random) -> str:
    return " ".join(rng.choices(VOCABULARY, weights=[1 / (n + 1) for n in range(60)], k=rng.randint(0, 30)))


def compare(plain: Plain, rng: random.Random, top: int) -> None:
    """Scores, order and figures of some queries, with and without a mask that lets few pass."""
    row_ids = np.arange(top, dtype=np.int64) * 10
    for _ in range(5):
        namespace, asked = rng.choice(["a", "b"]), rng.sample(VOCABULARY, 4)
        query = plain.index.prepare(namespace, " ".join(asked))
        expected = plain.scores(namespace, asked)
        for share in (1.0, 0.3):
            mask = np.array([rng.random() < share for _ in range(top)])
            slots, scores = plain.index.candidates(query, mask, row_ids, 20)
            allowed = {slot: score for slot, score in expected.items() if mask[slot] and score > 0}
            best = sorted(allowed, key=lambda slot: (-np.float32(allowed[slot]), slot))[:20]
            assert scores.tolist() == pytest.approx([allowed[slot] for slot in slots.tolist()], rel=1e-4)
            assert scores.tolist() == pytest.approx([allowed[slot] for slot in best], rel=1e-4)
        everywhere = np.array([*range(top), -1, top + 5000, 3, 3], np.int64)
        frequencies = plain.index.frequencies(query, everywhere)
        own = [plain.texts.get(slot, ("", [])) for slot in everywhere.tolist()]
        for term, word in enumerate(query.terms):
            assert frequencies[term].tolist() == [words.count(word) if name == namespace else 0 for name, words in own]
        texts = [words for name, words in plain.texts.values() if name == namespace]
        assert query.texts == len(texts)
        assert query.found_in.tolist() == [sum(word in words for words in texts) for word in query.terms]
        again = bm25(query, frequencies, plain.index.lengths(everywhere))[:top]
        assert again.tolist() == pytest.approx([expected.get(slot, 0.0) for slot in range(top)], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("few", [0, 1024], ids=["scored", "looked up"])
@pytest.mark.parametrize("seed", [1, 2])
def test_random_changes_and_merges_leave_what_counting_finds(
    index: WordIndex, seed: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keywords, "_FEW", few)
    monkeypatch.setattr(postings, "_AT_ONCE", 40)  # so that there are merges of both kinds
    rng, plain, lock = random.Random(seed), Plain(index), threading.Lock()
    free = list(range(3000))
    for step in range(60):
        for _ in range(rng.randint(0, 3)):
            if plain.texts:
                slot = rng.choice(list(plain.texts))
                plain.remove(slot)
                free.insert(0, slot)  # a slot is used again at once
        plain.add({free.pop(0): (rng.choice(["a", "b"]), some_text(rng)) for _ in range(rng.randint(1, 12))})
        if step % 7 == 0:
            while index.merge_step(lock, purge=step % 21 == 0):
                pass
        if step % 20 == 19:
            compare(plain, rng, 3000)
    assert index.postings.texts == len(plain.texts)
    assert len(index.postings.segments) < 8


def test_what_changes_during_a_merge_is_kept(index: WordIndex) -> None:
    """A merge reads the segments without the lock; removals and additions go on meanwhile."""
    plain, rng = Plain(index), random.Random(5)

    class Lock:
        """Does what others do, whenever the merge has let go of it."""

        entered = 0

        def __enter__(self) -> None:
            Lock.entered += 1
            if Lock.entered == 2:
                plain.remove(3)
                plain.remove(57)
                plain.add({3: ("a", "word1 word2"), 90: ("b", "word1")})

        def __exit__(self, *_: object) -> None:
            return None

    plain.add({slot: ("a", some_text(rng)) for slot in range(60)})
    plain.remove(10)
    assert index.merge_step(Lock(), purge=True)
    assert Lock.entered == 2
    compare(plain, rng, 100)


def test_all_words_forgotten_during_a_merge_stay_so(index: WordIndex) -> None:
    plain = Plain(index)

    class Lock:
        entered = 0

        def __enter__(self) -> None:
            Lock.entered += 1
            if Lock.entered == 2:
                index.postings.clear()

        def __exit__(self, *_: object) -> None:
            return None

    plain.add({0: ("a", "word1"), 1: ("a", "word1")})
    plain.remove(0)
    index.merge_step(Lock(), purge=True)
    assert index.postings.texts == 0 and index.postings.segments == []
    assert index.prepare("a", "word1").found_in.tolist() == [0]


def test_namespaces_know_nothing_of_each_other(index: WordIndex) -> None:
    plain = Plain(index)
    plain.add({0: ("a", "word1 word2"), 1: ("b", "word1"), 2: ("b", "word1 word3")})
    for namespace, texts, found in (("a", 1, 1), ("b", 2, 2), ("c", 0, 0)):
        query = index.prepare(namespace, "word1")
        assert (query.texts, query.found_in.tolist()) == (texts, [found])
    slots, _ = index.candidates(index.prepare("a", "word1"), np.ones(3, np.bool_), np.arange(3), 10)
    assert slots.tolist() == [0], "even where the mask would let others pass"


def test_asking_for_a_namespace_leaves_no_trace(index: WordIndex) -> None:
    Plain(index).add({0: ("a", "word1")})
    for number in range(100):
        assert index.prepare(f"nobody-{number}", "word1").texts == 0
    assert list(index.postings._namespaces) == ["a"]


def test_equal_scores_come_by_row(index: WordIndex) -> None:
    plain = Plain(index)
    plain.add({slot: ("a", "word1") for slot in range(2000)})
    row_ids = np.random.default_rng(1).permutation(2000).astype(np.int64)
    slots, _ = index.candidates(index.prepare("a", "word1"), np.ones(2000, np.bool_), row_ids, 50)
    assert row_ids[slots].tolist() == list(range(50))


def test_a_query_of_many_words_keeps_the_rarest(index: WordIndex) -> None:
    plain = Plain(index)
    plain.add({0: ("a", "common rare"), 1: ("a", "common"), 2: ("a", "common")})
    query = index.prepare("a", "common rare " + " ".join(f"unknown{n}" for n in range(keywords.MAX_WORDS - 1)))
    assert len(query.terms) == keywords.MAX_WORDS
    assert "rare" in query.terms and "common" not in query.terms


def test_shares_are_of_the_idf(index: WordIndex) -> None:
    plain = Plain(index)
    plain.add({0: ("a", "word1 word2"), 1: ("a", "word1"), 2: ("a", "word3")})
    query = index.prepare("a", "word1 word2")
    found = shares(query, index.frequencies(query, np.array([0, 1, 2, -1])))
    assert found.tolist() == pytest.approx([1.0, query.idf[0] / query.idf.sum(), 0.0, 0.0])
    nothing = index.prepare("a", "...")
    assert nothing.terms == () and shares(nothing, index.frequencies(nothing, np.array([0]))).tolist() == [0.0]


def test_a_word_that_stands_very_often_is_counted_up_to_a_limit(index: WordIndex) -> None:
    plain = Plain(index)
    plain.add({0: ("a", "word1 " * 1000), 1: ("a", "word1")})
    query = index.prepare("a", "word1")
    assert index.frequencies(query, np.array([0, 1])).tolist() == [[255.0, 1.0]]
    assert index.lengths(np.array([0, 1])).tolist() == [1000.0, 1.0]


def test_large_merges_are_made_in_parts(index: WordIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_system.search.segment._MERGE_POSTINGS", 50)
    plain, rng = Plain(index), random.Random(3)
    for start in range(0, 300, 20):
        plain.add({slot: (rng.choice(["a", "b"]), some_text(rng)) for slot in range(start, start + 20)})
    while index.merge_step(threading.Lock(), purge=True):
        pass
    compare(plain, rng, 300)


def test_what_is_said_of_texts_is_compared_with_them(index: WordIndex) -> None:
    plain, rng = Plain(index), random.Random(4)
    texts = {slot: ("a", some_text(rng) + " word1") for slot in range(40)}
    plain.add(texts)
    words = index.analyse([text for _, text in texts.values()])

    def wrong() -> list[int]:
        return np.flatnonzero(index.disagreement(list(texts), ["a"] * 40, words)()).tolist()

    assert wrong() == []
    index.remove(7)
    assert wrong() == [7]
    segment = index.postings.segments[0]
    segment.counts[int(np.flatnonzero(segment.docs == 12)[0])] += 1
    assert wrong() == [7, 12]
    segment.docs[int(np.flatnonzero(segment.docs == 20)[-1])] = 21
    assert 20 in wrong()


def test_a_file_that_takes_a_part_at_a_time_gets_all() -> None:
    taken = bytearray()

    class Slow:
        def write(self, data: memoryview) -> int:
            taken.extend(data[:3])
            return min(3, len(data))

    word_file._write_all(cast(FileIO, Slow()), memoryview(b"ten bytes."))
    word_file._write_all(cast(FileIO, Slow()), memoryview(b""))
    assert bytes(taken) == b"ten bytes."


@pytest.mark.parametrize("kept", [1, 4096])
def test_how_many_texts_have_a_term_follows_what_goes(
    index: WordIndex, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was counted is kept, and only what went since is looked at; `kept`: of so many terms."""
    monkeypatch.setattr(segment, "_COUNTED", kept)
    rng, plain = random.Random(6), Plain(index)
    plain.add({slot: ("a", some_text(rng)) for slot in range(300)})
    for _ in range(12):
        asked = rng.sample(VOCABULARY, 3)
        for _ in range(2):
            query = index.prepare("a", " ".join(asked))
            own = [words for _, words in plain.texts.values()]
            assert query.found_in.tolist() == [sum(word in words for words in own) for word in query.terms]
            for slot in rng.sample(list(plain.texts), rng.randint(0, 12)):
                plain.remove(slot)
