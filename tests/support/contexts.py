"""Items of a context without a memory service: one token for each word."""

from __future__ import annotations

import itertools
from datetime import UTC
from typing import Any

from agents.context_items import Item, Writer

DAY_S = 86_400.0
NOON_S = 1_700_049_600.0  # 15 November 2023
_ids = itertools.count(1)


class WordCounts:
    """Tokens are words."""

    def count(self, text: str) -> int:
        return len(text.split())


WRITER = Writer(WordCounts(), UTC)


def record(text: str, speaker: str | None = None, **fields: Any) -> dict[str, Any]:
    """A record as the memory service gives it."""
    content = text if speaker is None else f"{speaker}: {text}"
    return {
        "memory_id": f"mem-{next(_ids):06d}",
        "content": content,
        "memory_type": "interaction",
        "parent_id": None,
        "session_id": None,
        "user_id": "ada",
        "created_at": NOON_S,
        "occurred_at": None,
        "expires_at": None,
        "importance": 0.5,
        "metadata": {} if speaker is None else {"role": "user", "speaker": speaker},
        **fields,
    }


def item(text: str, speaker: str | None = None, *, pinned: bool = False, **fields: Any) -> Item:
    return WRITER.item(record(text, speaker, **fields), pinned=pinned)
