"""What is known of one process of a component, from its start to its end, and what its answers say of it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from memory_system.health_settings import HealthSettings

# What supervisor will not start again by itself, and what that is called here. An exit is no such word: what comes
# back at once goes through it too.
GIVEN_UP: Final = {"FATAL": "given_up", "STOPPED": "stopped", "UNKNOWN": "unknown"}
STOPPING: Final = frozenset({"stopping", "draining", "stopped"})
_ALIVE: Final = frozenset({"STARTING", "RUNNING", "STOPPING"})
_USABLE: Final = frozenset({"ready", "off"})
_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Verdict:
    """A state, its cause (short and stable, "" when healthy) and its reason for a person."""

    state: str
    cause: str
    reason: str


@dataclass(frozen=True, slots=True)
class Process:
    """A program as supervisor sees it. `pid` is 0 if there is none; it began at `start`, epoch seconds, `age_s` ago."""

    statename: str
    pid: int = 0
    start: int = 0
    exitstatus: int = 0
    spawnerr: str = ""
    age_s: float = field(default=0.0, compare=False)

    @property
    def alive(self) -> bool:
        return self.pid > 0 and self.statename in _ALIVE

    @property
    def end(self) -> str:
        """How it ended, as far as supervisor knows: a few words that follow `ended`, or none."""
        # Of one that ended soon after its start, and of one that was started again, supervisor keeps no status.
        known = self.statename == "EXITED" or (self.statename == "FATAL" and self.exitstatus)
        if not known or self.alive:
            return ""
        return " by a signal" if self.exitstatus < 0 else f" with exit status {self.exitstatus}"

    def ended(self, pid: int) -> str:
        """That it ended, for a person; `pid` is 0 where no process of it was seen."""
        return f"its process (pid {pid}) ended{self.end}" if pid else f"its process ended{self.end}"

    def given_up(self, last_end: str) -> str:
        """Why supervisor does not start it again; `last_end` is what was told of its last process."""
        if self.statename == "STOPPED":
            return "stopped through supervisor"
        if self.statename == "UNKNOWN":
            return "supervisor does not know it"
        return f"supervisor has given up on it: {self.spawnerr or last_end or self.ended(0)}"


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign of life. `state` is what it says of itself; `latency_ms` is None when this answer was not timed."""

    state: str
    pid: int | None = None
    is_heartbeat: bool = False
    latency_ms: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Life:
    """One process; times are monotonic seconds.

    `born_s` is when it was first seen, `age_s` how old it was then; `waiting_s` is when it was asked what it has not
    answered yet.
    """

    born_s: float
    pid: int = 0
    age_s: float = 0.0
    sign_s: float | None = None
    waiting_s: float | None = None
    answered: bool = False
    said: str = ""
    stopping: bool = False
    was_ready: bool = False
    latency_ms: float | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)

    def take(self, sign: Sign, now_s: float) -> None:
        self.pid = sign.pid or self.pid
        self.sign_s = now_s
        # Who signed off may sign on again, in the same process.
        self.stopping = (self.stopping and self.said != "stopped") or sign.state in STOPPING
        self.said = sign.state
        if not sign.is_heartbeat:
            self.answered = True
            self.waiting_s = None
        if sign.latency_ms is not None:
            self.latency_ms = sign.latency_ms
        if sign.figures:
            self.figures = sign.figures

    def shift(self, seconds: float) -> None:
        """Take off time in which nobody listened."""
        self.born_s += seconds
        self.sign_s = None if self.sign_s is None else self.sign_s + seconds
        self.waiting_s = None if self.waiting_s is None else self.waiting_s + seconds

    def silence_s(self, now_s: float) -> float:
        """Seconds since its last sign of life, or since it was first seen."""
        return now_s - (self.born_s if self.sign_s is None else self.sign_s)

    def unanswered_s(self, now_s: float) -> float:
        return 0.0 if self.waiting_s is None else now_s - self.waiting_s

    def judge(self, rules: HealthSettings, now_s: float) -> Verdict:
        """The state of a process that gives signs of life."""
        if self.said == "down":
            return Verdict("down", "reported", self._own_words())
        if self.said == "starting" and not self.was_ready:
            return Verdict("starting", "starting", self._own_words())
        found = list(self._complaints(rules, now_s))
        if not found:
            return Verdict("healthy", "", "it answers" if self.answered else "its heartbeats come")
        return Verdict("degraded", "+".join(cause for cause, _ in found), "; ".join(reason for _, reason in found))

    def _complaints(self, rules: HealthSettings, now_s: float) -> Iterator[tuple[str, str]]:
        """Cause and reason of everything that makes it degraded."""
        if self.said not in ("healthy", ""):
            yield "reported", self._own_words()
        unanswered_s = self.unanswered_s(now_s)
        if unanswered_s * 1000.0 > rules.slow_ms:
            yield "slow", f"no answer for {unanswered_s:.0f} s"
        elif self.latency_ms is not None and self.latency_ms > rules.slow_ms:
            yield "slow", f"an answer took {self.latency_ms:.0f} ms, more than {rules.slow_ms:g}"
        free_bytes = self._number("disk_free_bytes")
        if free_bytes is not None and free_bytes < rules.min_free_mb * _MIB:
            yield "disk", f"{free_bytes / _MIB:.0f} MiB of disk space free, less than {rules.min_free_mb:g}"
        used, limit = self._number("open_files"), self._number("open_files_limit")
        if used is not None and limit and used > rules.max_files_share * limit:
            yield "files", f"{used:.0f} of {limit:.0f} open files in use"

    def _own_words(self) -> str:
        readiness = self.figures.get("readiness")
        parts = readiness.items() if isinstance(readiness, Mapping) else ()
        wrong = ", ".join(f"{part} {state}" for part, state in parts if state not in _USABLE)
        return f"it says {self.said}: {wrong}" if wrong else f"it says {self.said}"

    def _number(self, name: str) -> float | None:
        value = self.figures.get(name)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
