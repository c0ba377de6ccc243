"""What an agent is made of: a subclass of BaseAgent whose actions are methods.

    class NoteAgent(BaseAgent):
        \"\"\"Keeps notes.\"\"\"

        name = "note_agent"
        port = 5600

        @action
        async def add_note(self, text: str) -> Fields:
            reply = await self.memory.add_memory(text, request_id=self.memory.key("note"))
            return {"note_id": reply["memory_id"]}

    if __name__ == "__main__":
        NoteAgent.main()

The parameters of an action are its fields: their annotations say what a request may hold (`memory_system/fields.py`),
and a request that does not fit is refused before the method is called. The dict that it returns is the reply. It raises
the errors of `memory_system/errors.py`; those of `self.memory` may pass. docs/write_an_agent.md has a whole agent.
"""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import os
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, Final, NoReturn, TypeVar

from agents.agent_memory import NOBODY, AgentMemory, Caller, acting, caller, handling, passed_on, renamed
from agents.locks import NamedLocks
from memory_system import __version__, log
from memory_system.actions import ActionServer, Request, Span
from memory_system.deployment import settings_section
from memory_system.fields import expected, hints_of
from memory_system.grants import ANY, READ
from memory_system.keys import key_for
from memory_system.metrics import Family, traffic_families
from memory_system.metrics_start import start_metrics
from memory_system.process_figures import process_figures
from memory_system.program import connect_address, ends, listen_address, run_program
from memory_system.reporting import Reporting
from memory_system.security import Gate
from memory_system.settings import Settings

__all__ = ["BaseAgent", "Caller", "Fields", "Request", "Span", "acting", "action", "caller", "passed_on", "renamed"]

Fields = dict[str, Any]  # of a reply
Handler = TypeVar("Handler", bound=Callable[..., Any])

_MARK: Final = "_is_action"
_FOR_EVERYBODY: Final = frozenset({"health_check", "describe"})


def action(method: Handler) -> Handler:
    """Makes a method an action of its agent, under its own name."""
    setattr(method, _MARK, True)
    return method


