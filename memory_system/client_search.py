"""The searching methods of both clients; see client_api.py. docs/search.md shows each option at work."""

from __future__ import annotations

from typing import Any

from memory_system.client_core import ClientCore, R

Fields = dict[str, Any]


def given(**fields: Any) -> Fields:
    """The fields that are not None, which stands for absent."""
    return {name: value for name, value in fields.items() if value is not None}


class SearchMethods(ClientCore[R]):
    """The searches. Their options, all keyword-only:

    filters, include_archived: which memories; docs/protocol.md, Filters.
    occurred_after, occurred_before: epoch seconds; the first instant within, and the first one beyond the time window.
        A memory without `occurred_at` counts by `created_at`.
    min_score: leave out results whose absolute figures (similarity, keyword) are below.
    boost: {"recency": weight, "importance": weight, "half_life_days": days}, added to the scores.
    diversity: 0 to 1; above 0, a result that resembles those before it comes later.
    expand: "parent" or "neighbours": each result has `surroundings`.
    highlight: each result has `highlights`, [[begin, end], ...] in characters of its content.
    explain: each result has `explain`, the parts of its score. touch: False leaves no trace of the read.
    """

    def search_memory(
        self,
        query: str,
        memory_type: str | None = None,
        limit: int = 10,
        parent_id: str | None = None,
        *,
        filters: Fields | None = None,
        occurred_after: float | None = None,
        occurred_before: float | None = None,
        include_archived: bool = False,
        min_score: float | None = None,
        boost: Fields | None = None,
        diversity: float = 0.0,
        expand: str | None = None,
        highlight: bool = False,
        explain: bool = False,
        touch: bool = True,
        cursor: str | None = None,
    ) -> R:
        """Search by keywords. Reply: results (memories with score), count, next_cursor."""
        data = given(query=query, memory_type=memory_type, limit=limit, parent_id=parent_id, filters=filters)
        within = given(occurred_after=occurred_after, occurred_before=occurred_before, min_score=min_score)
        flags = {"include_archived": include_archived, "highlight": highlight, "explain": explain, "touch": touch}
        order = given(boost=boost, diversity=diversity, expand=expand, cursor=cursor)
        return self.call("search_memory", data | within | flags | order)

    def semantic_search(
        self,
        query: str,
        k: int = 5,
        filters: Fields | None = None,
        *,
        mode: str = "hybrid",
        occurred_after: float | None = None,
        occurred_before: float | None = None,
        include_archived: bool = False,
        min_score: float | None = None,
        boost: Fields | None = None,
        diversity: float = 0.0,
        expand: str | None = None,
        highlight: bool = False,
        explain: bool = False,
        touch: bool = True,
        cursor: str | None = None,
    ) -> R:
        """Search by meaning; mode is hybrid, dense or keyword. Reply: results, count, pending, degraded, next_cursor.

        Each result has score (for the order), similarity and keyword (absolute) beside the memory's fields.
        """
        data = given(query=query, k=k, filters=filters, mode=mode)
        within = given(occurred_after=occurred_after, occurred_before=occurred_before, min_score=min_score)
        flags = {"include_archived": include_archived, "highlight": highlight, "explain": explain, "touch": touch}
        order = given(boost=boost, diversity=diversity, expand=expand, cursor=cursor)
        return self.call("semantic_search", data | within | flags | order)

    def search_similar(
        self,
        memory_id: str,
        k: int = 5,
        filters: Fields | None = None,
        *,
        occurred_after: float | None = None,
        occurred_before: float | None = None,
        include_archived: bool = False,
        min_score: float | None = None,
        boost: Fields | None = None,
        diversity: float = 0.0,
        expand: str | None = None,
        explain: bool = False,
        touch: bool = True,
        cursor: str | None = None,
    ) -> R:
        """Memories near this one in meaning, itself left out. Reply: results, count, next_cursor."""
        data = given(memory_id=memory_id, k=k, filters=filters)
        within = given(occurred_after=occurred_after, occurred_before=occurred_before, min_score=min_score)
        flags = {"include_archived": include_archived, "explain": explain, "touch": touch}
        order = given(boost=boost, diversity=diversity, expand=expand, cursor=cursor)
        return self.call("search_similar", data | within | flags | order)

    def batch_search(self, queries: list[Fields]) -> R:
        """Up to 100 searches; each a dict of semantic_search's fields without cursor. Reply: results, count."""
        return self.call("batch_search", {"queries": queries})
