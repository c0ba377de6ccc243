"""How important it is what somebody says, judged without a language model.

An utterance begins at BASE and moves by what its sentences tell (`agents.utterances` in the settings has the phrases,
in English and Filipino):

    asks to remember it                     at least REMEMBER, whatever else
    tells a preference                      + PREFERENCE
    tells a fact about the speaker          + ABOUT_SELF
    names a day or a date                   + DATE
    has a number                            + NUMBER
    names somebody or something             + NAME
    is nothing but questions                - QUESTION
    is small talk, or next to nothing       - SMALL_TALK

Sentences that ask, and those that greet or thank, tell nothing: "Hey Mel! My son was born in May. Did I say so?" is
worth what its second sentence tells. The weights are no measurement: they put what people come back to above what they
do not.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from agents.phrases import Phrases, Words, sentences_of, words_of
from memory_system.settings import Settings
from memory_system.utterance_settings import UtteranceSettings

BASE: Final = 0.4
REMEMBER: Final = 0.9
WEIGHTS: Final = {"preference": 0.2, "about_self": 0.2, "date": 0.1, "number": 0.05, "name": 0.1}
QUESTION: Final = 0.15
SMALL_TALK: Final = 0.2
# What has no more words than this, and nothing of the above, says next to nothing.
FEW_WORDS: Final = 2
# So many words may a sentence have that begins as small talk and is nothing else: "Thanks a lot for that, Mel!"
TALK_WORDS: Final = 6

_CAPITAL: Final = re.compile(r"[A-ZÀ-ÖØ-Þ]")
# Who is spoken to at the end of a sentence is no news: "That's great, Caroline!"
_SPOKEN_TO: Final = re.compile(r",\s+[^\W\d_]+[.!?…]*$")
_NO_NAMES: Final = frozenset({"I", "I'm", "I'd", "I'll", "I've", "OK", "Ok", "Okay", "TV", "LOL"})


@dataclass(frozen=True, slots=True)
class Judgement:
    """`importance` from 0 to 1, and what was found: remember, preference, about_self, date, number, name, question,
    small_talk."""

    importance: float
    reasons: tuple[str, ...]


class Judge:
    """Judges utterances by the word lists of the settings. About 0.1 ms for a turn of a conversation."""

    def __init__(self, words: UtteranceSettings) -> None:
        self._remember = Phrases(words.remember)
        self._preference = Phrases(words.preference)
        self._about_self = Phrases(words.about_self)
        self._date = Phrases(words.date)
        self._question = Phrases(words.question)
        self._small_talk = Phrases(words.small_talk)

    def importance(self, text: str) -> float:
        """The importance of what is said in `text`, without the name of who says it: 0 to 1."""
        return self.judge(text).importance

    def judge(self, text: str) -> Judgement:
        """The importance with its reasons."""
        told: dict[str, float] = {}
        remember = asked = talked = False
        for sentence in sentences_of(text):
            words = words_of(_SPOKEN_TO.sub("", sentence))
            small = [word.lower() for word in words]
            remember = remember or self._remember.any(small)
            found = self._told(words, small)
            if self._asks(sentence, small):
                asked = True
            elif self._is_small_talk(small, found):
                talked = True
            else:
                told |= found or {"": 0.0}
        return _judgement(told, remember=remember, asked=asked, talked=talked or not text.strip())

    def _told(self, words: Words, small: Words) -> dict[str, float]:
        """What a sentence tells, with its weight."""
        dates = self._date.places(small)
        found = {
            "preference": self._preference.any(small),
            "about_self": self._about_self.any(small),
            "date": bool(dates),
            "number": any(word[0].isdigit() for word in words),
            "name": _names(words, dates),
        }
        return {name: WEIGHTS[name] for name, there in found.items() if there}

    def _asks(self, sentence: str, small: Words) -> bool:
        """`When I was in Rome I lost it.` begins as a question does, and ends as none."""
        return sentence.endswith("?") or (bool(self._question.at(small)) and sentence[-1] not in ".!…")

    def _is_small_talk(self, small: Words, found: dict[str, float]) -> bool:
        if found.keys() - {"name"}:
            return False
        return len(small) <= (TALK_WORDS if self._small_talk.at(small) else 0 if found else FEW_WORDS)


def load(settings: Settings) -> Judge:
    """The judge with the word lists of these settings."""
    return Judge(settings.agents.utterances)


def _judgement(told: dict[str, float], *, remember: bool, asked: bool, talked: bool) -> Judgement:
    reasons = [name for name in WEIGHTS if name in told]
    importance = BASE + sum(told.values())
    if remember:
        reasons.insert(0, "remember")
        importance = max(REMEMBER, importance)
    elif not told and asked:
        reasons.append("question")
        importance -= QUESTION
    elif not told and talked:
        reasons.append("small_talk")
        importance -= SMALL_TALK
    return Judgement(round(min(importance, 1.0), 3), tuple(reasons))


def _names(words: Words, dates: set[int]) -> bool:
    """Whether a word within the sentence is written as names are; a sentence in capitals alone names nobody."""
    if all(word.isupper() for word in words):
        return False
    return any(
        word not in _NO_NAMES and _CAPITAL.match(word) for at, word in enumerate(words) if at and at not in dates
    )