class BaseAgent:
    """A program with a socket of its own. What a subclass sets or overrides:

    name      the program's, on the error bus, in its log and for the memory service
    port      where it listens; or `section`, the settings that have its `port`
    start     awaited before the first request; the loop runs, and `self.memory` may be used (it waits for nobody)
    stop      awaited after the last request
    figures   more figures for health_check and heartbeats
    families  more metrics

    `self.settings` are the system's, `self.memory` is the memory service, see AgentMemory.
    """

    name: ClassVar[str]
    port: int = 0
    section: ClassVar[str] = ""

    def __init__(self, settings: Settings) -> None:
        network = settings.network
        self.settings = settings
        if self.section:
            self.port = settings_section(settings, self.section).port
        self.reporting = Reporting(settings, self.name)
        self.log = log.get_logger(self.name)
        endpoint = settings.agents.orchestrator or connect_address(network.bind, network.port)
        self.gate = Gate.of(settings)
        self.memory = AgentMemory(endpoint, self.name, settings.agents, self._on_memory, key_for(self.name, settings))
        self.server = ActionServer(
            self.name,
            listen_address(network.bind, self.port),
            {**self._actions(), "describe": self.describe},
            settings,
            health=self._health,
            port_key=f"{self.section}.port" if self.section else f"{type(self).__name__}.port",
            flat=True,
            around=self._around,
            gate=self.gate,
            domain="agents",
            needs=_needs,
        )
        self._locks, self._under_way = NamedLocks(), NamedLocks()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closers: list[Callable[[], Any]] = []
        self._end = asyncio.Event()
        self._crashed = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.server.address} memory={self.memory.state}>"

    # -- for subclasses -----------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Make ready what the actions need."""

    async def stop(self) -> None:
        """Put away what `start` made; not called when `start` has failed."""

    def figures(self) -> Fields:
        """Figures of this agent, for health_check and its heartbeats; quickly and without I/O."""
        return {}

    def families(self) -> list[Family]:
        """Metrics of this agent; called in another thread."""
        return []

    def key(self, step: str) -> str:
        """The request_id for one write of the request being handled, see AgentMemory.key."""
        return self.memory.key(step)

    def lock(self, *name: str) -> AbstractAsyncContextManager[None]:
        """A lock of this name in the caller's namespace, for what is looked up and then written:
        `async with self.lock("topic", topic): ...`."""
        return self._locks.hold((caller().namespace, *name))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do this beside the requests, until it ends or the agent does. A defect in it ends the agent, with status 1.

        It acts for nobody but the agent, in namespace "default", unless it says otherwise with `acting`.
        """
        with acting(**dataclasses.asdict(NOBODY)):
            task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_end)

    # -- the program --------------------------------------------------------------------------------------------

    @classmethod
    def main(cls, arguments: Sequence[str] | None = None) -> NoReturn:
        """Run as a program: command line, configuration, log, signals. Exit status: 0 after SIGTERM or SIGINT, 1 when
        it cannot start or met a defect, 2 for a bad configuration."""

        async def serve(settings: Settings) -> int:
            return await cls(settings).run()

        about = inspect.cleandoc(cls.__doc__ or cls.name).splitlines()[0]
        sys.exit(run_program(cls.name, about, serve, arguments))

    async def run(self) -> int:
        """Serve until told to stop; the exit status. Raises CannotStart."""
        self._end = ends(asyncio.get_running_loop())
        try:
            await self._open()
            self.log.info("listening", address=self.server.address, pid=os.getpid())
            await self._end.wait()
            self.log.info("stopping")
            await self.server.drain()
        finally:
            await self._close()
        self.log.info("stopped")
        return 1 if self._crashed else 0

    async def _open(self) -> None:
        self._closers += [self.reporting.close, self.memory.close, self.server.close]
        if self.gate is not None:
            self._closers.insert(0, self.gate.close)
            self.gate.open()
        self.server.bind()
        self._open_metrics()
        self._closers.append(self._cancel)
        self.spawn(self.memory.watch())
        await self.start()
        self._closers.append(self.stop)
        self.server.start()
        self.reporting.start(self._health)

    async def _close(self) -> None:
        while self._closers:
            result = self._closers.pop()()
            if result is not None:
                await result

    async def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.log.critical("agent_crashed", reason="a part of the agent ended by a defect", exc_info=error)
            self._crashed = True
            self._end.set()

    # -- requests -----------------------------------------------------------------------------------------------

    @classmethod
    def _actions_of(cls) -> list[str]:
        return [name for name, member in inspect.getmembers(cls) if getattr(member, _MARK, False)]

    def _actions(self) -> dict[str, Callable[..., Any]]:
        return {name: getattr(self, name) for name in self._actions_of()}

    async def _around(self, request: Request, call: Callable[[], Any]) -> Any:
        with handling(request):
            who = caller()
            if who.request_id is None:
                return await _result(call)
            # A request that is sent again while it is worked on waits, and then finds what was done.
            async with self._under_way.hold((who.namespace, *who.sender, who.request_id)):
                return await _result(call)

    def describe(self) -> Fields:
        """The actions of this agent, each with its fields."""
        about = inspect.cleandoc(type(self).__doc__ or "")
        return {"name": self.name, "about": about, "actions": [_described(each) for each in self._actions().values()]}

    # -- how it is ----------------------------------------------------------------------------------------------

    def _health(self) -> Fields:
        state = {"ready": "healthy", "loading": "starting"}.get(self.memory.state, "degraded")
        return {
            **process_figures(),
            "state": state,
            "version": __version__,
            "readiness": {"memory_service": self.memory.state},
            "breaker": self.memory.get_circuit_breaker_status()["state"],
            **self.figures(),
        }

    def _on_memory(self, state: str) -> None:
        if state == "unavailable":
            self.log.warning("memory_service_unavailable", reason="the memory service does not answer")
        self.reporting.part_changed("memory_service", state)

    def _open_metrics(self) -> None:
        port = getattr(self.settings.metrics, f"{self.name}_port", 0)
        close = start_metrics(self.settings, port, self._families)
        self._closers.append(lambda: asyncio.to_thread(close))

    def _families(self) -> list[Family]:
        return [
            *traffic_families(self.server.actions.traffic),
            *self.reporting.families(),
            *self.families(),
        ]


def _needs(action: str) -> str:
    """What a caller's key has to permit before the agent begins. What it may write, the memory service says: each call
    there is made in the caller's name."""
    return ANY if action in _FOR_EVERYBODY else READ


async def _result(call: Callable[[], Any]) -> Mapping[str, Any] | None:
    result: Mapping[str, Any] | None = call()
    return await result if inspect.isawaitable(result) else result


def _described(method: Callable[..., Any]) -> Fields:
    hints = hints_of(method)
    fields = []
    for name, parameter in inspect.signature(method).parameters.items():
        if hints[name] is Request:
            continue
        field: Fields = {"name": name, "takes": expected(hints[name]), "required": True}
        if parameter.default is not parameter.empty:
            field |= {"required": False, "default": parameter.default}
        fields.append(field)
    return {"action": method.__name__, "about": inspect.cleandoc(method.__doc__ or ""), "fields": fields}
