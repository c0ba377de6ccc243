"""Typed requests of the searches."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Raw

from memory_system import protocol as p
from memory_system.params import (
    ABSENT,
    Cosine,
    Cursor,
    Expansion,
    HalfLife,
    Id,
    Limit,
    Name,
    Params,
    Query,
    SearchMode,
    Time,
    Unit,
    Weight,
)


class Boost(Params, frozen=True, kw_only=True):
    """What a search adds to its scores. `half_life_days` left out: as the settings say."""

    recency: Weight = 0.0
    importance: Weight = 0.0
    half_life_days: HalfLife | None = None

    def __post_init__(self) -> None:
        if self.half_life_days is not None and self.recency == 0.0:
            raise ValueError("half_life_days does nothing without recency")


class SearchOptions(Params, frozen=True, kw_only=True):
    """What all searches take beside what is looked for."""

    filters: Raw = ABSENT
    occurred_after: Time | None = None
    occurred_before: Time | None = None
    include_archived: bool = False
    min_score: Cosine | None = None
    boost: Boost | None = None
    diversity: Unit = 0.0
    expand: Expansion | None = None
    explain: bool = False
    touch: bool = True
    cursor: Cursor | None = None

    def __post_init__(self) -> None:
        since_s, until_s = self.occurred_after, self.occurred_before
        if since_s is not None and until_s is not None and since_s >= until_s:
            raise ValueError("`occurred_before` must be later than occurred_after")


class TextSearch(SearchOptions, frozen=True, kw_only=True):
    """A search for a text."""

    query: Query
    highlight: bool = False


class SearchMemory(TextSearch, frozen=True, kw_only=True):
    memory_type: Name | None = None
    limit: Limit = 10
    parent_id: Id | None = None
    min_score: Unit | None = None


class SemanticSearch(TextSearch, frozen=True, kw_only=True):
    k: Limit = 5
    mode: SearchMode = "hybrid"


class SearchSimilar(SearchOptions, frozen=True, kw_only=True):
    memory_id: Id
    k: Limit = 5


class BatchSearch(Params, frozen=True, kw_only=True):
    """Each query is a map with the fields of semantic_search, cursor excepted."""

    queries: Annotated[list[Raw], Meta(min_length=1, max_length=p.MAX_BATCH_QUERIES)]


SEARCH_PARAMS: dict[str, type[Params]] = {
    "search_memory": SearchMemory,
    "semantic_search": SemanticSearch,
    "search_similar": SearchSimilar,
    "batch_search": BatchSearch,
}
