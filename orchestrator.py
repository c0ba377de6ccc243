#!/usr/bin/env python3
"""The memory service: a ROUTER that receives requests, admits them, and sends replies.

    python orchestrator.py [--config FILE]

Exit status: 0 after SIGTERM or SIGINT, 1 when it cannot start or the store failed, 2 for a bad configuration.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from memory_system import log
from memory_system.errors import ShuttingDown
from memory_system.program import ends, listen_address, run_program
from memory_system.request_server import RequestServer
from memory_system.runtime import Runtime
from memory_system.settings import Settings

logger = log.get_logger("orchestrator")


class Orchestrator:
    """Joins the socket to the parts behind it, and ends both in the right order."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._end = asyncio.Event()
        self._fatal: Exception | None = None
        self.runtime = Runtime(settings, on_fatal=self._on_fatal, health=self._health)
        address = listen_address(settings.network.bind, settings.network.port)
        self.server = RequestServer(address, settings, program="orchestrator", port_key="network.port")

    async def run(self) -> int:
        """Serve until told to stop; the exit status."""
        self._end = ends(asyncio.get_running_loop())
        try:
            self.server.bind()
            await self.runtime.start(self._end.is_set)
        except BaseException as error:
            self.server.close()
            await self.runtime.close()
            if isinstance(error, ShuttingDown):
                logger.info("stopped", reason=error.message)
                return 0
            raise
        self.server.start(self.runtime.dispatcher)
        address = self.server.router.address
        logger.info("listening", address=address, pid=os.getpid(), store=self.settings.storage.path)
        await self._end.wait()
        await self._shut_down()
        return 0 if self._fatal is None else 1

    def _health(self) -> dict[str, int | float | bool]:
        return self.server.figures()

    def _on_fatal(self, error: Exception) -> None:
        self._fatal = error
        self._end.set()

    async def _shut_down(self) -> None:
        """Answer what was accepted, refuse what comes, flush, close."""
        shutdown_s = self.settings.limits.shutdown_s
        in_flight = self.server.admission.total
        self.server.refuse_more()
        logger.info("stopping", in_flight=in_flight.requests)
        self.runtime.stop_writing_after(shutdown_s / 2.0)
        if self._fatal is None:
            await self.server.answered(shutdown_s)
        await self.runtime.close()
        await asyncio.sleep(0)  # what closing answered is still to be sent
        self.server.close()
        logger.info("stopped", unanswered=in_flight.requests)


async def serve(settings: Settings) -> int:
    return await Orchestrator(settings).run()


def main(arguments: Sequence[str] | None = None) -> int:
    return run_program("orchestrator", "The memory service of the mesh.", serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
