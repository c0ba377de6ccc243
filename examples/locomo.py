"""Reading conversations in the LoCoMo format, with one clear line for a file that is not in it.

A file is a list of `{sample_id, conversation: {speaker_a, speaker_b, session_1: [turn, ...],
session_1_date_time: "1:56 pm on 8 May, 2023", ...}, qa: [{question, evidence: ["D1:3"], ...}]}`;
a turn is `{speaker, dia_id, text}`, and one with an image has its caption in `blip_caption`.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_PROJECT = Path(__file__).resolve().parent.parent
# Longer ones than the project may carry, if somebody has put them beside it.
_DATA_FILES = (_PROJECT.parent / "shared" / "data" / "locomo_dev.json", _PROJECT / "examples" / "conversation.json")

# The format has one time for each session; turns are set this far apart, so that they keep their order.
TURN_S = 20.0

_SESSION = re.compile(r"session_(\d+)")
_TIME_FORMAT = "%I:%M %p on %d %B, %Y"


class BadFile(Exception):
    """The file is not in the format; the message names the place and what is expected there."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One utterance. `occurred_at` is in epoch seconds, the file's time read as UTC."""

    dia_id: str
    speaker: str
    text: str
    occurred_at: float

    @property
    def content(self) -> str:
        return f"{self.speaker}: {self.text}"


@dataclass(frozen=True, slots=True)
class Session:
    number: int
    date_time: str
    started_at: float
    turns: tuple[Turn, ...]

    @property
    def digest(self) -> str:
        """Tells apart two versions of a session."""
        text = json.dumps([[turn.dia_id, turn.content, turn.occurred_at] for turn in self.turns])
        return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


@dataclass(frozen=True, slots=True)
class Question:
    """`evidence`: the dia_ids of the turns that hold the answer; empty for a question of the user's own.

    `category`: the file's number for the kind of question, if it has one.
    """

    text: str
    answer: str
    evidence: tuple[str, ...]
    category: int | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    sample_id: str
    speakers: tuple[str, str]
    sessions: tuple[Session, ...]
    questions: tuple[Question, ...]

    @property
    def turns(self) -> int:
        return sum(len(session.turns) for session in self.sessions)


def default_file() -> Path:
    """What is taken where no file is named."""
    return next(path for path in _DATA_FILES if path.exists())


def load(path: Path) -> list[Conversation]:
    """The conversations of a file. Raises BadFile."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadFile(f"{path}: not a text file in UTF-8") from None
    except json.JSONDecodeError as error:
        raise BadFile(f"{path}: not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except RecursionError:
        raise BadFile(f"{path}: not in the LoCoMo format: nested too deeply") from None
    items = raw if isinstance(raw, list) else [raw]
    if not items:
        raise BadFile(f"{path}: the list of conversations is empty")
    try:
        found = [_conversation(item, f"conversation {index}") for index, item in enumerate(items, 1)]
    except BadFile as error:
        raise BadFile(f"{path}: {error}") from None
    names = [conversation.sample_id for conversation in found]
    if len(set(names)) < len(names):
        raise BadFile(f"{path}: two conversations have the same sample_id")
    return found


def _get(raw: Any, key: str, kind: type[Any], where: str) -> Any:
    names: dict[type[Any], str] = {str: "text", list: "a list", dict: "a map"}
    if not isinstance(raw, dict):
        raise BadFile(f"{where} is not a map")
    value = raw.get(key)
    if not isinstance(value, kind) or (kind is str and not value.strip()):
        raise BadFile(f"{where}: {key} is missing or not {names[kind]}")
    return value


def _conversation(raw: Any, where: str) -> Conversation:
    sample_id = _get(raw, "sample_id", str, where)
    where = f"{where} ({sample_id})"
    spoken = _get(raw, "conversation", dict, where)
    numbers = sorted(int(match[1]) for key in spoken if (match := _SESSION.fullmatch(key)))
    sessions = [_session(spoken, number, where) for number in numbers]
    sessions = [session for session in sessions if session.turns]
    if not sessions:
        raise BadFile(f"{where}: it has no session_1, session_2, ... with turns")
    ids = [turn.dia_id for session in sessions for turn in session.turns]
    if len(set(ids)) < len(ids):
        raise BadFile(f"{where}: two turns have the same dia_id")
    speakers = (_get(spoken, "speaker_a", str, where), _get(spoken, "speaker_b", str, where))
    return Conversation(sample_id, speakers, tuple(sessions), _questions(raw, where, set(ids)))


def _session(spoken: dict[str, Any], number: int, where: str) -> Session:
    name = f"session_{number}"
    date_time = _get(spoken, f"{name}_date_time", str, where)
    try:
        started_at = datetime.strptime(date_time.strip(), _TIME_FORMAT).replace(tzinfo=UTC).timestamp()
    except ValueError:
        raise BadFile(f'{where}: {name}_date_time is {date_time!r}, not like "1:56 pm on 8 May, 2023"') from None
    turns = [
        _turn(raw, f"{where}: {name}, turn {index}", started_at + (index - 1) * TURN_S)
        for index, raw in enumerate(_get(spoken, name, list, where), 1)
    ]
    return Session(number, date_time, started_at, tuple(turns))


def _turn(raw: Any, where: str, occurred_at: float) -> Turn:
    dia_id, speaker = _get(raw, "dia_id", str, where), _get(raw, "speaker", str, where)
    caption = raw.get("blip_caption")
    image = f"[image: {caption}]" if isinstance(caption, str) and caption.strip() else ""
    if image and not str(raw.get("text") or "").strip():
        return Turn(dia_id, speaker, image, occurred_at)
    text = _get(raw, "text", str, where)
    return Turn(dia_id, speaker, f"{text} {image}".strip(), occurred_at)


def _questions(raw: Any, where: str, known: set[str]) -> tuple[Question, ...]:
    """The questions whose evidence is all in the conversation; the others have nothing to be measured against."""
    found = []
    for index, item in enumerate(raw.get("qa") or [], 1):
        text = _get(item, "question", str, f"{where}: question {index}")
        evidence = _get(item, "evidence", list, f"{where}: question {index}")
        if evidence and all(isinstance(dia_id, str) and dia_id in known for dia_id in evidence):
            category = item.get("category")
            number = category if isinstance(category, int) else None
            found.append(Question(text, str(item.get("answer", "")), tuple(dict.fromkeys(evidence)), number))
    return tuple(found)
