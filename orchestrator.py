#!/usr/bin/env python3
"""The memory service: a ROUTER that receives requests, admits them, and sends replies.

    python orchestrator.py [--config FILE]

Exit status: 0 after SIGTERM or SIGINT, 1 when it cannot start or the store failed, 2 for a bad configuration.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from memory_system import log
from memory_system.errors import AccessDenied, ShuttingDown
from memory_system.program import ends, listen_address, run_program
from memory_system.request_server import RequestServer
from memory_system.router import Sender
from memory_system.security import Gate
from memory_system.security.guard import Asked
from memory_system.settings import Settings
from memory_system.storage.first_look import FirstLook

if TYPE_CHECKING:
    from memory_system.runtime import Runtime

logger = log.get_logger("orchestrator")

# Objects that may be made before the collector looks for cycles: records and requests have none.
YOUNG_OBJECTS: Final = 20_000


class Orchestrator:
    """Joins the socket to the parts behind it, and ends both in the right order."""

    runtime: Runtime

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._end = asyncio.Event()
        self._fatal: Exception | None = None
        self.gate = Gate.of(settings)
        self.server = RequestServer(
            listen_address(settings.network.bind, settings.network.port),
            settings,
            program="orchestrator",
            port_key="network.port",
            gate=self.gate,
            on_denied=self._denied,
        )

    async def run(self) -> int:
        """Serve until told to stop; the exit status."""
        self._end = ends(asyncio.get_running_loop())
        try:
            if self.gate is not None:
                self.gate.open()
            self.server.bind()
            self.runtime = self._made_runtime()
        except BaseException:
            self._close_sockets()
            raise
        try:
            await self.runtime.start(self._end.is_set)
        except BaseException as error:
            self._close_sockets()
            await self.runtime.close()
            if isinstance(error, ShuttingDown):
                logger.info("stopped", reason=error.message)
                return 0
            raise
        self.server.start(self.runtime.dispatcher)
        if self.gate is not None:
            self.gate.on_refused = self.runtime.guard.not_let_in
        address = self.server.router.address
        logger.info("listening", address=address, pid=os.getpid(), store=self.settings.storage.path)
        await self._end.wait()
        await self._shut_down()
        return 0 if self._fatal is None else 1

    def _made_runtime(self) -> Runtime:
        # Most of a start is this import: meanwhile the store is looked at. It is locked from here on, and no sooner:
        # who cannot listen is not the one whose store it is.
        look = FirstLook(Path(self.settings.storage.path))
        try:
            from memory_system.runtime import Runtime

            return Runtime(self.settings, on_fatal=self._on_fatal, health=self._health, keys=self.gate, look=look)
        except BaseException:
            look.close()
            raise

    def _health(self) -> dict[str, Any]:
        figures = self.server.figures()
        return figures if self.gate is None else {**figures, "security": self.gate.figures()}

    def _denied(self, sender: Sender, error: AccessDenied) -> None:
        """A plaintext request came from an address that may not send any."""
        self.runtime.guard.denied(Asked("connect", "", address=sender.address), error)

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
        self._close_sockets()
        logger.info("stopped", unanswered=in_flight.requests)

    def _close_sockets(self) -> None:
        self.server.close()
        if self.gate is not None:
            self.gate.close()


async def serve(settings: Settings) -> int:
    return await Orchestrator(settings).run()


def main(arguments: Sequence[str] | None = None) -> int:
    gc.set_threshold(YOUNG_OBJECTS)
    return run_program("orchestrator", "The memory service of the mesh.", serve, arguments)


if __name__ == "__main__":
    sys.exit(main())
