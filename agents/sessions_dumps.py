"""Reading dumps of conversations: JSON or JSONL, in the shapes that chat programs write.

A turn is a map with a role and a text, under any of the names below:
    {"role": "user", "content": "Hi."}      {"speaker": "Ada", "text": "Hi.", "timestamp": "2024-05-01T10:00:00Z"}
A conversation is a list of turns, or a map that has one:
    {"conversation_id": "7", "user_id": "ada", "messages": [...]}
A file is one conversation, a list of them, a map of id -> conversation, such a thing under "conversations" or
"sessions", or turns that each name their conversation. In JSONL each line is a conversation or such a turn.

Pure: text in, `Conversation` maps of `import_sessions` out.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final

Map = dict[str, Any]

ROLE: Final = ("role", "speaker", "from", "sender", "author")
TEXT: Final = ("content", "text", "value", "message", "utterance")
TIME: Final = ("occurred_at", "timestamp", "created_at", "time", "date")
TURNS: Final = ("turns", "messages", "interactions", "history", "conversation", "conversations")
ID: Final = ("conversation_id", "session_id", "id", "uuid")
USER: Final = ("user_id", "user")
BEGUN: Final = ("started_at", "created_at", "create_time", "timestamp")
_MANY: Final = ("conversations", "sessions")
# Other names of the usual roles.
_ROLES: Final = {"human": "user", "gpt": "assistant", "ai": "assistant", "bot": "assistant"}
_BOM: Final = "\ufeff"


class BadDump(Exception):
    """The text is no dump of conversations; the message names the place."""


def read(text: str) -> list[Map]:
    """The conversations in a dump, each with conversation_id and turns. Raises BadDump."""
    text = text.removeprefix(_BOM)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return _found(_lines(text, error), "line")
    except RecursionError:
        raise BadDump("nested too deeply") from None
    if isinstance(value, Mapping) and not _is_turn(value) and not _has_turns(value):
        return _found(_of_map(value), "conversation")
    if isinstance(value, list) and not (value and all(map(_is_turn, value)) and not any(map(_names_one, value))):
        return _found(value, "item")
    return _found([value], "conversation")


def _lines(text: str, whole: json.JSONDecodeError) -> list[Any]:
    """The values of a JSONL text. Raises BadDump: `whole` says what is wrong with it as one JSON value."""
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            values.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError):
            if values:
                raise BadDump(f"line {number} is not JSON") from None
            raise BadDump(f"not JSON: {whole.msg} in line {whole.lineno}, column {whole.colno}") from None
    return values


def _of_map(value: Mapping[str, Any]) -> list[Any]:
    """The conversations of a map that is none itself: a list of them under a known name, or id -> conversation."""
    for name in _MANY:
        inner = value.get(name)
        if isinstance(inner, list):
            return inner
        if isinstance(inner, Mapping):
            return _of_map(inner)
    return [_named(key, each) for key, each in value.items()]


def _named(key: str, value: Any) -> Any:
    if isinstance(value, list):
        return {"conversation_id": key, "turns": value}
    return {"conversation_id": key, **value} if isinstance(value, Mapping) else value


def _found(values: Sequence[Any], noun: str) -> list[Map]:
    """Conversations as they are, and single turns put together by the conversation that they name."""
    conversations: list[Map] = []
    by_id: dict[str, Map] = {}
    for number, value in enumerate(values, 1):
        where = f"{noun} {number}"
        if not isinstance(value, Mapping) or not _is_turn(value):
            conversations.append(_conversation(value, where))
            continue
        name = _first(value, ID[:2])
        if name is None:
            raise BadDump(f"{where}: a turn that does not say which conversation it is of ({' or '.join(ID[:2])})")
        if str(name) not in by_id:
            by_id[str(name)] = {"conversation_id": str(name), **_user(value), "turns": []}
            conversations.append(by_id[str(name)])
        by_id[str(name)]["turns"] += [turn] if (turn := _turn(value, where)) else []
    found = [conversation for conversation in conversations if conversation["turns"]]
    if not found:
        raise BadDump("there is no conversation in it")
    _check_ids(found)
    return found


def _check_ids(conversations: Iterable[Map]) -> None:
    seen: set[str] = set()
    for conversation in conversations:
        name = conversation["conversation_id"]
        if name in seen:
            raise BadDump(f"two conversations have the id {name[:80]!r}")
        seen.add(name)


def _conversation(value: Any, where: str) -> Map:
    if isinstance(value, list):
        value = {"turns": value}
    if not isinstance(value, Mapping):
        raise BadDump(f"{where} is no conversation: expected a map or a list")
    spoken = next((value[name] for name in TURNS if isinstance(value.get(name), list)), None)
    if not spoken:
        raise BadDump(f"{where} has no turns: expected a list under one of {', '.join(TURNS)}")
    turns = [turn for number, each in enumerate(spoken, 1) if (turn := _turn(each, f"{where}, turn {number}"))]
    if not turns:
        raise BadDump(f"{where} has no turn with a text")
    name = _first(value, ID)
    begun_s = _time(_first(value, BEGUN), where)
    found: Map = {"conversation_id": _digest(turns) if name is None else str(name), **_user(value), "turns": turns}
    found |= {} if begun_s is None else {"started_at": begun_s}
    for key, kind in (("summary", str), ("session_type", str), ("metadata", dict)):
        if isinstance(value.get(key), kind) and value[key]:
            found[key] = value[key]
    return found


def _turn(value: Any, where: str) -> Map | None:
    """None for one that has nothing to say, as calls of tools have."""
    if not isinstance(value, Mapping):
        raise BadDump(f"{where} is not a map")
    if not any(name in value for name in TEXT):
        raise BadDump(f"{where} has no text: expected one of {', '.join(TEXT)}")
    role, text = _role(_first(value, ROLE)), _text(_first(value, TEXT))
    if not text:
        return None
    if not role:
        raise BadDump(f"{where} does not say who spoke: expected one of {', '.join(ROLE)}")
    said_s = _time(_first(value, TIME), where)
    found: Map = {"role": _ROLES.get(role.lower(), role), "content": text}
    found |= {} if said_s is None else {"occurred_at": said_s}
    speaker = value.get("name") or (value.get("speaker") if "role" in value else None)
    found |= {"speaker": speaker} if isinstance(speaker, str) and speaker else {}
    metadata = value.get("metadata")
    return found | ({"metadata": metadata} if isinstance(metadata, Mapping) and metadata else {})


def _role(value: Any) -> str:
    """`{"role": "user"}` under "author" says it as well."""
    return str(_first(value, ("role", "name")) or "") if isinstance(value, Mapping) else str(value or "")


def _text(value: Any) -> str:
    """The text of a turn; of one in parts, those that are text. Empty where there is none."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        parts = (part.get("text") if isinstance(part, Mapping) else part for part in value)
        return "\n".join(part.strip() for part in parts if isinstance(part, str) and part.strip())
    return ""


