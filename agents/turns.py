"""What somebody said in a conversation: as an agent's caller gives it, as the memory service keeps it, and back.

A turn is a memory of type `interaction`, a child of its session. Where its speaker has a name, the content is
"Ada: I prefer trains.": with the name in it, questions that name people find what those people said. Who said it, and
what the caller wants kept beside it, is in the metadata, so that nothing has to be read out of the content.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Final

from memory_system.fields import Span
from memory_system.protocol import MAX_CONTENT_BYTES, MAX_NAME_CHARS

INTERACTION: Final = "interaction"
# Roles that say what somebody is, not who: every other role is taken for the speaker's name.
ROLES: Final = frozenset({"user", "assistant", "system", "developer", "tool", "function"})

Role = Annotated[str, Span(1, MAX_NAME_CHARS, blank=False)]
Said = Annotated[str, Span(1, MAX_CONTENT_BYTES, blank=False)]
Importance = Annotated[float, Span(0, 1)]


@dataclass(frozen=True, slots=True)
class Interaction:
    """A turn as a caller gives it; `occurred_at` in epoch seconds. `importance` None: judged by what is said."""

    role: Role
    content: Said
    speaker: Role | None = None
    metadata: dict[str, Any] | None = None
    occurred_at: float | None = None
    importance: Importance | None = None

    @property
    def name(self) -> str | None:
        """The speaker's name; None where only the role is known."""
        return self.speaker or (None if self.role.lower() in ROLES else self.role)

    def memory(self, importance: float) -> dict[str, Any]:
        """The fields of add_memory; `importance` where the caller gave none."""
        kept: dict[str, Any] = {"role": self.role}
        if self.name is not None:
            kept["speaker"] = self.name
        if self.metadata:
            kept["data"] = self.metadata
        fields = {
            "content": self.content if self.name is None else f"{self.name}: {self.content}",
            "memory_type": INTERACTION,
            "importance": importance if self.importance is None else self.importance,
            "metadata": kept,
        }
        return fields if self.occurred_at is None else {**fields, "occurred_at": self.occurred_at}


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as it is stored. Times are epoch seconds; `metadata` is what its caller gave with it."""

    interaction_id: str
    session_id: str | None
    user_id: str | None
    role: str
    speaker: str | None
    text: str
    created_at: float
    occurred_at: float | None = None
    importance: float = 0.5
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Turn:
        """From a record of the memory service; one that no session agent made is said by nobody in particular."""
        kept = record["metadata"]
        speaker, data = kept.get("speaker"), kept.get("data")
        content = record["content"]
        return cls(
            interaction_id=record["memory_id"],
            session_id=record["session_id"],
            user_id=record["user_id"],
            role=str(kept.get("role", "")),
            speaker=speaker,
            text=content if speaker is None else content.removeprefix(f"{speaker}: "),
            created_at=record["created_at"],
            occurred_at=record["occurred_at"],
            importance=record["importance"],
            metadata=data if isinstance(data, dict) else {},
        )

    @property
    def said_at(self) -> float:
        """When it was said, as far as is known."""
        return self.created_at if self.occurred_at is None else self.occurred_at

    @property
    def line(self) -> str:
        """As a line of a transcript: `Ada: I prefer trains.`"""
        who = self.speaker or self.role
        return f"{who}: {self.text}" if who else self.text

    def reply(self) -> dict[str, Any]:
        """As callers see it."""
        return {
            "interaction_id": self.interaction_id,
            "session_id": self.session_id,
            "role": self.role,
            "speaker": self.speaker,
            "content": self.text,
            "said_at": self.said_at,
            "importance": self.importance,
            "metadata": dict(self.metadata),
        }
