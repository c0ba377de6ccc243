#!/usr/bin/env python3
"""The scheduler: has the orchestrator do its maintenance when it is time.

    python memory_scheduler.py [--config FILE]

Port 7142 answers health_check, list_jobs and run_job. Exit status: 0 after SIGTERM or SIGINT, 1 when it cannot start
or met a defect, 2 for a bad configuration.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

from memory_system import log
from memory_system.actions import ActionServer
from memory_system.keys import key_for
from memory_system.metrics import traffic_families
from memory_system.metrics_start import start_metrics
from memory_system.program import connect_address, ends, listen_address, run_program
from memory_system.reporting import Reporting
from memory_system.scheduling.desk import Desk
from memory_system.security import Gate
from memory_system.settings import Settings

NAME: Final = "memory_scheduler"
# A run goes on in the orchestrator: whoever waits for its reply is told to ask again.
DRAIN_S: Final = 0.5

logger = log.get_logger("scheduler")


class Scheduler:
    """Joins the socket to the desk behind it, and ends both in the right order."""

    def __init__(self, settings: Settings) -> None:
        network = settings.network
        self.settings = settings
        self.reporting = Reporting(settings, NAME)
        self.desk = Desk(
            settings.scheduler,
            connect_address(network.bind, network.port),
            bind=network.bind,
            on_link=self._on_link,
            on_crash=self._on_crash,
            seed=socket.gethostname(),
            key=key_for(NAME, settings),
        )
        self.gate = Gate.of(settings)
        self.server = ActionServer(
            NAME,
            listen_address(network.bind, settings.scheduler.port),
            {"list_jobs": self.desk.list_jobs, "run_job": self.desk.run_job},
            settings,
            health=self.desk.figures,
            port_key="scheduler.port",
            gate=self.gate,
            domain="manager",
        )
        self._closers: list[Callable[[], Any]] = []
        self._end = asyncio.Event()
        self._crashed = False

    async def run(self) -> int:
        """Serve until told to stop; the exit status."""
        self._end = ends(asyncio.get_running_loop())
        try:
            self._start()
            logger.info("listening", address=self.server.address, pid=os.getpid())
            await self._end.wait()
            logger.info("stopping")
            await self.server.drain(DRAIN_S)
        finally:
            await self._close()
        logger.info("stopped")
        return 1 if self._crashed else 0

    def _start(self) -> None:
        self._closers += [self.reporting.close, self.server.close]
        if self.gate is not None:
            self._closers.insert(1, self.gate.close)
            self.gate.open()
        self.server.bind()
        self._open_metrics()
        self._closers.append(self.desk.close)
        self.desk.start()
        self.server.start()
        self.reporting.start(self.desk.figures)

    async def _close(self) -> None:
        while self._closers:
            result = self._closers.pop()()
            if result is not None:
                await result

    def _open_metrics(self) -> None:
        close = start_metrics(self.settings, self.settings.metrics.memory_scheduler_port, self._families)
        self._closers.append(lambda: asyncio.to_thread(close))

    def _families(self) -> list[Any]:
        return [
            *self.desk.families(),
            *traffic_families(self.server.actions.traffic),
            *self.reporting.families(),
        ]

    def _on_crash(self) -> None:
        self._crashed = True
        self._end.set()

    def _on_link(self, state: str) -> None:
        if state == "unavailable":
            logger.warning(
                "orchestrator_unavailable", reason="the orchestrator does not answer; what is due is delayed"
            )
        self.reporting.part_changed("orchestrator", state)


async def serve(settings: Settings) -> int:
    return await Scheduler(settings).run()


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program(NAME, "Has the orchestrator do its maintenance when it is time.", serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
