"""What is asked of the search engine, and what it answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from memory_system.filters import MATCH_ALL, Filter
from memory_system.models import Memory
from memory_system.search.boosting import NO_BOOST, Boost
from memory_system.search.scope import Scope
from memory_system.search.vectors import Vectors


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """What to search for. `vector` is that of `text`, made by `vector_model`; times are epoch seconds.

    `since_s`, `until_s`: see Scope. `diversity`: 0 (order by score alone) to 1. `neighbours`: how many of the memories
    on either side of a hit, below the same parent, are to be named.
    """

    namespace: str
    text: str
    now_s: float
    mode: Literal["hybrid", "dense", "keyword"] = "hybrid"
    k: int = 10
    offset: int = 0
    vector: Vectors | None = None
    vector_model: str | None = None
    filter: Filter = MATCH_ALL
    include_archived: bool = False
    min_score: float | None = None
    explain: bool = False
    exclude_row_id: int | None = None
    since_s: float | None = None
    until_s: float | None = None
    boost: Boost = NO_BOOST
    diversity: float = 0.0
    neighbours: int = 0

    @property
    def scope(self) -> Scope:
        return Scope(self.namespace, self.now_s, self.filter, self.include_archived, self.since_s, self.until_s)


@dataclass(frozen=True, slots=True)
class Hit:
    """`similarity`: cosine, None without a vector; `keyword`: share of the query's idf found, None in dense mode.

    `before`, `after`: the row ids of its neighbours, as they follow each other.
    """

    row_id: int
    digest: bytes  # of the content that was judged
    score: float
    similarity: float | None
    keyword: float | None
    parts: dict[str, float] | None = None
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchOutcome:
    """`pending`: memories of the namespace without a vector. `candidates`: the size of the pool ranked.

    `reason` says why the outcome is `degraded`: index_loading, index_failed, index_behind, no_query_vector,
    other_model, no_vector. `records`: by row id, the memories of the hits in the state that was searched.
    """

    hits: list[Hit]
    pending: int
    candidates: int
    reason: str | None = None
    records: Mapping[int, Memory] = field(default_factory=dict)

    @property
    def degraded(self) -> bool:
        return self.reason is not None