def _time(value: Any, where: str) -> float | None:
    """Epoch seconds, from such, from milliseconds or from an ISO date (one without a zone is UTC)."""
    if value is None or value == "":
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value / 1000.0 if abs(value) > 1e11 else float(value)
    try:
        at = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise BadDump(f"{where}: {str(value)[:80]!r} is no time: expected epoch seconds or an ISO date") from None
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


def _first(value: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((value[name] for name in names if value.get(name) is not None), None)


def _user(value: Mapping[str, Any]) -> Map:
    user = _first(value, USER)
    return {"user_id": str(user)} if isinstance(user, str | int) else {}


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and not _has_turns(value) and _is_turn_like(value)


def _has_turns(value: Mapping[str, Any]) -> bool:
    """Whether it is one conversation: its list holds turns, not conversations."""
    lists = (value[name] for name in TURNS if isinstance(value.get(name), list))
    return any(each and isinstance(each[0], Mapping) and _is_turn_like(each[0]) for each in lists)


def _is_turn_like(value: Mapping[str, Any]) -> bool:
    return any(name in value for name in TEXT) and _first(value, ROLE) is not None


def _names_one(value: Mapping[str, Any]) -> bool:
    return _first(value, ID[:2]) is not None


def _digest(turns: Sequence[Map]) -> str:
    """What a conversation without an id is known by: its words."""
    said = json.dumps([[turn["role"], turn["content"]] for turn in turns])
    return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=12).hexdigest()


def portions(conversations: Iterable[Map], turns: int, size_bytes: int) -> Iterator[list[Map]]:
    """Conversations in requests of at most so many turns and bytes; one that is longer is on its own."""
    batch: list[Map] = []
    left = (turns, size_bytes)
    for conversation in conversations:
        cost = (len(conversation["turns"]), len(json.dumps(conversation, ensure_ascii=False).encode()))
        if batch and (cost[0] > left[0] or cost[1] > left[1]):
            yield batch
            batch, left = [], (turns, size_bytes)
        batch.append(conversation)
        left = (left[0] - cost[0], left[1] - cost[1])
    if batch:
        yield batch
