"""The states of a component: the table line by line, then its promises under histories that nobody thought of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_system.health.life import Process, Sign
from memory_system.health.memory import FORGET_S
from memory_system.health.states import BLIND_S, Component, State
from memory_system.health_settings import HealthSettings

RULES = HealthSettings(flap_deaths=4, flap_window_s=100.0, flap_quiet_s=40.0)
STEP_S = 0.25
# The longest silence before a hang is noticed: asked just before the last sign, and three quarters after the next.
HANG_S = RULES.check_s + 0.75 * RULES.hang_s
RUNNING = Process("RUNNING", pid=11, start=1)


def names(changes: list[State]) -> list[str]:
    return [change.state for change in changes]


class Clocked:
    """A component and its clock, which only moves in steps that an observer would make."""

    def __init__(self, rules: HealthSettings = RULES, *, heartbeat_s: float | None = None) -> None:
        self.now_s = 1000.0
        self.component = Component(rules, self.now_s, heartbeat_s=heartbeat_s)
        self.changes: list[State] = []

    @property
    def state(self) -> str:
        return self.component.state.state

    @property
    def cause(self) -> str:
        return self.component.state.cause

    def supervised(self, process: Process | None) -> list[str]:
        return self._note(self.component.supervised(process, self.now_s))

    def sign(self, state: str = "healthy", pid: int | None = 11, **fields: Any) -> list[str]:
        return self._note(self.component.sign(Sign(state, pid, **fields), self.now_s))

    def beat(self, state: str = "healthy", pid: int | None = 11, **fields: Any) -> list[str]:
        return self.sign(state, pid, is_heartbeat=True, **fields)

    def ask(self) -> None:
        self.component.asked(self.now_s)

    def wait(self, seconds: float, *, answers: Sign | None = None) -> list[str]:
        """Let time pass; with `answers` it answers so at every step."""
        found: list[str] = []
        for _ in range(round(seconds / STEP_S)):
            self.now_s += STEP_S
            if answers is not None:
                found += self._note(self.component.sign(answers, self.now_s))
            found += self._note(self.component.look(self.now_s))
        return found

    def _note(self, changes: list[State]) -> list[str]:
        self.changes += changes
        return names(changes)


@pytest.fixture
def healthy() -> Clocked:
    clocked = Clocked()
    clocked.supervised(RUNNING)
    assert clocked.sign() == ["healthy"]
    return clocked


# -- the table ------------------------------------------------------------------------------------------------------


def test_it_starts_until_its_first_answer() -> None:
    clocked = Clocked()
    assert clocked.supervised(RUNNING) == []
    clocked.ask()
    assert clocked.wait(RULES.start_s - 1.0) == []
    assert clocked.state == "starting"
    assert clocked.sign() == ["healthy"]


def test_a_start_that_takes_too_long_is_a_hang() -> None:
    clocked = Clocked()
    clocked.supervised(RUNNING)
    clocked.ask()
    assert clocked.wait(RULES.start_s + 1.0) == ["down"]
    assert clocked.component.hangs()


@pytest.mark.parametrize(("age_s", "patience_s"), [(0.0, 60.0), (45.0, 15.0), (55.0, 10.0), (9999.0, 10.0)])
def test_the_time_to_start_runs_from_the_start_and_not_from_when_it_was_first_seen(
    age_s: float, patience_s: float
) -> None:
    clocked = Clocked()
    clocked.supervised(replace(RUNNING, age_s=age_s))
    clocked.ask()
    assert clocked.wait(patience_s - STEP_S) == []
    assert clocked.wait(STEP_S) == ["down"]
    assert clocked.component.hangs()


def test_the_reason_of_being_healthy(healthy: Clocked) -> None:
    assert healthy.component.state.reason == "it answers"
    beating = Clocked(heartbeat_s=5.0)
    beating.beat()
    assert beating.component.state.reason == "its heartbeats come"


def test_who_says_that_it_starts_may_take_as_long_as_it_likes() -> None:
    clocked = Clocked()
    clocked.supervised(RUNNING)
    answer = Sign("starting", 11, figures={"readiness": {"embedding": "loading", "redis": "off", "store": "ready"}})
    assert clocked.wait(3 * RULES.start_s, answers=answer) == []
    assert clocked.component.state.reason == "it says starting: embedding loading"
    assert clocked.sign() == ["healthy"]


def test_who_starts_anew_inside_after_it_was_healthy_is_degraded(healthy: Clocked) -> None:
    assert healthy.wait(RULES.steady_s + 1.0, answers=Sign("starting", 11)) == ["degraded"]


@pytest.mark.parametrize("restarted", [False, True])
def test_a_death_is_announced_even_if_nobody_saw_it(healthy: Clocked, restarted: bool) -> None:
    if not restarted:
        assert healthy.supervised(Process("EXITED", start=1, exitstatus=-1)) == ["down"]
        assert healthy.component.state.reason == "its process (pid 11) ended by a signal"
    changes = healthy.supervised(Process("STARTING", pid=12, start=3))
    assert changes == (["down", "starting"] if restarted else ["starting"])
    assert healthy.sign(pid=12) == ["healthy"]
    assert healthy.component.deaths == 1


def test_each_failed_start_is_a_death_though_no_process_was_seen() -> None:
    clocked = Clocked()
    for start in (1, 2, 3):
        assert clocked.supervised(Process("BACKOFF", start=start, exitstatus=1)) == ["down"]
        assert clocked.supervised(Process("BACKOFF", start=start, exitstatus=1)) == []
    assert clocked.component.deaths == 3


@pytest.mark.parametrize(
    ("process", "reason"),
    [
        (Process("FATAL", start=1, spawnerr="Exited too quickly"), "supervisor has given up on it: Exited too quickly"),
        (Process("EXITED", start=1, exitstatus=2), "its process (pid 11) ended with exit status 2"),
        (Process("STOPPED", start=1), "stopped through supervisor"),
        (Process("UNKNOWN"), "supervisor does not know it"),
    ],
)
def test_a_process_that_is_not_there_is_down_with_the_reason(healthy: Clocked, process: Process, reason: str) -> None:
    assert healthy.supervised(process) == ["down"]
    assert healthy.component.state.reason == reason
    assert not healthy.component.hangs()
    assert healthy.wait(RULES.start_s * 2) == []


def test_giving_up_after_a_death_is_announced_too(healthy: Clocked) -> None:
    assert healthy.supervised(Process("BACKOFF", start=1, exitstatus=1)) == ["down"]
    assert healthy.supervised(Process("FATAL", start=1, spawnerr="Exited too quickly")) == ["down"]
    assert (healthy.cause, healthy.component.deaths) == ("given_up", 1)


def test_silence_is_a_hang_once_it_was_asked(healthy: Clocked) -> None:
    assert healthy.wait(RULES.hang_s / 4) == []
    healthy.ask()
    changes = healthy.wait(RULES.hang_s * 3 / 4)
    assert changes == ["degraded", "down"]
    assert healthy.component.hangs()
    assert healthy.component.state.reason == "no sign of life for 10 s"
    assert healthy.sign() == ["healthy"]
    assert not healthy.component.hangs()


def test_a_hang_that_nobody_heals_says_so() -> None:
    clocked = Clocked(replace(RULES, heal=False))
    clocked.supervised(RUNNING)
    clocked.sign()
    clocked.ask()
    clocked.wait(RULES.hang_s)
    assert (
        clocked.component.state.reason == "no sign of life for 10 s; healing is off (health.heal): restart it by hand"
    )


def test_an_answer_may_take_three_quarters_of_that_however_late_it_was_asked(healthy: Clocked) -> None:
    healthy.wait(RULES.hang_s - 1.0)
    healthy.ask()
    assert healthy.wait(RULES.hang_s * 3 / 4 - STEP_S) == ["degraded"]
    assert healthy.sign() == []
    assert not healthy.component.hangs()


def test_silence_of_one_that_nobody_asked_is_none(healthy: Clocked) -> None:
    assert healthy.wait(10 * RULES.hang_s) == []


def test_heartbeats_without_answers_are_degraded_for_ever(healthy: Clocked) -> None:
    healthy.ask()
    found = []
    for _ in range(50):
        found += healthy.wait(5.0)
        found += healthy.beat()
    assert found == ["degraded"]
    assert not healthy.component.hangs()


def test_heartbeats_in_the_name_of_one_that_is_asked_count_when_its_process_is_known() -> None:
    """Neither before supervisor has told of it, nor while there is none: of its own process they do."""
    clocked = Clocked()
    assert clocked.beat(pid=99) == []
    assert (clocked.state, clocked.component.pid) == ("starting", 0)
    clocked.supervised(RUNNING)
    assert clocked.sign() == ["healthy"]
    clocked.supervised(None)
    assert clocked.beat(pid=99) == []
    assert clocked.component.pid == RUNNING.pid
    assert clocked.sign(pid=99) == ["down", "healthy"], "whoever answers at its address bears the name"


def test_heartbeats_of_another_process_keep_nobody_alive(healthy: Clocked) -> None:
    healthy.ask()
    for _ in range(4):
        healthy.wait(3.0)
        healthy.beat(pid=10)
    assert healthy.component.hangs()


def test_slow_answers_are_degraded_and_quick_ones_healthy_again(healthy: Clocked) -> None:
    slow, quick = Sign("healthy", 11, latency_ms=1500.0), Sign("healthy", 11, latency_ms=3.0)
    assert healthy.wait(RULES.steady_s, answers=slow) == []
    assert healthy.wait(STEP_S, answers=slow) == ["degraded"]
    assert healthy.component.state.reason == "an answer took 1500 ms, more than 1000"
    assert healthy.wait(RULES.steady_s, answers=quick) == []
    assert healthy.wait(STEP_S, answers=quick) == ["healthy"]


def test_one_slow_answer_is_nothing(healthy: Clocked) -> None:
    healthy.sign(latency_ms=5000.0)
    assert healthy.component.is_unclear(), "it is asked again soon"
    assert healthy.wait(1.0) == []
    assert healthy.wait(60.0, answers=Sign("healthy", 11, latency_ms=3.0)) == []


@pytest.mark.parametrize(
    ("figures", "reason"),
    [
        ({"disk_free_bytes": 150 * 2**20}, "150 MiB of disk space free, less than 200"),
        ({"open_files": 900, "open_files_limit": 1024}, "900 of 1024 open files in use"),
    ],
)
def test_figures_make_it_degraded(healthy: Clocked, figures: dict[str, int], reason: str) -> None:
    assert healthy.wait(5.0, answers=Sign("healthy", 11, figures=figures)) == ["degraded"]
    assert healthy.component.state.reason == reason


@pytest.mark.parametrize("figures", [{"disk_free_bytes": "?", "open_files": True}, {"open_files": 9}, {}])
def test_figures_that_are_none_change_nothing(healthy: Clocked, figures: dict[str, Any]) -> None:
    assert healthy.wait(20.0, answers=Sign("healthy", 11, figures=figures)) == []


def test_another_cause_is_announced_but_not_more_often_than_the_hysteresis(healthy: Clocked) -> None:
    full = Sign("healthy", 11, figures={"disk_free_bytes": 0})
    says = Sign("degraded", 11)
    assert healthy.wait(5.0, answers=full) == ["degraded"]
    since_s = healthy.component.state.since_s
    assert healthy.wait(2.0, answers=replace(says, figures=full.figures)) == []
    assert healthy.wait(5.0, answers=replace(says, figures=full.figures)) == ["degraded"]
    assert healthy.cause == "reported+disk"
    assert healthy.component.state.since_s == since_s


def test_causes_that_take_turns_are_degraded_all_the_same(healthy: Clocked) -> None:
    found = []
    for _ in range(8):
        found += healthy.wait(1.0, answers=Sign("degraded", 11))
        found += healthy.wait(1.0, answers=Sign("healthy", 11, figures={"disk_free_bytes": 0}))
    assert found[0] == "degraded"
    assert set(found) == {"degraded"}


@pytest.mark.parametrize("told_by", ["answer", "heartbeat", "supervisor"])
def test_who_stops_may_be_silent(healthy: Clocked, told_by: str) -> None:
    if told_by == "supervisor":
        assert healthy.supervised(Process("STOPPING", pid=11, start=1)) == ["degraded"]
    else:
        assert healthy.sign("stopping", is_heartbeat=told_by == "heartbeat") == ["degraded"]
    healthy.ask()
    assert healthy.wait(20 * RULES.hang_s) == []
    assert healthy.cause == "stopping"
    assert not healthy.component.hangs()
    assert healthy.supervised(Process("EXITED", start=1)) == ["down"]
    assert healthy.component.deaths == 0, "it was asked to"


def test_restarts_by_hand_are_no_flapping(healthy: Clocked) -> None:
    for pid in range(12, 30):
        healthy.sign("stopping", pid=pid - 1)
        assert healthy.supervised(Process("RUNNING", pid=pid, start=pid)) == ["down", "starting"]
        assert healthy.sign(pid=pid) == ["healthy"]


def test_flapping_until_it_was_quiet(healthy: Clocked) -> None:
    for pid in range(12, 12 + RULES.flap_deaths - 1):
        assert healthy.supervised(Process("RUNNING", pid=pid, start=pid)) == ["down", "starting"]
        healthy.sign(pid=pid)
    assert healthy.supervised(Process("RUNNING", pid=30, start=30)) == ["flapping"]
    assert healthy.component.state.reason == "4 deaths within 100 s, the last: its process (pid 14) ended"
    assert healthy.sign(pid=30) == []
    healthy.ask()
    assert healthy.wait(RULES.flap_quiet_s - 1.0) == []
    assert not healthy.component.hangs()
    assert healthy.supervised(Process("RUNNING", pid=31, start=31)) == ["flapping"], "a death counts from here"
    assert healthy.wait(RULES.flap_quiet_s - 1.0, answers=Sign("healthy", 31)) == []
    assert healthy.wait(1.0, answers=Sign("healthy", 31)) == ["healthy"]
    assert healthy.supervised(Process("RUNNING", pid=32, start=32)) == ["down", "starting"], "they are forgiven"


def test_giving_up_ends_flapping(healthy: Clocked) -> None:
    for pid in range(12, 30):
        healthy.supervised(Process("RUNNING", pid=pid, start=pid))
    assert healthy.state == "flapping"
    assert healthy.supervised(Process("FATAL", start=30, spawnerr="gave up")) == ["down"]


def test_deaths_that_lie_apart_are_no_flapping(healthy: Clocked) -> None:
    for pid in range(12, 20):
        healthy.wait(RULES.flap_window_s / 2)
        assert "flapping" not in healthy.supervised(Process("RUNNING", pid=pid, start=pid))


def test_an_observer_that_was_held_up_blames_nobody(healthy: Clocked) -> None:
    healthy.ask()
    assert healthy.wait(3.0) == []
    healthy.now_s += 10_000.0
    assert healthy.component.look(healthy.now_s) == []
    assert healthy.component.silence_s(healthy.now_s) == 3.0 + BLIND_S
    changes = healthy.wait(RULES.hang_s - 3.0 - BLIND_S)
    assert changes[-1:] == ["down"], "from here on silence counts again"


def test_who_says_that_it_is_down_is_not_for_us_to_kill(healthy: Clocked) -> None:
    assert healthy.sign("down", figures={"readiness": {"store": "failed"}}) == ["down"]
    assert healthy.component.state.reason == "it says down: store failed"
    assert not healthy.component.hangs()


def test_without_supervisor_answers_alone_decide() -> None:
    clocked = Clocked()
    clocked.ask()
    clocked.wait(RULES.hang_s)
    assert (clocked.state, clocked.cause) == ("down", "hang")
    assert not clocked.component.hangs(), "there is nobody who could kill it"
    assert clocked.component.state.reason.endswith("; no supervisor runs it: restart it by hand")
    assert clocked.sign(pid=11) == ["healthy"]
    assert clocked.sign(pid=12) == ["down", "healthy"]


def test_a_supervisor_that_goes_away_and_comes_back_changes_nothing(healthy: Clocked) -> None:
    assert healthy.supervised(None) == []
    assert healthy.sign() == []
    assert healthy.supervised(RUNNING) == []
    assert healthy.supervised(None) == []
    assert healthy.sign(pid=12) == ["down", "healthy"]
    assert healthy.supervised(Process("RUNNING", pid=12, start=5)) == []


# -- components that only send heartbeats ---------------------------------------------------------------------------


def test_three_missed_heartbeats_are_down_and_a_day_is_forgotten() -> None:
    clocked = Clocked(heartbeat_s=5.0)
    assert clocked.beat() == ["healthy"]
    assert clocked.wait(14.5) == []
    assert clocked.wait(1.0) == ["down"]
    assert clocked.cause == "silent"
    assert not clocked.component.hangs()
    assert not clocked.component.is_forgotten(clocked.now_s + FORGET_S - 30.0)
    assert clocked.component.is_forgotten(clocked.now_s + FORGET_S)
    assert clocked.beat() == ["healthy"]


def test_who_said_goodbye_is_stopped() -> None:
    clocked = Clocked(heartbeat_s=5.0)
    clocked.beat()
    assert clocked.beat("stopping") == ["degraded"]
    assert clocked.wait(16.0) == ["down"]
    assert clocked.cause == "stopped"
    assert clocked.beat(pid=12) == ["down", "healthy"]
    assert clocked.component.deaths == 0


def test_who_signs_off_is_stopped_at_once_and_soon_forgotten() -> None:
    clocked = Clocked(heartbeat_s=5.0)
    clocked.beat()
    assert clocked.beat("stopped") == ["down"]
    assert (clocked.cause, clocked.component.state.reason) == ("stopped", "it said that it stopped")
    assert clocked.wait(RULES.flap_quiet_s - 1.0) == []
    assert not clocked.component.is_forgotten(clocked.now_s)
    assert clocked.component.is_forgotten(clocked.now_s + 1.0)
    assert clocked.beat() == ["healthy"]


def test_a_program_that_signs_off_is_stopping_until_its_process_ends(healthy: Clocked) -> None:
    assert healthy.beat("stopped") == ["degraded"]
    assert healthy.cause == "stopping"
    assert healthy.supervised(Process("EXITED", start=1)) == ["down"]
    assert healthy.component.deaths == 0


# -- what the manager before this one knew --------------------------------------------------------------------------


def test_flapping_goes_on_over_a_restart_of_the_manager() -> None:
    clocked = Clocked()
    clocked.component.recall("flapping", [clocked.now_s - age_s for age_s in (40.0, 30.0, 20.0, 10.0)], clocked.now_s)
    assert clocked.state == "flapping"
    assert clocked.supervised(RUNNING) == []
    assert clocked.sign() == []
    assert clocked.wait(RULES.flap_quiet_s - 10.0, answers=Sign("healthy", 11)) == ["healthy"]


def test_deaths_before_a_restart_of_the_manager_count() -> None:
    clocked = Clocked()
    clocked.component.recall("down", [clocked.now_s - 5.0] * (RULES.flap_deaths - 1), clocked.now_s)
    clocked.supervised(RUNNING)
    assert clocked.sign() == ["healthy"]
    assert clocked.supervised(Process("RUNNING", pid=12, start=2)) == ["flapping"]


@pytest.mark.parametrize(("state", "changes"), [("down", []), ("healthy", ["down"])])
def test_who_only_beats_is_not_forgotten_over_a_restart(state: str, changes: list[str]) -> None:
    clocked = Clocked(heartbeat_s=5.0)
    clocked.component.recall(state, [], clocked.now_s)
    assert clocked.state == ("down" if state == "down" else "starting")
    assert clocked.wait(16.0) == changes
    assert (clocked.state, clocked.cause) == ("down", "silent")
    assert clocked.beat() == ["healthy"]


def test_a_restart_elsewhere_is_a_death_and_two_of_one_name_are_not() -> None:
    clocked = Clocked(heartbeat_s=5.0)
    clocked.beat(pid=1)
    assert clocked.beat(pid=2) == ["down", "healthy"]
    for _ in range(10):
        assert clocked.beat(pid=1) == []
        assert clocked.beat(pid=2) == []
    assert clocked.component.deaths == 1


# -- promises under any history -------------------------------------------------------------------------------------

MODES = ("serve", "slow", "very_slow", "hang", "drain", "say_degraded", "disk_full", "start")
LATENCY_S = {"slow": 1.5, "very_slow": 7.0}
SAYS = {"drain": "stopping", "say_degraded": "degraded", "start": "starting"}


@dataclass
class World:
    """A program, its supervisor, and an observer that asks as the watch does, on one simulated clock."""

    rules: HealthSettings
    now_s: float = 1000.0
    pid: int = 100
    start: int = 0
    mode: str = "serve"
    restart_s: float | None = None
    deaths_s: list[float] = field(default_factory=list)
    draining: bool = False
    last_sign_s: float | None = None
    born_seen_s: float | None = None
    asked_s: float = 0.0
    looked_s: float = 0.0
    beat_s: float = 0.0
    answers: list[tuple[float, Sign]] = field(default_factory=list)
    owed: int = 0
    history: list[tuple[float, State]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.component = Component(self.rules, self.now_s)

    def crash(self, restart_s: float) -> None:
        if self.restart_s is None:
            if self.component.pid == self.pid:
                self.deaths_s.append(self.now_s)
            self.restart_s = self.now_s + restart_s
            self.answers, self.owed = [], 0

    def set_mode(self, mode: str) -> None:
        self.mode = mode
        if mode != "hang":
            for _ in range(self.owed):
                self._owe_answer()
            self.owed = 0

    def process(self) -> Process:
        if self.restart_s is not None:
            return Process("BACKOFF", start=self.start, exitstatus=1)
        return Process("RUNNING", pid=self.pid, start=self.start)

    def run(self, seconds: float) -> Iterator[None]:
        for _ in range(round(seconds / STEP_S)):
            self.now_s += STEP_S
            self._live()
            self._observe()
            yield

    def _live(self) -> None:
        if self.restart_s is not None and self.now_s >= self.restart_s:
            self.restart_s, self.last_sign_s, self.born_seen_s = None, None, None
            self.pid += 1
            self.start += 1
            self.draining = False
            self.mode = "serve"

    def _observe(self) -> None:
        due = [sign for at_s, sign in self.answers if at_s <= self.now_s]
        self.answers = [each for each in self.answers if each[0] > self.now_s]
        for sign in due:
            self._sign(sign)
        if self.restart_s is None and self.mode not in ("hang", "drain") and self.now_s - self.beat_s >= 5.0:
            self.beat_s = self.now_s
            if self.rules.heartbeat_s == 5.0:
                self._sign(Sign(SAYS.get(self.mode, "healthy"), self.pid, is_heartbeat=True))
        if self.now_s - self.looked_s >= self.rules.supervisor_s:
            self.looked_s = self.now_s
            process = self.process()
            self._note(self.component.supervised(process, self.now_s))
            if process.alive and self.born_seen_s is None:
                self.born_seen_s = self.now_s
        self._ask()
        self._note(self.component.look(self.now_s))

    def _ask(self) -> None:
        process = self.component.process
        often_s = 1.0 if self.component.is_unclear() else self.rules.check_s
        if process is None or not process.alive or self.now_s - self.asked_s < often_s:
            return
        self.asked_s = self.now_s
        self.component.asked(self.now_s)
        if self.restart_s is not None or process.pid != self.pid:
            return
        if self.mode == "hang" or self.draining:
            self.owed += 1
        else:
            self._owe_answer()

    def _owe_answer(self) -> None:
        latency_s = LATENCY_S.get(self.mode, 0.0)
        figures = {"disk_free_bytes": 0} if self.mode == "disk_full" else {}
        sign = Sign(SAYS.get(self.mode, "healthy"), self.pid, latency_ms=latency_s * 1000.0, figures=figures)
        self.answers.append((self.now_s + latency_s, sign))

    def _sign(self, sign: Sign) -> None:
        if self.component.expects(sign) and sign.pid == self.pid:
            self.last_sign_s = self.now_s
            # Once it has said so it may stay silent for ever.
            self.draining = self.draining or sign.state == "stopping"
        self._note(self.component.sign(sign, self.now_s))

    def _note(self, changes: list[State]) -> None:
        self.history += [(self.now_s, change) for change in changes]

    def silence_s(self) -> float:
        since_s = self.last_sign_s if self.last_sign_s is not None else self.born_seen_s
        return 0.0 if since_s is None else self.now_s - since_s


SCRIPTS = st.lists(
    st.tuples(
        st.sampled_from((*MODES, "crash", "crash", "serve")),
        st.floats(0.25, 40.0),
        st.sampled_from((0.25, 0.5, 1.0, 3.0)),
    ),
    max_size=15,
)
HEARTBEATS = st.sampled_from((5.0, 3600.0))


def play(script: list[tuple[str, float, float]], heartbeat_s: float) -> Iterator[World]:
    """The world after each step of a script."""
    world = World(replace(RULES, heartbeat_s=heartbeat_s))
    for event, seconds, restart_s in [("serve", 3.0, 0.0), *script]:
        if event == "crash":
            world.crash(restart_s)
        else:
            world.set_mode(event)
        for _ in world.run(seconds):
            yield world


@settings(deadline=None)
@given(SCRIPTS, HEARTBEATS)
def test_healthy_and_degraded_change_no_faster_than_the_hysteresis(script: Any, heartbeat_s: float) -> None:
    *_, world = play(script, heartbeat_s)
    soft = ("healthy", "degraded")
    for (before_s, before), (after_s, after) in itertools.pairwise(world.history):
        if before.state in soft and after.state in soft and after.cause != "stopping":
            assert after_s - before_s >= RULES.steady_s, (before, after)


@settings(deadline=None)
@given(SCRIPTS, HEARTBEATS)
def test_the_death_of_every_process_that_was_seen_is_announced_at_the_next_look(
    script: Any, heartbeat_s: float
) -> None:
    *_, world = play([*script, ("serve", 5.0, 0.25)], heartbeat_s)
    told_s = [at_s for at_s, change in world.history if change.state in ("down", "flapping")]
    for died_s in world.deaths_s:
        assert any(died_s < at_s <= died_s + RULES.supervisor_s + STEP_S for at_s in told_s), (died_s, world.history)


@settings(deadline=None)
@given(SCRIPTS, HEARTBEATS)
def test_only_silence_is_a_hang_and_lasting_silence_always(script: Any, heartbeat_s: float) -> None:
    for world in play(script, heartbeat_s):
        component, silence_s = world.component, world.silence_s()
        if component.process != world.process() or world.restart_s is not None:
            continue  # what it knows is of a process that is gone
        if component.hangs():
            assert silence_s >= RULES.hang_s
            assert not world.draining
        limit_s = (HANG_S if world.last_sign_s is not None else RULES.start_s) + 2 * RULES.supervisor_s
        if silence_s >= limit_s and not world.draining and component.state.state != "flapping":
            assert component.hangs(), component


@settings(deadline=None)
@given(SCRIPTS, HEARTBEATS)
def test_what_answers_late_is_never_down(script: Any, heartbeat_s: float) -> None:
    kept = [each for each in script if each[0] in ("serve", "slow", "very_slow", "say_degraded", "disk_full")]
    for world in play(kept, heartbeat_s):
        assert world.component.state.state in ("starting", "healthy", "degraded")


@settings(deadline=None)
@given(SCRIPTS, HEARTBEATS)
def test_flapping_ends_only_after_quiet_and_is_never_healed(script: Any, heartbeat_s: float) -> None:
    died_s, deaths, state = 0.0, 0, ""
    for world in play([("crash", 2.0, 0.5)] * RULES.flap_deaths + script, heartbeat_s):
        component = world.component
        if component.deaths > deaths:
            deaths, died_s = component.deaths, world.now_s
        if state == "flapping" != component.state.state:
            assert world.now_s - died_s >= RULES.flap_quiet_s
        state = component.state.state
        assert not (state == "flapping" and component.hangs())
    assert "flapping" in [change.state for _, change in world.history]
