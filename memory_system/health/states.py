"""The state of each component, decided from what was observed of it. Pure: every time is a parameter.

    state     when
    starting  its process runs and has not answered yet, for at most start_s; or it answers that it is starting, and
              has not been healthy since its start
    healthy   it answers, and nothing below holds
    degraded  it says so itself; or its answers take longer than slow_ms, or stay out while heartbeats come; or the
              disk has less than min_free_mb free; or more than max_files_share of its open files are in use; or it
              is stopping, however long that takes
    down      its process ended, or supervisor has given up on it (at once); or it hangs: it runs, for hang_s there was
              neither an answer nor a heartbeat, and for three quarters of that it owes an answer; or it says itself
              that it is down
    flapping  flap_deaths deaths within flap_window_s, until flap_quiet_s passed without one

Healthy turns to degraded, and degraded to healthy, when the condition held for steady_s; every other change is made
at once. Each death is announced as down (or flapping), also when the next process runs before anybody looked. A late
answer is an answer: what is slow is never down. Stops that were asked for are announced, but do not count as deaths
for flapping. Who only sends heartbeats is down after three of them are missing, and forgotten after 24 hours; one that
says that it stops is `down` because of it then, or when it says that it stopped, and forgotten after flap_quiet_s.

Silence counts only while somebody listens: if the observer itself was held up, that time is taken off.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from memory_system.health.life import GIVEN_UP, Life, Process, Sign, Verdict
from memory_system.health.memory import FORGET_S
from memory_system.health_settings import HealthSettings

MISSED_HEARTBEATS: Final = 3
# An observer that looks less often than this was held up itself.
BLIND_S: Final = 2.0
# Of hang_s: the time that a program has for an answer, however long before it was asked it gave its last sign.
_ANSWER_SHARE: Final = 0.75
_SOFT: Final = frozenset({"healthy", "degraded"})
_ENDED: Final = frozenset({"EXITED", "FATAL", "BACKOFF"})
_FORMER_PIDS: Final = 8


@dataclass(frozen=True, slots=True)
class State:
    """`cause` is short and stable ("" when healthy), `reason` is for a person, `since_s` is monotonic seconds."""

    state: str
    cause: str
    reason: str
    since_s: float


class Component:
    """One component. Every method takes the monotonic time; what it returns are the changes to announce, oldest first.

    `heartbeat_s` is given for a component that only sends heartbeats, at that interval; all others are asked.
    """

    def __init__(self, rules: HealthSettings, now_s: float, *, heartbeat_s: float | None = None) -> None:
        self.process: Process | None = None
        self.deaths = 0
        self.state = State("starting", "starting", "waiting for its first sign of life", now_s)
        self._rules = rules
        self.heartbeat_s = heartbeat_s
        self._life = Life(now_s)
        self._now_s = self._announced_s = now_s
        self._soft_since_s: float | None = None
        self._ended_start: int | None = None
        self._former_pids: deque[int] = deque(maxlen=_FORMER_PIDS)
        self._recent_deaths: deque[float] = deque()
        self._flapping = False
        self._last_end = ""

    def __repr__(self) -> str:
        return f"<Component {self.state.state} pid={self.pid} deaths={self.deaths}: {self.state.reason}>"

    @property
    def pid(self) -> int:
        """The process that is known to live, 0 when there is none."""
        return self._life.pid

    @property
    def latency_ms(self) -> float | None:
        return self._life.latency_ms

    @property
    def figures(self) -> Mapping[str, Any]:
        """What its last answer said beside its state."""
        return self._life.figures

    # -- what is observed -------------------------------------------------------------------------------------

    def supervised(self, process: Process | None, now_s: float) -> list[State]:
        """What supervisor says of it; None when there is no supervisor to ask."""
        self._advance(now_s)
        before, self.process = self.process, process
        if process is None:
            return self._settle(now_s)
        asked_for = self._life.stopping or process.statename == "STOPPED"
        asked_for = asked_for or (before is not None and before.statename == "STOPPING")
        if process.alive:
            return self._lives(process, asked_for, now_s)
        ended_unseen = process.statename in _ENDED and process.start != self._ended_start
        self._ended_start = process.start
        if self.pid or ended_unseen:
            return self._die(process.ended(self.pid), asked_for, now_s)
        return self._settle(now_s)

    def _lives(self, process: Process, asked_for: bool, now_s: float) -> list[State]:
        changes = []
        if self.pid != process.pid:
            if self.pid:
                changes = self._die(f"its process (pid {self.pid}) ended", asked_for, now_s)
            self._life = Life(now_s, process.pid, process.age_s)
        self._life.stopping = self._life.stopping or process.statename == "STOPPING"
        return changes + self._settle(now_s)

    def sign(self, sign: Sign, now_s: float) -> list[State]:
        """An answer or a heartbeat; one of another process than supervisor's says nothing of this one."""
        self._advance(now_s)
        if not self.expects(sign):
            return []
        changes = []
        if sign.pid and self.pid and sign.pid != self.pid:
            # Where two processes of one name take turns, a pid that was seen before is no new start.
            if sign.pid in self._former_pids:
                self._former_pids.append(self.pid)
            else:
                changes = self._die(f"its process (pid {self.pid}) ended", self._life.stopping, now_s)
        if sign.is_heartbeat and self.heartbeat_s is None:
            sign = replace(sign, figures={})  # its answers say more
        self._life.take(sign, now_s)
        return changes + self._settle(now_s)

    def asked(self, now_s: float) -> None:
        """It was asked, and has not answered yet."""
        self._advance(now_s)
        if self._life.waiting_s is None:
            self._life.waiting_s = now_s

    def look(self, now_s: float) -> list[State]:
        """Nothing new, but time has passed. To be called more often than every BLIND_S."""
        self._advance(now_s)
        return self._settle(now_s)

    def _advance(self, now_s: float) -> None:
        blind_s = now_s - self._now_s - BLIND_S
        self._now_s = now_s
        if blind_s > 0.0:
            self._life.shift(blind_s)
            self._soft_since_s = None if self._soft_since_s is None else self._soft_since_s + blind_s

    # -- what follows from it ---------------------------------------------------------------------------------

    def expects(self, sign: Sign) -> bool:
        """Whether a sign of life is of this component: anybody on this host may send heartbeats in its name, so its pid
        is supervisor's, or that of who answers at its address; who is never asked is known by heartbeats alone."""
        if self.process is not None:
            return sign.pid in (None, self.process.pid)
        return sign.pid in (None, self.pid) or not sign.is_heartbeat or self.heartbeat_s is not None

    def hangs(self) -> bool:
        """Whether killing its process is the remedy; for nothing else that can be wrong it is."""
        alive = self.process is not None and self.process.alive
        return alive and self.state.state == "down" and self.state.cause == "hang"

    def is_unclear(self) -> bool:
        """Whether the next answer may change its state, so that it is worth asking soon."""
        return self._life.waiting_s is not None or self._soft_since_s is not None or self.state.state not in _SOFT

    def silence_s(self, now_s: float) -> float:
        """Seconds since its last sign of life, or since its process was first seen."""
        return self._life.silence_s(now_s)

    def is_forgotten(self, now_s: float) -> bool:
        kept_s = self._rules.flap_quiet_s if self.state.cause == "stopped" else FORGET_S
        return self.heartbeat_s is not None and self.silence_s(now_s) >= kept_s

    def recent_deaths_s(self) -> tuple[float, ...]:
        """When it died, as far as that still counts for flapping."""
        return tuple(self._recent_deaths)

    def recall(self, state: str, deaths_s: Sequence[float], now_s: float) -> None:
        """Go on from what the manager before this one knew: whether it was down or flapping, and its last deaths."""
        self._recent_deaths.extend(deaths_s)
        self.deaths, self._flapping = len(deaths_s), state == "flapping" and bool(deaths_s)
        self._last_end = "before the health manager started" if deaths_s else ""
        verdict = self._flaps(now_s)
        if state == "down" and self.heartbeat_s is not None:
            verdict = Verdict("down", "silent", "no heartbeat since before the health manager started")
        if verdict is not None:
            self.state = State(verdict.state, verdict.cause, verdict.reason, now_s)

    # -- deaths -----------------------------------------------------------------------------------------------

    def _die(self, reason: str, asked_for: bool, now_s: float) -> list[State]:
        """Announce the end of a process, whatever came after it."""
        if self.pid:
            self._former_pids.append(self.pid)
        self._life = Life(now_s)
        self._last_end = reason
        if not asked_for:
            self._count_death(now_s)
        if self.process is not None and not self.process.alive:
            verdict = self._judge(now_s)
        else:
            verdict = self._flaps(now_s) or Verdict("down", "stopped" if asked_for else "died", reason)
        return [self._announce(verdict, now_s, now_s)]

    def _count_death(self, now_s: float) -> None:
        self.deaths += 1
        recent = self._recent_deaths
        recent.append(now_s)
        while recent[0] <= now_s - self._rules.flap_window_s:
            recent.popleft()
        self._flapping = self._flapping or len(recent) >= self._rules.flap_deaths

    def _flaps(self, now_s: float) -> Verdict | None:
        if self._flapping and now_s - self._recent_deaths[-1] >= self._rules.flap_quiet_s:
            self._flapping = False
            self._recent_deaths.clear()
        if not self._flapping:
            return None
        number = len(self._recent_deaths)
        reason = f"{number} deaths within {self._rules.flap_window_s:g} s, the last: {self._last_end}"
        return Verdict("flapping", "flapping", reason)

    # -- hysteresis -------------------------------------------------------------------------------------------

    def _settle(self, now_s: float) -> list[State]:
        verdict, current = self._judge(now_s), self.state
        if (verdict.state, verdict.cause) == (current.state, current.cause):
            self._soft_since_s = None
            self.state = replace(current, reason=verdict.reason)
            return []
        if self._has_to_wait(verdict, now_s):
            return []
        return [self._announce(verdict, current.since_s if verdict.state == current.state else now_s, now_s)]

    def _has_to_wait(self, verdict: Verdict, now_s: float) -> bool:
        """For a change between healthy and degraded, or from one cause of degraded to another."""
        if self.state.state not in _SOFT or verdict.state not in _SOFT or verdict.cause == "stopping":
            return False
        if verdict.state == self.state.state:
            self._soft_since_s = None
            return now_s - self._announced_s < self._rules.steady_s
        if self._soft_since_s is None:
            self._soft_since_s = now_s
        return now_s - self._soft_since_s < self._rules.steady_s

    def _announce(self, verdict: Verdict, since_s: float, now_s: float) -> State:
        self._soft_since_s = None
        self._announced_s = now_s
        self._life.was_ready = self._life.was_ready or verdict.state in _SOFT
        self.state = State(verdict.state, verdict.cause, verdict.reason, since_s)
        return self.state

    # -- the table --------------------------------------------------------------------------------------------

    def _judge(self, now_s: float) -> Verdict:
        """What the table says of this moment, without the hysteresis."""
        process = self.process
        if process is not None and process.statename in GIVEN_UP:
            return Verdict("down", GIVEN_UP[process.statename], process.given_up(self._last_end))
        flapping = self._flaps(now_s)
        if flapping is not None:
            return flapping
        if process is not None and not process.alive:
            return Verdict("down", "died", self._last_end or process.ended(0))
        silent = self._judge_silence(now_s) if self.heartbeat_s is None else self._judge_missed(now_s)
        return silent or self._life.judge(self._rules, now_s)

    def _judge_silence(self, now_s: float) -> Verdict | None:
        """Of a component that is asked."""
        life, rules = self._life, self._rules
        if life.stopping:
            return Verdict("degraded", "stopping", "it is stopping")
        silence_s = life.silence_s(now_s)
        # One that was old already when this observer came has had its time to start.
        starts = life.sign_s is None and self.process is not None
        limit_s = max(rules.hang_s, rules.start_s - life.age_s) if starts else rules.hang_s
        if silence_s >= limit_s and life.unanswered_s(now_s) >= _ANSWER_SHARE * rules.hang_s:
            return Verdict("down", "hang", f"no sign of life for {silence_s:.0f} s{_by_hand(rules, self.process)}")
        if life.sign_s is None:
            return Verdict("starting", "starting", "waiting for its first sign of life")
        return None

    def _judge_missed(self, now_s: float) -> Verdict | None:
        """Of a component that only sends heartbeats."""
        silence_s, stopping = self.silence_s(now_s), self._life.stopping
        if self._life.said == "stopped":
            return Verdict("down", "stopped", "it said that it stopped")
        if self._life.sign_s is None and self.heartbeat_s is not None:  # known from the manager before this one
            if self.state.state == "down" or silence_s >= MISSED_HEARTBEATS * self.heartbeat_s:
                return Verdict("down", "silent", "no heartbeat since before the health manager started")
            return Verdict("starting", "starting", "waiting for its first sign of life")
        if self.heartbeat_s is None or silence_s < MISSED_HEARTBEATS * self.heartbeat_s:
            return Verdict("degraded", "stopping", "it is stopping") if stopping else None
        if stopping:
            return Verdict("down", "stopped", "it said that it was stopping, and nothing since")
        return Verdict("down", "silent", f"no heartbeat for {silence_s:.0f} s")


def _by_hand(rules: HealthSettings, process: Process | None) -> str:
    """What a person has to know of a hang that nothing here ends."""
    if not rules.heal:
        return "; healing is off (health.heal): restart it by hand"
    return "" if process is not None else "; no supervisor runs it: restart it by hand"
