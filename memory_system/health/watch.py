"""Watches the programs: asks supervisor and each program, hears heartbeats, announces changes, has hanging ones killed.

    watch = Watch(settings.health, program_addresses(settings), Supervisor.of_this_process(),
                  own=("health_manager", figures), on_change=publish, report=submit)
    watch.start()

The states and their rules are in states.py, the rules of killing in healer.py; here are clocks, sockets and tasks.
Components are the programs of config/supervisord.conf, supervisor itself where there is one, and whoever else sends
heartbeats.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any, Final, Protocol

import zmq

from memory_system.deployment import Address
from memory_system.events import MAX_NAME_CHARS
from memory_system.health.asker import Asker
from memory_system.health.healer import Healer
from memory_system.health.life import Process, Sign
from memory_system.health.memory import Memory
from memory_system.health.states import Component, State
from memory_system.health.supervisor import Supervisor, SupervisorUnavailable
from memory_system.health.watched import Watched, interval_of, is_here, is_pid, sign_of
from memory_system.health_settings import HealthSettings
from memory_system.keys import KeyFile
from memory_system.log import get_logger

log = get_logger("watch")

SUPERVISOR: Final = "supervisor"
MAX_COMPONENTS: Final = 1000
_TICK_S: Final = 0.2
_UNCLEAR_S: Final = 1.0


class Report(Protocol):
    """Takes an error event of the watch; never blocks, never raises."""

    def __call__(self, error_type: str, message: str, severity: str, details: Mapping[str, Any]) -> None: ...


class Watch:
    """`on_change(component, state, entry)` hears of every change, oldest first; `entry` is its part of the picture.
    `on_forget(component)` hears of one that has been silent for so long that it is no component any more.

    `own` is this program's name and a function that returns what its health_check would: it does not ask itself.
    `key`: as whom the programs are asked, where they take nobody without one; names then are those of keys.
    Everything happens on the loop that `start` is called on.
    """

    def __init__(
        self,
        rules: HealthSettings,
        addresses: Mapping[str, Address],
        supervisor: Supervisor | None,
        *,
        own: tuple[str, Callable[[], Mapping[str, Any]]],
        on_change: Callable[[str, State, dict[str, Any]], None],
        report: Report,
        on_forget: Callable[[str], None] = lambda name: None,
        key: KeyFile | None = None,
    ) -> None:
        self._rules = rules
        self._addresses = dict(addresses)
        self._supervisor = supervisor
        self._own, self._own_health = own
        self._programs = tuple(dict.fromkeys((*self._addresses, self._own)))
        self._on_change = on_change
        self._report = report
        self._on_forget = on_forget
        self._key = key
        self._healer = Healer(rules)
        self._watched: dict[str, Watched] = {}
        self._context: zmq.Context[Any] = zmq.Context()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._looking = False
        self._looked_s = self._supervised_s = float("-inf")
        self.refused_heartbeats = 0

    def __repr__(self) -> str:
        return f"<Watch {', '.join(f'{name} {each.component.state.state}' for name, each in self._watched.items())}>"

    def start(self, memories: Mapping[str, Memory] | None = None) -> None:
        """Begin, on the running loop: every program is announced as starting, and asked. `memories`: of the manager
        before this one."""
        self._loop = asyncio.get_running_loop()
        now_s, known = time.monotonic(), memories or {}
        for name in self._programs:
            self._add(name, Watched.begun(self._rules, now_s, known.get(name)))
        if self._supervisor is not None:
            self._add(SUPERVISOR, Watched.begun(self._rules, now_s, known.get(SUPERVISOR), pid=os.getppid()))
        for name, each in known.items():
            if each.heartbeat_s is not None and name not in self._watched and name != SUPERVISOR:
                self._add(name, Watched.begun(self._rules, now_s, each, each.heartbeat_s, each.address))
        self._supervised_s = now_s
        self._tick()

    async def close(self) -> None:
        """Stop watching. May be called at any time, also twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for each in self._watched.values():
            if each.asker is not None:
                each.asker.close()
        self._context.term()

    def picture(self) -> list[dict[str, Any]]:
        """Every component as get_health shows it: state, reason, since, pid, figures and what else is known of it."""
        now_at = time.time()
        return [
            {**self._entry(name, each, now_at), "figures": dict(each.component.figures)}
            for name, each in list(self._watched.items())  # a scrape asks in a thread of its own
        ]

    def memories(self) -> dict[str, Memory]:
        """What the manager after this one has to know."""
        return {name: each.memory() for name, each in self._watched.items()}

    def heartbeat(self, fields: Mapping[str, Any], peer: str) -> bool:
        """Take a heartbeat as it came, from this IP address ("" where only this host can send); False: refused."""
        name, now_s = fields.get("component"), time.monotonic()
        if not isinstance(name, str) or not self._may_beat(name, fields, peer):
            self.refused_heartbeats += 1
            return False
        if name not in self._watched:
            interval_s = interval_of(fields, self._rules.heartbeat_s)
            self._add(name, Watched.begun(self._rules, now_s, None, interval_s, peer or None))
        watched = self._watched[name]
        self._take(name, watched, sign_of(fields), now_s)
        return True

    def _may_beat(self, name: str, fields: Mapping[str, Any], peer: str) -> bool:
        """Nobody else may keep a program alive that hangs: its heartbeats come from here, and say which process."""
        if not 0 < len(name) <= MAX_NAME_CHARS or name == SUPERVISOR:
            return False
        if name in self._programs:
            return name in self._watched and is_pid(fields.get("pid")) and is_here(peer, self._addresses.get(name))
        return name in self._watched or len(self._watched) < MAX_COMPONENTS

    # -- every tick -------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if self._loop is None:
            return
        self._timer = self._loop.call_later(_TICK_S, self._tick)
        now_s = time.monotonic()
        for name, watched in list(self._watched.items()):
            if name == SUPERVISOR:
                continue
            self._ask(name, watched, now_s)
            self._tell(name, watched, watched.component.look(now_s))
            self._heal(name, watched.component, now_s)
            if watched.component.is_forgotten(now_s):
                del self._watched[name]
                self._on_forget(name)
        if self._supervisor is not None and not self._looking and now_s - self._looked_s >= self._rules.supervisor_s:
            self._looking, self._looked_s = True, now_s
            self._spawn(self._look(self._supervisor))

    def _ask(self, name: str, watched: Watched, now_s: float) -> None:
        component, rules = watched.component, self._rules
        if watched.asker is not None:
            watched.asker.drain()
        often_s = min(rules.check_s, rules.hang_s / 2.0, _UNCLEAR_S if component.is_unclear() else math.inf)
        if now_s - watched.asked_s < often_s:
            return
        if name == self._own:
            watched.asked_s = now_s
            health = dict(self._own_health())
            state = str(health.pop("state", "healthy"))
            self._take(name, watched, Sign(state, os.getpid(), latency_ms=0.0, figures=health), now_s)
        elif watched.asker is not None and (component.process is None or component.process.alive):
            if component.pid != watched.asked_pid:
                watched.asker.close()  # what the process before it was asked, this one will not answer
                watched.asked_pid = component.pid
            if watched.asker.ask(rules.hang_s):
                watched.asked_s = now_s
            component.asked(now_s)

    def _heal(self, name: str, component: Component, now_s: float) -> None:
        supervisor, pid = self._supervisor, component.pid
        fresh = now_s - self._supervised_s < 3.0 * self._rules.supervisor_s + _TICK_S
        if supervisor is None or name == self._own or not fresh or not component.hangs():
            return
        act = self._healer.hangs(name, pid, now_s)
        details = {"component": name, "pid": pid, "kills": self._healer.kills(name)}
        if act == "kill":
            self._spawn(self._kill(supervisor, name, pid, component.state.reason, details))
        elif act == "leave_alone":
            message = f"{name} hangs and is left alone after {self._rules.heal_limit} kills: {component.state.reason}"
            log.info("component_left_alone", **details)
            self._report("component_left_alone", message, "critical", details)

    async def _kill(self, supervisor: Supervisor, name: str, pid: int, reason: str, details: Mapping[str, Any]) -> None:
        try:
            if not await supervisor.kill(name, pid):
                return  # it ended by itself meanwhile
        except SupervisorUnavailable as error:
            log.info("kill_failed", reason=error.reason, **details)
            self._report("kill_failed", f"{name} hangs and cannot be killed: {error.reason}", "error", details)
            return
        log.info("component_killed", reason=reason, **details)
        self._report("component_killed", f"{name} hangs and was killed: {reason}", "error", details)
        self._looked_s = float("-inf")

    # -- supervisor -------------------------------------------------------------------------------------------

    async def _look(self, supervisor: Supervisor) -> None:
        try:
            processes = await supervisor.processes()
        except SupervisorUnavailable as error:
            self._supervisor_failed(error)
        else:
            self._supervisor_answered(processes)
        finally:
            self._looking = False

    def _supervisor_answered(self, processes: Mapping[str, Process]) -> None:
        now_s = self._supervised_s = time.monotonic()
        self._supervisor_is("healthy", "", "it answers", now_s)
        for name, watched in self._programs_watched():
            # This program may run beside the programs of supervisor, started by hand.
            unknown = Process("UNKNOWN") if name != self._own else None
            self._tell(name, watched, watched.component.supervised(processes.get(name, unknown), now_s))

    def _supervisor_failed(self, error: SupervisorUnavailable) -> None:
        """Its programs run on without it; what it said of them before is not true for ever."""
        now_s = time.monotonic()
        if not error.is_gone and now_s - self._supervised_s < self._rules.hang_s:
            return
        cause, what = ("gone", "supervisord is gone") if error.is_gone else ("hang", "supervisord does not answer")
        self._supervisor_is("down", cause, f"{what}: {error.reason}", now_s)
        for name, watched in self._programs_watched():
            self._tell(name, watched, watched.component.supervised(None, now_s))

    def _programs_watched(self) -> list[tuple[str, Watched]]:
        return [(name, self._watched[name]) for name in self._programs]

    def _supervisor_is(self, state: str, cause: str, reason: str, now_s: float) -> None:
        watched = self._watched[SUPERVISOR]
        if (watched.component.state.state, watched.component.state.cause) != (state, cause):
            watched.component.state = State(state, cause, reason, now_s)
            self._tell(SUPERVISOR, watched, [watched.component.state])

    # -- the list ---------------------------------------------------------------------------------------------

    def _add(self, name: str, watched: Watched) -> None:
        self._watched[name] = watched
        address = self._addresses.get(name)
        if address is not None:
            watched.address = address.shown
            if name != self._own:
                answered = partial(self._answered, name)
                watched.asker = Asker(self._context, address.endpoint, answered, key=self._key)
        self._tell(name, watched, [watched.component.state])

    def _answered(self, name: str, sign: Sign) -> None:
        self._take(name, self._watched[name], sign, time.monotonic())

    def _take(self, name: str, watched: Watched, sign: Sign, now_s: float) -> None:
        if not watched.component.expects(sign):
            self._looked_s = float("-inf")  # another process than supervisor told of: it will know by now
            return
        if sign.is_heartbeat:
            watched.last_heartbeat_at = time.time()
        else:
            watched.last_reply_at = time.time()
        self._tell(name, watched, watched.component.sign(sign, now_s))

    def _tell(self, name: str, watched: Watched, changes: list[State]) -> None:
        for state in changes:
            if state.state != "down":
                self._healer.lives(name)
            now_at = time.time()
            watched.since_at = watched.came_at(state, now_at)
            log.info("state_changed", component=name, state=state.state, cause=state.cause, reason=state.reason)
            self._on_change(name, state, self._entry(name, watched, now_at, state))

    def _entry(self, name: str, watched: Watched, now_at: float, state: State | None = None) -> dict[str, Any]:
        return watched.entry(name, self._healer.kills(name), self._healer.is_left_alone(name), now_at, state)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
