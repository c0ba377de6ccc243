"""What the words of a fact tell without understanding it: the same text, the same claim, another value of one thing.

Vectors alone cannot tell these apart: with all-MiniLM-L6-v2 the cosine of "The rent is 900 euros" and "The rent is 950
euros" is 0.98, that of "trains to planes" and "planes to trains" 0.997, and that of two passwords of one network 0.76.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from typing import Final


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


_EDGES: Final = ".,;:!?\"'()[]{}…“”‘’«»"  # noqa: RUF001
_APOSTROPHES: Final = str.maketrans("’ʼ", "''")  # noqa: RUF001  what people type for an apostrophe
_NUMBER: Final = re.compile(r"[-+]?[$€£₱]?\d[\d.,:/%-]*(?:st|nd|rd|th|am|pm|%|[a-z]{0,3})?")
_DATES: Final = _listed("""
    january february march april may june july august september october november december
    monday tuesday wednesday thursday friday saturday sunday
    enero pebrero marso abril mayo hunyo hulyo agosto setyembre oktubre nobyembre disyembre
    lunes martes miyerkules huwebes biyernes sabado linggo noon midnight today tomorrow""")
_NEGATIONS: Final = _listed("""
    no not never none nobody nothing neither nor without cannot isn't aren't wasn't weren't don't doesn't didn't
    won't can't couldn't shouldn't wouldn't hasn't haven't hadn't hindi wala walang huwag di""")
# Verbs of what is so at one time in one way.
_STATES: Final = _listed("""
    is are was were be has have had costs cost opens open closes close starts start begins begin ends end lasts last
    takes take weighs measures lives works expires ay nasa""")
_IS: Final = frozenset({"is", "are", "ay"})
_OWNERS: Final = frozenset({"my", "our", "your", "his", "her", "its", "their", "the", "ang"})
# After "is", these say what kind of a thing something is, or where: there may be many such facts, or few words decide.
_OPENINGS: Final = _listed(
    """a an at in on of for with from to by as between under above near about no not also one
    isang nasa sa para"""
)
_FIRST_WORDS: Final = 3  # of a subject that names one thing: "the wifi password", not "the door"


def words(text: str) -> list[str]:
    """The words without case and outer punctuation: `"3.5 %"`, `c++` and `-5` stay what they are."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(_APOSTROPHES)
    return [word for each in plain.split() if (word := each.strip(_EDGES))]


def normal(text: str) -> str:
    """Equal for texts that read the same; a text of punctuation alone stays what it is."""
    return " ".join(words(text)) or text.strip()


def digest(*parts: str) -> str:
    """16 hex digits."""
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).hexdigest()


def text_key(topic: str, content: str) -> str:
    """Equal for facts of one topic with the same normalised text."""
    return digest(normal(topic), normal(content))


def same_claim(one: str, other: str) -> bool:
    """Whether two texts whose vectors are near may be taken for one claim: they have the same numbers, dates and
    negations, and do not differ by the order of their words alone."""
    left, right = words(one), words(other)
    if _details(left) != _details(right):
        return False
    return left == right or Counter(left) != Counter(right)


def frame(content: str) -> str | None:
    """What a fact gives the value of; None where it has no form of which a newer one replaces an older one.

    Two forms are known. A number or date after a verb of state, as in "The rent is 900 euros": all but the numbers
    and dates after that verb. And "is" or "ay" after a subject that names one thing, as in "Ada's boss is Ben": the
    subject. Everything else ("Ada likes tea") may be true beside its like.
    """
    found = words(content)
    verb = next((place for place, word in enumerate(found) if word in _STATES and place > 0), None)
    if verb is None or set(found) & _NEGATIONS:
        return None
    head, tail = found[: verb + 1], found[verb + 1 :]
    masked = ["#" if _is_value(word) else word for word in tail]
    if "#" in masked:
        return " ".join([*head, *_runs_as_one(masked)])
    if found[verb] in _IS and tail and tail[0] not in _OPENINGS and _names_one(head[:-1]):
        return " ".join(head)
    return None


def frame_key(topic: str, content: str) -> str | None:
    """Equal for facts of one topic with the same frame."""
    found = frame(content)
    return None if found is None else digest(normal(topic), found)


def _details(found: list[str]) -> Counter[str]:
    return Counter(word for word in found if _is_value(word) or word in _NEGATIONS)


def _is_value(word: str) -> bool:
    return word in _DATES or _NUMBER.fullmatch(word) is not None


def _runs_as_one(masked: list[str]) -> list[str]:
    """ "3 May 1988" and "May 1988" are one value."""
    return [word for place, word in enumerate(masked) if word != "#" or place == 0 or masked[place - 1] != "#"]


def _names_one(subject: list[str]) -> bool:
    """ "the wifi password", "the capital of Peru", "Ada's boss", "ang password ng opisina": not "Ada", "the office"."""
    if any(word.endswith(("'s", "s'")) for word in subject[:-1]):
        return True
    if not subject or subject[0] not in _OWNERS:
        return False
    return len(subject) >= _FIRST_WORDS or subject[0] not in ("the", "ang")
