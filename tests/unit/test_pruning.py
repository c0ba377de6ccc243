"""The best texts by their words, found without scoring every text, against scoring every text: the same to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt
import pytest

from memory_system.search import keywords, places, postings, pruning
from memory_system.search.keywords import KeywordQuery, WordIndex
from memory_system.search.tokens import Tokenizer

Mask = npt.NDArray[np.bool_]
Found = tuple[list[int], list[float]]

WORDS: Final = [f"word{n}" for n in range(40)]
RARE: Final = [1.0 / (n + 1) ** 1.3 for n in range(40)]
TEXTS: Final = 3000
ROWS: Final = np.random.default_rng(9).permutation(TEXTS + 100).astype(np.int64)
SHARES: Final = (0.001, 0.01, 0.1, 1.0)


@pytest.fixture(scope="module", params=["long", "equal"])
def index(request: pytest.FixtureRequest) -> Iterator[WordIndex]:
    """Texts in several segments, some of which are gone; `equal`: of few words and one length, so that many scores
    are."""
    rng = random.Random(3)
    tokenizer = Tokenizer()
    made = WordIndex(tokenizer)
    slots = rng.sample(range(TEXTS), TEXTS)
    for begin, end in ((0, 2000), (2000, 2900), (2900, 3000)):
        some = slots[begin:end]
        words = 6 if request.param == "equal" else None
        texts = [" ".join(rng.choices(WORDS, RARE, k=words or rng.randint(1, 40))) for _ in some]
        add_apart(made, some, ["b" if at % 10 == 0 else "a" for at in range(len(some))], texts)
    for slot in rng.sample(slots, 150):
        made.remove(slot)
    assert len(made.postings.segments) == 3
    yield made
    tokenizer.close()


def add_apart(index: WordIndex, slots: list[int], namespaces: list[str], texts: list[str]) -> None:
    """Add texts as a segment of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(postings, "_AT_ONCE", 0)
        index.add(slots, namespaces, index.analyse(texts))


@pytest.fixture(autouse=True)
def prune_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keywords, "_FEW", 0)
    monkeypatch.setattr(pruning, "_MANY", 0)
    monkeypatch.setattr(pruning, "_STEP", 50)
    monkeypatch.setattr(places, "_SHORT", 0)


def by_scoring_each(index: WordIndex, query: KeywordQuery, mask: Mask, k: int) -> Found:
    """Every text's score, added up term by term in float32, and the k best."""
    slots = np.arange(TEXTS)
    lengths = index.lengths(slots)
    scores = np.zeros(TEXTS, np.float32)
    frequencies = index.frequencies(index.prepare("a", " ".join(query.terms)), slots)
    weights = ((keywords.K1 + 1.0) * query.idf.astype(np.float64)).astype(np.float32)
    for weight, often in zip(weights, frequencies, strict=True):
        norm = lengths * np.float32(keywords.K1 * keywords.B / max(1.0, query.average_length))
        scores += weight * often / (norm + np.float32(keywords.K1 * (1.0 - keywords.B)) + often)
    allowed = [slot for slot in range(min(TEXTS, len(mask))) if mask[slot] and scores[slot] > 0.0]
    best = sorted(allowed, key=lambda slot: (-scores[slot], ROWS[slot]))[:k]
    return best, scores[best].tolist()


def by_index(index: WordIndex, query: KeywordQuery, mask: Mask, k: int) -> Found:
    slots, scores = index.candidates(query, mask, ROWS, k)
    return slots.tolist(), scores.tolist()


def some_query(index: WordIndex, rng: random.Random) -> KeywordQuery:
    asked = rng.sample([*WORDS, "unheard"], rng.randint(1, 9))
    return index.prepare("a", " ".join(asked))


def some_mask(rng: random.Random) -> Mask:
    top = rng.choice([TEXTS - 300, TEXTS, TEXTS + 100])  # more or fewer slots than have texts
    share = rng.choice(SHARES)
    return np.ones(top, np.bool_) if share == 1.0 else np.random.default_rng(rng.randrange(99)).random(top) < share


@pytest.mark.parametrize("look_up", [0, 2, 12, 1000])
def test_the_best_are_those_that_scoring_each_finds(
    index: WordIndex, look_up: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`look_up` 0: every term that is left over is looked up; 1000: it is read."""
    monkeypatch.setattr(places, "_LOOK_UP", look_up)
    rng = random.Random(look_up)
    spared = 0
    for _ in range(80):
        query, mask, k = some_query(index, rng), some_mask(rng), rng.choice([1, 2, 10, 50, 400])
        assert by_index(index, query, mask, k) == by_scoring_each(index, query, mask, k)
        spared += bool(query.places.unread)
        assert not index.postings.scratch.sums.any()
    assert (spared > 10) == (look_up < 1000)


def test_what_was_read_and_what_was_not_give_the_same_frequencies(index: WordIndex) -> None:
    rng = random.Random(8)
    for _ in range(60):
        query = some_query(index, rng)
        index.candidates(query, some_mask(rng), ROWS, 5)
        slots = np.array(rng.sample([-1, *range(TEXTS + 50)], 40), np.int64)
        untouched = index.prepare("a", " ".join(query.terms))
        assert index.frequencies(query, slots).tolist() == index.frequencies(untouched, slots).tolist()


def test_a_bound_that_is_too_low_would_be_found_out(index: WordIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above: with a floor that fewer texts reach than it takes, some of the best are lost."""
    kth = pruning._kth
    monkeypatch.setattr(pruning, "_kth", lambda values, k: 1.2 * kth(values, k))
    rng, everything = random.Random(1), np.ones(TEXTS, np.bool_)
    queries = [some_query(index, rng) for _ in range(30)]
    found = [
        by_index(index, query, everything, 50) == by_scoring_each(index, query, everything, 50) for query in queries
    ]
    assert not all(found)


def test_few_postings_are_all_scored(index: WordIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruning, "_MANY", 10**9)
    rng = random.Random(4)
    for _ in range(60):
        query, mask, k = some_query(index, rng), some_mask(rng), rng.choice([1, 10, 400])
        assert by_index(index, query, mask, k) == by_scoring_each(index, query, mask, k)
        assert not query.places.unread


def test_a_search_that_fails_leaves_nothing_behind(index: WordIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    query = index.prepare("a", "word0 word9")
    with monkeypatch.context() as patch:
        patch.setattr(pruning, "_most", fail)
        with pytest.raises(MemoryError):
            by_index(index, query, np.ones(TEXTS, np.bool_), 5)
    assert not index.postings.scratch.sums.any()
