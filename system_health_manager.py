#!/usr/bin/env python3
"""The health manager: watches every program, carries the error bus, and has killed what hangs.

    python system_health_manager.py [--config FILE]

Subscribers connect a SUB socket to port 7150 and hear HEARTBEAT:, HEALTH: and ERROR: messages; port 7121 answers
health_check, get_health and get_errors; errors and heartbeats come in on 7151 (PUB sockets of the mesh) and 7152
(acknowledged). Exit status: 0 after SIGTERM or SIGINT, 1 when it cannot start, 2 for a bad configuration.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from memory_system import __version__, bus_log, log
from memory_system.actions import ActionServer
from memory_system.deployment import program_addresses
from memory_system.health.broadcast import MANAGER
from memory_system.health.bus import Bus
from memory_system.health.history_file import LOGGER
from memory_system.health.ingest import Ingest
from memory_system.health.memory import Memory, decode, encode
from memory_system.health.records import HistoryFailed
from memory_system.health.states import State
from memory_system.health.supervisor import Supervisor
from memory_system.health.watch import Watch
from memory_system.keys import key_for
from memory_system.metrics import EventCounts, Family, component_families, traffic_families
from memory_system.metrics_start import start_metrics
from memory_system.process_figures import disk_free_bytes, process_figures
from memory_system.program import ends, listen_address, run_program
from memory_system.security import Gate
from memory_system.settings import Settings

logger = log.get_logger("health_manager")

LAST_ALIVE: Final = "last_alive_at"
COMPONENTS: Final = "components"
LAST_HOUR_S: Final = 3600.0
# Subscribers whose connection broke with the last process need a moment to be back and hear how it ended.
DEATH_SHOWN_S: Final = 1.0
# From the least to the most worrying: the state of the whole is that of its worst part.
RANKS: Final = ("healthy", "starting", "degraded", "flapping", "down")
SEVERITIES: Final = {"down": "critical", "flapping": "critical", "degraded": "warning"}
# Trouble of a process that runs: that it ends then, killed or by itself, is the same trouble.
ENDED_NEXT: Final = (("down", "hang"), ("down", "silent"), ("down", "reported"))
ASKED_FOR: Final = frozenset({"stopping", "stopped"})  # causes that are nobody's failure


class HealthManager:
    """Joins the watch, the bus and the sockets, and ends them in the right order."""

    def __init__(self, settings: Settings) -> None:
        bind, ports = settings.network.bind, settings.health
        self.settings = settings
        self.boot_id = secrets.token_hex(8)
        self._started_at = time.time()
        self._counts = EventCounts()
        self._states: dict[str, tuple[str, str]] = {}  # state and cause that were told last
        self._troubled: set[str] = set()
        self._memories: dict[str, Memory] = {}
        self._noting = False
        self._held: list[tuple[str, dict[str, Any]]] | None = None
        self._closers: list[Callable[[], Any]] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self.gate = Gate.of(settings)
        publish = listen_address(bind, ports.publish_port)
        self.bus = Bus(settings, publish, self.boot_id, on_event=self._counts.note, gate=self.gate)
        self.server = ActionServer(
            MANAGER,
            listen_address(bind, ports.port),
            {"get_health": self.get_health, "get_errors": self.bus.get_errors},
            settings,
            health=self._health,
            port_key="health.port",
            gate=self.gate,
            domain="manager",
        )
        self.watch = Watch(
            ports,
            program_addresses(settings),
            Supervisor.of_this_process(),
            own=(MANAGER, self._own_figures),
            on_change=self._on_change,
            on_forget=self._on_forget,
            report=self._report,
            key=key_for(MANAGER, settings),
        )
        self.ingest = Ingest(settings, self.bus.history, on_heartbeat=self._on_heartbeat, gate=self.gate)

    async def run(self) -> int:
        """Serve until told to stop; the exit status."""
        loop = asyncio.get_running_loop()
        end = ends(loop)
        try:
            await self._start()
            logger.info("listening", address=self.server.address, pid=os.getpid(), boot_id=self.boot_id)
            await end.wait()
            logger.info("stopping")
        finally:
            await self._close()
        logger.info("stopped")
        return 0

    async def _start(self) -> None:
        self._closers += [self.bus.close, self.watch.close, self.ingest.close, self.server.close]
        if self.gate is not None:
            self._closers.insert(0, self.gate.close)
            self.gate.open()
        await self.bus.start()
        handler = bus_log.install(self.bus)
        handler.addFilter(lambda record: record.name != LOGGER)  # the history has its own way into the history
        self._closers.insert(-3, lambda: bus_log.remove(handler))
        self.ingest.bind()
        self.server.bind()
        self._open_metrics()
        await self._tell_of_last_run()
        self._recall()
        self.ingest.start()
        self.server.start()
        self.watch.start(dict(self._memories))
        self._beat()

    async def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        await self.server.drain()
        while self._closers:
            result = self._closers.pop()()
            if result is not None:
                await result

    def _open_metrics(self) -> None:
        close = start_metrics(self.settings, self.settings.metrics.health_manager_port, self._families)
        self._closers.append(lambda: asyncio.to_thread(close))

    async def _tell_of_last_run(self) -> None:
        """A manager that died could not say so; this one does, to the history and to whoever subscribes again."""
        history = self.bus.history
        alive_at = history.previous.get(LAST_ALIVE)
        if alive_at is None or history.was_clean:
            return
        ago_s = max(0.0, self._started_at - float(alive_at))
        reason = f"it ended without a clean stop; its last sign of life was {ago_s:.1f} s before this start"
        self._announce(
            MANAGER, {"state": "down", "cause": "died", "reason": reason, "since": float(alive_at), "pid": None}
        )
        self._held = []
        asyncio.get_running_loop().call_later(DEATH_SHOWN_S, self._tell_held)

    def _recall(self) -> None:
        """Trouble that the manager before this one told of is told of once; its end is told by this one."""
        self._memories = decode(self.bus.history.previous.get(COMPONENTS), self._started_at)
        for component, memory in self._memories.items():
            if memory.troubled:
                self._troubled.add(component)
                self._states.setdefault(component, (memory.state, memory.cause))

    def _tell_held(self) -> None:
        held, self._held = self._held or [], None
        for component, fields in held:
            self._announce(component, fields)

    # -- what comes from the watch and from reporters -----------------------------------------------------------

    def _on_change(self, component: str, state: State, entry: dict[str, Any]) -> None:
        if component == MANAGER and self._held is not None:
            self._held.append((component, entry))
        else:
            self._announce(component, entry)

    def _announce(self, component: str, entry: Mapping[str, Any]) -> None:
        state, cause, before = entry["state"], entry["cause"], self._states.get(component, (None, ""))
        self._states[component] = (state, cause)
        self.bus.broadcaster.publish_health(component, {**entry, "previous": before[0]})
        self._note_soon()
        details = {"component": component, "cause": cause}
        if state in SEVERITIES:
            self._troubled.add(component)
            if self._is_told(component, (state, cause), before):
                return
            what = cause if cause in ASKED_FOR else state
            severity = "info" if cause in ASKED_FOR else SEVERITIES[state]
            message = f"{component} is {what}: {entry['reason']}"
            # In the name of whom it is about: repeats are folded by agent, and the deaths of two are no repeats.
            self.bus.report(f"component_{what}", message, severity, details=details, agent=component)
        elif state == "healthy" and component in self._troubled:
            self._troubled.remove(component)
            self._memories.pop(component, None)
            message = f"{component} is healthy again"
            self.bus.report("component_recovered", message, "info", details=details, agent=component)

    def _is_told(self, component: str, now: tuple[str, str], before: tuple[str | None, str]) -> bool:
        """Whether this is no news: what the last manager told of already, a second word of the same stop, or the end
        of a process that was told to be down while it still ran."""
        known = self._memories.pop(component, None)
        if known is not None and known.troubled and now in ((known.state, known.cause), (known.state, "silent")):
            return True
        return now == before == ("down", "stopped") or (now == ("down", "died") and before in ENDED_NEXT)

    def _on_forget(self, component: str) -> None:
        self.bus.broadcaster.forget(component)
        self._states.pop(component, None)
        self._troubled.discard(component)

    def _report(self, error_type: str, message: str, severity: str, details: Mapping[str, Any]) -> None:
        self.bus.report(error_type, message, severity, details=details)

    def _on_heartbeat(self, fields: Mapping[str, Any], peer: str) -> None:
        if self.watch.heartbeat(fields, peer):
            own = {name: value for name, value in fields.items() if name not in ("v", "kind", "component")}
            self.bus.broadcaster.publish_heartbeat(fields["component"], own)

    def _beat(self) -> None:
        """The manager's own sign of life, also into the history: the next start wants to know when the last was."""
        interval_s = self.settings.health.heartbeat_s
        self._timer = asyncio.get_running_loop().call_later(interval_s, self._beat)
        fields = {"timestamp": time.time(), "state": self._own_state(), "interval_s": interval_s, **self._own_figures()}
        self.bus.broadcaster.publish_heartbeat(MANAGER, fields)
        self._note_soon()

    def _note_soon(self) -> None:
        """Keep in the history what the next manager has to know: now, and for all of this turn of the loop at once."""
        if self._noting:
            return
        self._noting = True
        task = asyncio.get_running_loop().create_task(self._note())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _note(self) -> None:
        self._noting = False
        now_at = time.time()
        memories = {
            name: replace(each, troubled=name in self._troubled) for name, each in self.watch.memories().items()
        }
        with contextlib.suppress(HistoryFailed):  # it has logged why, and the manager is degraded by it
            await self.bus.history.set_meta(LAST_ALIVE, repr(now_at))
            await self.bus.history.set_meta(COMPONENTS, encode(memories, now_at))

    # -- what it says of itself and of all ----------------------------------------------------------------------

    def _own_state(self) -> str:
        return "degraded" if self.bus.history.failing else "healthy"

    def _own_figures(self) -> dict[str, Any]:
        folder = os.path.dirname(self.settings.error_bus.history_path)
        return {
            **process_figures(),
            "state": self._own_state(),
            "uptime_s": time.time() - self._started_at,
            "disk_free_bytes": disk_free_bytes(folder),
            "readiness": {"history": "unavailable" if self.bus.history.failing else "ready"},
        }

    def _health(self) -> dict[str, Any]:
        """The manager's part of its health_check."""
        return {
            **self._own_figures(),
            "version": __version__,
            "boot_id": self.boot_id,
            "ingest": self.ingest.figures(),
            "refused_heartbeats": self.watch.refused_heartbeats,
            **self.bus.figures(),
        }

    async def get_health(self) -> dict[str, Any]:
        """The action get_health: every component with its state and the reason for it, and the state of the whole."""
        picture = self.watch.picture()
        # Who signed off is no trouble of the whole.
        states = (each["state"] for each in picture if each["cause"] != "stopped")
        worst = max(states, key=RANKS.index, default="healthy")
        try:
            errors: dict[str, int] | None = await self.bus.history.totals(LAST_HOUR_S)
        except HistoryFailed:
            errors = None
        return {
            "state": worst,
            "results": picture,
            "count": len(picture),
            "errors_last_hour": errors,
            "boot_id": self.boot_id,
            "checked_at": time.time(),
        }

    def _families(self) -> list[Family]:
        """The metrics as they are now; called in the thread of a scrape."""
        return [
            *component_families(self.watch.picture()),
            *self._counts.families(),
            *traffic_families(self.server.actions.traffic),
        ]


async def serve(settings: Settings) -> int:
    return await HealthManager(settings).run()


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(MANAGER, "Watches the programs of the mesh and carries their errors.", serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
