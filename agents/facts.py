"""A fact: a memory of type `knowledge_fact`, whose metadata say what it is about.

One that another fact has replaced is of type `superseded_fact`, and archived: so a search for facts need only name the
type, which the service has at hand, and other programs' searches do not meet it at all. The metadata are:

topic, topic_key            as the caller wrote it, and in its normal form
text_key, frame_key         equal for the same text, and for the same form with another value (facts_text.py)
former_topics               normal forms of the topics that were merged into this one
confidence, source          as the caller says
supersedes                  ids of the facts that this one replaces
superseded_by, superseded_at    the fact that replaced this one, and since when
import_key                  the text_key that an imported fact came with
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from agents.facts_text import frame_key, normal, text_key

FACT: Final = "knowledge_fact"
SUPERSEDED: Final = "superseded_fact"
SUPERSEDES: Final = "supersedes"

Filters = dict[str, Any]
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Draft:
    """A fact that is to be stored. `said_at`: when it was first kept elsewhere, epoch seconds."""

    topic: str
    content: str
    confidence: float = 1.0
    source: str | None = None
    tags: Sequence[str] = ()
    said_at: float | None = None
    is_import: bool = False

    @property
    def text_key(self) -> str:
        return text_key(self.topic, self.content)

    @property
    def frame_key(self) -> str | None:
        return frame_key(self.topic, self.content)

    def memory(self, supersedes: Sequence[str] = ()) -> dict[str, Any]:
        """The fields of `add_memory`. Facts stand alone: they outlive the session in which they were told."""
        found = {
            **placed(self.topic, self.content),
            "confidence": self.confidence,
            "source": self.source,
            "supersedes": list(supersedes) or None,
            "import_key": self.text_key if self.is_import else None,
        }
        fields = {
            "content": self.content,
            "memory_type": FACT,
            "memory_tier": "long",
            "importance": importance(self.confidence),
            "tags": list(self.tags) or None,
            "occurred_at": self.said_at,
            "metadata": {name: value for name, value in found.items() if value is not None},
        }
        return {**{name: value for name, value in fields.items() if value is not None}, "parent_id": None}


@dataclass(frozen=True, slots=True)
class Fact:
    """A fact as it is stored, or was. Times are epoch seconds."""

    fact_id: str
    topic: str
    content: str
    confidence: float
    source: str | None
    tags: tuple[str, ...]
    importance: float
    version: int
    created_at: float
    updated_at: float
    said_at: float | None
    created_by: str
    supersedes: tuple[str, ...]
    superseded_by: str | None
    superseded_at: float | None
    former_topics: tuple[str, ...]
    text_key: str
    import_key: str | None

    @classmethod
    def of(cls, record: Record) -> Fact:
        """From a memory record. What other programs left out of its metadata is as if it had not been said."""
        metadata = record["metadata"]
        return cls(
            fact_id=record["memory_id"],
            topic=str(metadata.get("topic") or ""),
            content=record["content"],
            confidence=metadata.get("confidence", 1.0),
            source=metadata.get("source"),
            tags=tuple(record["tags"]),
            importance=record["importance"],
            version=record["version"],
            created_at=record["created_at"],
            updated_at=record["updated_at"],
            said_at=record["occurred_at"],
            created_by=record["created_by"],
            supersedes=tuple(metadata.get("supersedes") or ()),
            superseded_by=metadata.get("superseded_by"),
            superseded_at=metadata.get("superseded_at"),
            former_topics=tuple(metadata.get("former_topics") or ()),
            text_key=metadata.get("text_key", ""),
            import_key=metadata.get("import_key"),
        )

    @property
    def since_s(self) -> float:
        """From when on it was known."""
        return self.created_at if self.said_at is None else min(self.said_at, self.created_at)

    def held(self, as_of_s: float) -> bool:
        """Whether it was the current fact at that time."""
        return self.since_s <= as_of_s and (self.superseded_at is None or as_of_s < self.superseded_at)

    def told(self, **beside: Any) -> dict[str, Any]:
        """The fact as replies have it."""
        fields = {
            "fact_id": self.fact_id,
            "topic": self.topic,
            "content": self.content,
            "confidence": self.confidence,
            "source": self.source,
            "tags": list(self.tags),
            "state": "current" if self.superseded_by is None else "superseded",
            "supersedes": list(self.supersedes),
            "superseded_by": self.superseded_by,
            "importance": self.importance,
            "version": self.version,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "said_at": self.said_at,
            "created_by": self.created_by,
        }
        return fields | beside


def importance(confidence: float) -> float:
    """0.4 to 0.8: what is sure fades later, and reinforcing has room above."""
    return round(0.4 + 0.4 * confidence, 4)


def placed(topic: str, content: str) -> dict[str, Any]:
    """The metadata that follow from topic and content; a frame_key of None: there is none."""
    return {
        "topic": topic,
        "topic_key": normal(topic),
        "text_key": text_key(topic, content),
        "frame_key": frame_key(topic, content),
    }


def current(**conditions: Any) -> Filters:
    """The filter for facts that no other fact has replaced; metadata__topic=... is a condition on metadata.topic."""
    return {"memory_type": FACT, **{name.replace("__", "."): value for name, value in conditions.items()}}


def facts(**conditions: Any) -> Filters:
    """The filter for facts, superseded ones too."""
    return current(**conditions) | {"memory_type": {"in": [FACT, SUPERSEDED]}}


def on_topic(topic: str) -> Filters:
    """The part of a filter for one topic."""
    return {"metadata.topic_key": normal(topic)}


def without_replaced(found: Iterable[Fact]) -> list[Fact]:
    """Without those that another one of them replaces though they are not marked so: the agent may have ended before
    it could."""
    listed = list(found)
    replaced = {old for fact in listed for old in fact.supersedes}
    return [fact for fact in listed if fact.superseded_by is not None or fact.fact_id not in replaced]
