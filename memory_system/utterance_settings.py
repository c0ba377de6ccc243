"""Settings of the agents' judgement of what somebody says: its word lists; part of `agent_settings.py`.

A phrase is words in a row, in any case: `*` at the end of a word stands for any ending, `#` for a number, and `^`
before a phrase says that it counts at the beginning of a sentence only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from memory_system.config_loader import key

PHRASE: Final = "a list of phrases, in which * ends a word in any way, # is a number and ^ begins a sentence"


def _phrase(text: str) -> None:
    words = text.removeprefix("^").split()
    if not words or any("*" in word[:-1] or word == "*" for word in words):
        raise ValueError("not a phrase")


def _phrases(text: str) -> tuple[str, ...]:
    """One phrase after each comma or at each new line."""
    return tuple(phrase.strip() for line in text.strip().splitlines() for phrase in line.split(",") if phrase.strip())


@dataclass(frozen=True, slots=True)
class UtteranceSettings:
    remember: tuple[str, ...] = key(
        _phrases(
            """
            ^remember, please remember, just remember, always remember, can you remember, could you remember
            remind me to, remind me that, remind me about, ^remind me, ^do not forget, ^don't forget, ^never forget
            please don't forget, please do not forget, keep in mind, bear in mind, make a note, take a note, ^note that
            please note, for the record, write this down, write that down, write it down, mark my words
            ^tandaan, tandaan mo*, tandaan nin*, pakitandaan, huwag mong kalimutan, wag mong kalimutan, huwag kalimutan
            wag kalimutan, huwag ninyong kalimutan, wag niyong kalimutan, ipaalala mo, paalalahanan mo, isulat mo
            pakisulat, ilista mo, itala mo, isaisip mo, mahalagang malaman mo
            """
        ),
        "Phrases that ask to remember something.",
        noun=PHRASE,
        check=_phrase,
    )
    preference: tuple[str, ...] = key(
        _phrases(
            """
            i like, i really like, i love, i really love, i enjoy, i prefer, i would rather, i'd rather, i hate
            i dislike, i don't like, i do not like, i can't stand, i cannot stand, i'm allergic, i am allergic
            allergic to, i'm a fan of, i am a fan of, i'm into, i never eat, i don't eat, i do not eat, i always
            my favorite*, my favourite*, favorite of mine, favourite of mine
            gusto ko*, gustong gusto ko*, mas gusto ko*, ayaw ko*, ayoko*, paborito ko*, paborito kong, mahilig ako
            hilig ko*, mahal ko*, hindi ako kumakain, hindi ako umiinom, allergic ako, allergy ako, may allergy ako
            bawal sa akin, bawal ako
            """
        ),
        "Phrases that tell what somebody likes, prefers or cannot stand.",
        noun=PHRASE,
        check=_phrase,
    )
    about_self: tuple[str, ...] = key(
        _phrases(
            """
            my name is, call me, i was born, i live in, i live at, i'm from, i am from, i work at, i work as, i work for
            i moved to, i'm married, i am married, my wife, my husband, my partner, my son, my daughter, my mother
            my father, my brother, my sister, my birthday, my phone, my address, my email, my job, i'm planning to
            i am planning to, i plan to, i decided to, i've decided to, i got a job, i lost my job
            ako si, ang pangalan ko, pangalan ko*, tawagin mo akong, ipinanganak ako, nakatira ako, taga-* ako
            may asawa ako, may anak ako, may trabaho ako
            nagtatrabaho ako, trabaho ko*, asawa ko*, anak ko*, nanay ko*, tatay ko*, kapatid ko*, kaarawan ko*
            birthday ko*, numero ko*, tirahan ko*, balak ko*, plano ko*, nagpasya ako, lumipat ako
            """
        ),
        "Phrases that tell a fact about the speaker.",
        noun=PHRASE,
        check=_phrase,
    )
    date: tuple[str, ...] = key(
        _phrases(
            """
            january, february, march #, # march, in march, april, may #, # may, in may, june, july, august, september
            october, november, december, monday, tuesday, wednesday, thursday, friday, saturday, sunday, today, tonight
            tomorrow, yesterday, this morning, this evening, this weekend, this week, this month, this year, last night
            last weekend, last week, last month, last year, next weekend, next week, next month, next year, days ago
            weeks ago, months ago, years ago, a week ago, a month ago, a year ago, in # days, in # weeks, in # months
            enero, pebrero, marso, abril, mayo, hunyo, hulyo, agosto, setyembre, oktubre, nobyembre, disyembre, lunes
            martes, miyerkules, huwebes, biyernes, sabado, linggo, ngayong araw, ngayong gabi, ngayong umaga
            ngayong linggo, ngayong buwan, ngayong taon, kagabi, kahapon, kamakalawa, bukas, sa makalawa, mamayang gabi
            sa susunod na linggo, sa susunod na buwan, sa susunod na taon, noong isang araw, noong isang linggo
            noong nakaraang linggo, noong nakaraang buwan, noong nakaraang taon, araw ang nakalipas
            """
        ),
        "Words for a date or a day.",
        noun=PHRASE,
        check=_phrase,
    )
    question: tuple[str, ...] = key(
        _phrases(
            """
            what, what's, who, who's, whom, whose, which, when, where, why, how, how's, do you, does, did you, are you
            is it, is there, have you, can you, could you, would you, will you, should i
            ano*, sino*, kailan, saan, nasaan, bakit, paano, papaano, magkano, ilan, alin, gaano, kanino, pwede ba
            puwede ba, maaari ba, may alam ka ba
            """
        ),
        "Phrases that begin a question.",
        noun=PHRASE,
        check=_phrase,
    )
    small_talk: tuple[str, ...] = key(
        _phrases(
            """
            hi, hello, hey, good morning, good afternoon, good evening, good night, bye, goodbye, see you, take care
            thanks, thank you, you're welcome, no problem, ok, okay, sure, yes, yeah, yep, no, nope, wow, cool, great
            nice, awesome, amazing, lol, haha*, hmm*, sounds good, sounds great, got it, i see
            kumusta*, kamusta*, magandang umaga, magandang hapon, magandang gabi, paalam, ingat*, salamat*
            maraming salamat, walang anuman, oo, opo, hindi, hindi po, sige*, talaga, ganun ba, ganoon ba, galing, ayos
            """
        ),
        "Greetings, thanks and the like, which say nothing that lasts.",
        noun=PHRASE,
        check=_phrase,
    )
