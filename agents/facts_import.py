"""Facts from elsewhere: the rows of an older knowledge base, whose columns go by names of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from agents.facts import Draft
from memory_system.envelope import noun
from memory_system.errors import InvalidField
from memory_system.protocol import MAX_CONTENT_BYTES, MAX_TAG_CHARS, MAX_TAGS

MAX_TOPIC_CHARS: Final = 128
MAX_RECORDS: Final = 300  # their keys have to fit into a filter
MAX_SOURCE_CHARS: Final = 1024

# Field -> the names that its column goes by elsewhere, the likeliest first.
COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "content": ("content", "fact", "text", "value", "statement", "body", "answer", "description"),
    "topic": ("topic", "category", "subject", "key", "title", "name", "entity"),
    "confidence": ("confidence", "certainty", "probability"),
    "source": ("source", "origin", "reference", "url"),
    "tags": ("tags", "keywords", "labels"),
    "created_at": ("created_at", "created", "timestamp", "added_at", "date", "time"),
}
_MS_FROM: Final = 1e11  # as seconds, this is the year 5138


def columns_of(names: Iterable[str], given: Mapping[str, str] | None = None) -> dict[str, str]:
    """Field -> column: as given, else by the usual names. Raises InvalidField for one that is not there."""
    there = list(names)
    found = dict(given or {})
    for field, column in found.items():
        if field not in COLUMNS:
            raise InvalidField(
                f"columns.{field[:80]}", f"columns: {field[:80]} is no field; there are {', '.join(COLUMNS)}"
            )
        if column not in there:
            raise InvalidField(
                f"columns.{field}", f"columns.{field}: there is no column {column[:80]}; there are {', '.join(there)}"
            )
    lower = {name.lower(): name for name in reversed(there)}
    for field, usual in COLUMNS.items():
        likely = next((lower[name] for name in usual if name in lower), None)
        if field not in found and likely is not None and likely not in found.values():
            found[field] = likely
    return found


def draft_of(
    record: Mapping[str, Any], columns: Mapping[str, str], where: str, *, topic: str | None, source: str | None
) -> Draft:
    """One row as a fact. `topic` and `source` are for rows that have none. Raises InvalidField below `where`."""

    def value(field: str) -> Any:
        return record.get(columns[field]) if field in columns else None

    content = _text(value("content"), f"{where}.content", math.inf)
    if content is None:
        raise InvalidField(f"{where}.content", f"{where}.content is missing or empty")
    if len(content.encode()) > MAX_CONTENT_BYTES:
        raise InvalidField(f"{where}.content", f"{where}.content has more than {MAX_CONTENT_BYTES} bytes")
    about = _text(value("topic"), f"{where}.topic", MAX_TOPIC_CHARS) or topic
    if about is None:
        raise InvalidField(f"{where}.topic", f"{where}.topic is missing or empty, and no topic is given for all")
    return Draft(
        topic=about,
        content=content,
        confidence=_confidence(value("confidence"), f"{where}.confidence"),
        source=_text(value("source"), f"{where}.source", MAX_SOURCE_CHARS) or source,
        tags=_tags(value("tags"), f"{where}.tags"),
        said_at=_time(value("created_at"), f"{where}.created_at"),
        is_import=True,
    )


def _wrong(path: str, expected: str, value: object) -> InvalidField:
    shown = f"{value[:40]!r}" if isinstance(value, str) else noun(value)
    return InvalidField(path, f"{path}: expected {expected}, got {shown}")


def _text(value: Any, path: str, most: float) -> str | None:
    """Text without the blanks around it; numbers are written out; None for what is empty."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _wrong(path, "text", value)
    text = str(value).strip()
    if len(text) > most:
        raise InvalidField(path, f"{path} has more than {most:.0f} characters")
    return text or None


def _confidence(value: Any, path: str) -> float:
    if value is None or value == "":
        return 1.0
    number = _number(value)
    if number is None or not 0.0 <= number <= 1.0:
        raise _wrong(path, "a number from 0 to 1", value)
    return number


def _tags(value: Any, path: str) -> tuple[str, ...]:
    """A list of texts, also as JSON; or text with commas."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise _wrong(path, "a list of texts", value) from None
    parts = value.split(",") if isinstance(value, str) else value or []
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise _wrong(path, "a list of texts", value)
    tags = tuple(dict.fromkeys(tag for part in parts if (tag := part.strip())))
    if len(tags) > MAX_TAGS or any(len(tag) > MAX_TAG_CHARS for tag in tags):
        raise InvalidField(path, f"{path}: expected up to {MAX_TAGS} texts of up to {MAX_TAG_CHARS} characters")
    return tags


def _time(value: Any, path: str) -> float | None:
    """Epoch seconds or milliseconds, or a date as ISO 8601 has it, which is UTC if it does not say otherwise."""
    if value is None or value == "":
        return None
    number = _number(value)
    if number is None and isinstance(value, str):
        try:
            when = datetime.fromisoformat(value.strip())
        except ValueError:
            raise _wrong(path, "a time", value) from None
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    if number is None:
        raise _wrong(path, "a time", value)
    return number / 1000.0 if abs(number) >= _MS_FROM else number


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
