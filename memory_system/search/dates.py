"""Dates that a question names in English or as 2023-05-07, and how near to them something occurred."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_NAMES_LISTED: Final = "january february march april may june july august september october november december"
_MONTHS: Final = tuple(_NAMES_LISTED.split())
_NAMES: Final = {name[:length]: at for at, name in enumerate(_MONTHS, 1) for length in (3, len(name))} | {"sept": 9}
_SHORT_NAMES: Final = tuple(name[:3] for name in _MONTHS)
_NAME: Final = "|".join(sorted(_NAMES, key=len, reverse=True))
_DAY: Final = r"(?P<day>[0-3]?\d)(?:st|nd|rd|th)?"
_YEAR: Final = r"(?P<year>(?:19|20)\d\d)"
_FORMS: Final = tuple(
    re.compile(form, re.IGNORECASE | re.ASCII)
    for form in (
        r"\b(?P<year>(?:19|20)\d\d)-(?P<number>[01]\d)-(?P<day>[0-3]\d)\b",
        rf"\b{_DAY}\s+(?:of\s+)?(?P<name>{_NAME})\b\.?(?:,?\s+{_YEAR}\b)?",
        rf"\b(?P<name>{_NAME})\b\.?\s+{_DAY}\b(?:,?\s+{_YEAR}\b)?",
        rf"\b(?P<name>{_NAME})\b\.?,?\s+(?:of\s+)?{_YEAR}\b",
    )
)
# Without day and year: a full name with a capital, behind a preposition, for "may" and "march" are words, too. Some
# months are also people: what is "for June" or "of April" may be theirs.
_CALENDAR: Final = r"\b(?:[Ii]n|[Dd]uring|[Ss]ince|[Uu]ntil|last|this)\s+"
_ANY: Final = r"\b(?:[Bb]y|of|for)\s+(?!April|May|June|August)"
_BARE: Final = re.compile(rf"(?:{_CALENDAR}|{_ANY})(?P<name>{_NAMES_LISTED.title().replace(' ', '|')})\b")
# People tell of a day for some days after it, and of a month in the one after it.
_TOLD_AFTER_DAYS: Final = 10
_TOLD_AFTER: Final = 0.6
_MONTH: Final = 0.7
_MONTH_AFTER: Final = 0.3


@dataclass(frozen=True, slots=True)
class Date:
    """What a question says of a date: a month at least."""

    month: int
    day: int | None = None
    year: int | None = None


def dates(text: str) -> tuple[Date, ...]:
    """The dates in a text, each once; a month that stands in a whole date is none of its own."""
    lowered = text.lower()
    if "-" not in text and not any(name in lowered for name in _SHORT_NAMES):
        return ()  # as in most texts
    found: dict[Date, None] = {}
    for form in (*_FORMS, _BARE):
        matches = list(form.finditer(text))
        for match in matches:
            date = _date(match.groupdict())
            if date is not None:
                found[date] = None
        if matches:
            text = form.sub(" ", text)
    return tuple(found)


def _date(parts: dict[str, str | None]) -> Date | None:
    number, name, day, year = (parts.get(part) for part in ("number", "name", "day", "year"))
    month = int(number) if number else _NAMES[(name or "").lower()]
    date = Date(month, int(day) if day else None, int(year) if year else None)
    return date if 1 <= month <= 12 and (date.day is None or 1 <= date.day <= 31) else None


def nearness(asked: tuple[Date, ...], occurred_at: Floats) -> Floats:
    """How near each time (epoch seconds; NaN: not known) is to the nearest of the dates: 0..1.

    A day: 1 on it and the day before, which it is in other time zones; .6 up to ten days later. A month: .7 in it,
    .3 in the next one. A date without a year is one of any year.
    """
    near = np.zeros(len(occurred_at))
    if not asked:
        return near
    known = np.flatnonzero(np.isfinite(occurred_at))
    if len(known):
        days = np.floor(occurred_at[known] / 86_400.0).astype("datetime64[D]")
        near[known] = np.maximum.reduce([_near(date, days) for date in asked])
    return near


def _near(date: Date, days: npt.NDArray[np.datetime64]) -> Floats:
    months = days.astype("datetime64[M]")
    numbers = months.astype(np.int64)  # since January 1970
    if date.year is None:  # the latest such month that is not after the next one
        later = (numbers - (date.month - 1) + 1) % 12 - 1
    else:
        later = numbers - (12 * (date.year - 1970) + date.month - 1)
    if date.day is None:
        return np.where(later == 0, _MONTH, np.where(later == 1, _MONTH_AFTER, 0.0))
    start = (months - later.astype("timedelta64[M]")).astype("datetime64[D]")
    days_later = (days - start).astype(np.int64) - (date.day - 1)
    told_after = (days_later > 0) & (days_later <= _TOLD_AFTER_DAYS)
    return np.where((days_later == 0) | (days_later == -1), 1.0, np.where(told_after, _TOLD_AFTER, 0.0))
