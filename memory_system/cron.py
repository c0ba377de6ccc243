"""When something recurs: five cron fields, or an interval. Pure, and all in UTC, where no clock is ever put back.

Times are whole epoch seconds. The instants of a recurrence depend on nothing but its text, so that any process, at any
later time, finds the same ones.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final, Protocol

_UNITS_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_MAX_INTERVAL_S: Final = 366 * 86_400
_DAY_MIN: Final = 1440
# The longest time without a day that fits: from the 29th of February 2096 to that of 2104.
_MAX_DAYS: Final = 8 * 366
_EPOCH: Final = date(1970, 1, 1)
_MONTHS: Final = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS: Final = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_PART: Final = re.compile(r"(?:(?P<all>\*)|(?P<low>\w+)(?:-(?P<high>\w+))?)(?:/(?P<step>\d+))?")


class Recurrence(Protocol):
    """An endless series of instants."""

    def latest(self, now_s: float) -> int:
        """The last instant that is not after `now_s`."""

    def following(self, now_s: float) -> int:
        """The first instant after `now_s`."""


@dataclass(frozen=True, slots=True)
class Interval:
    """The multiples of so many seconds since the epoch: every 6 h is 00:00, 06:00, 12:00 and 18:00."""

    interval_s: int

    def latest(self, now_s: float) -> int:
        return int(now_s // self.interval_s) * self.interval_s

    def following(self, now_s: float) -> int:
        return self.latest(now_s) + self.interval_s


@dataclass(frozen=True, slots=True)
class Cron:
    """The minutes that five fields name. As in cron(8), one kind of day is enough where both are restricted."""

    minutes: tuple[int, ...]  # of the day, from 0 to 1439, ascending
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]  # 0 is Sunday
    either_day: bool

    def latest(self, now_s: float) -> int:
        now_min = int(now_s // 60)
        for start_min in self._days(now_min // _DAY_MIN, -1):
            count = bisect.bisect_right(self.minutes, now_min - start_min)
            if count:
                return (start_min + self.minutes[count - 1]) * 60
        raise ValueError("no day fits")

    def following(self, now_s: float) -> int:
        now_min = int(now_s // 60)
        for start_min in self._days(now_min // _DAY_MIN, 1):
            count = bisect.bisect_right(self.minutes, now_min - start_min)
            if count < len(self.minutes):
                return (start_min + self.minutes[count]) * 60
        raise ValueError("no day fits")

    def _days(self, day: int, step: int) -> Iterator[int]:
        """The first minute of each day that fits, from this day on; both since the epoch."""
        for each in range(day, day + step * _MAX_DAYS, step):
            if self._fits(_EPOCH + timedelta(days=each)):
                yield each * _DAY_MIN

    def _fits(self, day: date) -> bool:
        by_day, by_weekday = day.day in self.days, day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and ((by_day or by_weekday) if self.either_day else (by_day and by_weekday))


def parse_cron(text: str) -> Cron:
    """Minute, hour, day of month, month and day of week (0 and 7 are Sunday), with lists, ranges, steps and names.

    Raises ValueError, also for what never happens, such as the 30th of February.
    """
    fields = text.lower().split()
    if len(fields) != 5:
        raise ValueError("not five fields")
    minutes, hours, days = _field(fields[0], 0, 59), _field(fields[1], 0, 23), _field(fields[2], 1, 31)
    weekdays = frozenset(day % 7 for day in _field(fields[4], 0, 7, _WEEKDAYS))
    cron = Cron(
        minutes=tuple(hour * 60 + minute for hour in sorted(hours) for minute in sorted(minutes)),
        days=days,
        months=_field(fields[3], 1, 12, ("", *_MONTHS)),
        weekdays=weekdays,
        either_day=not fields[2].startswith("*") and not fields[4].startswith("*"),
    )
    cron.following(0.0)
    return cron


def parse_interval(text: str) -> int:
    """Seconds of `90s`, `15m`, `6h` or `1d`. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,9})([smhd])", text.strip().lower())
    interval_s = int(found[1]) * _UNITS_S[found[2]] if found else 0
    if not 1 <= interval_s <= _MAX_INTERVAL_S:
        raise ValueError("not an interval from 1s to 366d")
    return interval_s


def _field(text: str, low: int, high: int, names: Sequence[str] = ()) -> frozenset[int]:
    return frozenset(value for part in text.split(",") for value in _part(part, low, high, names))


def _part(text: str, low: int, high: int, names: Sequence[str]) -> range:
    found = _PART.fullmatch(text)
    if found is None:
        raise ValueError(f"{text} is no part of a cron field")
    step = int(found["step"] or 1)
    if found["all"]:
        # The days of the week go to 7, which is 0 once more.
        first, last = low, min(high, 6) if names == _WEEKDAYS else high
    else:
        first = _value(found["low"], names)
        # `5/15` goes on to the end, `5` alone does not.
        last = _value(found["high"], names) if found["high"] else (high if found["step"] else first)
    if not (low <= first <= last <= high and step):
        raise ValueError(f"{text} is not from {low} to {high}")
    return range(first, last + 1, step)


def _value(text: str, names: Sequence[str]) -> int:
    return names.index(text) if text in names and text else int(text)
