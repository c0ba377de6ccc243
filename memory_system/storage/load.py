"""Putting lines of an export into the store, in the one transaction of a request: all of them or none.

A line that is there already changes nothing, so an import may be repeated, and one that was broken off goes on where
it ended. What is there with other contents is a conflict: it is reported and left as it is, unless the caller asks for
the line to take its place. What a memory gains by being used, and what ageing does to it, is no conflict.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from memory_system.errors import InvalidField, MemorySystemError
from memory_system.export_models import GroupLine, MemberLine, ParentLine, RelationshipLine
from memory_system.line_reader import ConsolidationItem, HistoryItem, Item, MemoryItem
from memory_system.storage import load_memories, load_ties
from memory_system.storage.context import WriteContext
from memory_system.storage.loading import Loading, Order, Tally

_PUT: Final[dict[type, Callable[[Loading, Any], None]]] = {
    GroupLine: load_ties.put_group,
    MemoryItem: load_memories.put_memory,
    ParentLine: load_memories.put_parent,
    HistoryItem: load_memories.put_history,
    RelationshipLine: load_ties.put_relationship,
    MemberLine: load_ties.put_member,
    ConsolidationItem: load_ties.put_consolidation,
}


def load(context: WriteContext, items: Sequence[Item], order: Order) -> Tally:
    """Put lines into the namespace.

    Raises InvalidField naming `records[i]` and the field, Cycle; `details.index` is that of the line, and nothing is
    kept.
    """
    loading = Loading(context, order)
    for index, item in enumerate(items):
        loading.index = index
        try:
            _PUT[type(item)](loading, item)
        except InvalidField as error:
            raise InvalidField(f"records[{index}].{error.field}", error.message, index=index) from None
        except MemorySystemError as error:
            error.details["index"] = index
            raise
    return loading.tally
