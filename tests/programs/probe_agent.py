"""An agent for the tests of what all agents share. Listens on PROBE_PORT."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Annotated, Literal

from agents.base_agent import BaseAgent, Fields, Request, Span, acting, action, caller
from memory_system.errors import MemoryNotFound


class ProbeAgent(BaseAgent):
    """Answers what tests ask.

    This is not its first line.
    """

    name = "probe_agent"
    port = int(os.environ.get("PROBE_PORT", "0"))

    def figures(self) -> Fields:
        return {"probes": 1}

    async def start(self) -> None:
        self.log.info("probe_started")

    async def stop(self) -> None:
        self.log.info("probe_stopped")

    @action
    async def echo(
        self,
        text: Annotated[str, Span(1, 20)],
        limit: Annotated[int, Span(1, 100)] = 10,
        kind: Literal["fast", "slow"] = "fast",
        session_id: str | None = None,
    ) -> Fields:
        """Say it again."""
        return {"text": text, "limit": limit, "kind": kind, "session": session_id}

    @action
    def plain(self) -> None:
        """Nothing to wait for."""

    @action
    async def who(self, request: Request) -> Fields:
        """Whose request this is."""
        seen = caller()
        return {
            "namespace": seen.namespace,
            "agent": seen.agent_id,
            "session": seen.session_id,
            "id": seen.request_id,
            "legacy": request.legacy,
        }

    @action
    async def add(self, text: str) -> Fields:
        """Add a memory."""
        reply = await self.memory.add_memory(text, request_id=self.key("add"))
        return {"memory_id": reply["memory_id"]}

    @action
    async def read(self, memory_id: str) -> Fields:
        """A memory of the caller's."""
        return {"memory": (await self.memory.get_memory(memory_id, touch=False))["memory"]}

    @action
    async def count_up(self, name: str) -> Fields:
        """Look up, then write: a counter by name. Reply: value."""
        async with self.lock("counter", name):
            if (earlier := await self.memory.done("count")) is not None:
                return {"value": int((await self.read(earlier["memory_id"]))["memory"]["metadata"]["value"])}
            found = await self.memory.list_memories({"tags": {"any": [f"counter-{name}"]}}, limit=1000)
            value = found["count"] + 1
            await self.memory.add_memory(
                f"{name} {value}", metadata={"value": value}, tags=[f"counter-{name}"], request_id=self.key("count")
            )
            return {"value": value}

    @action
    async def stamp(self) -> Fields:
        """Write what is never the same twice, once for a request."""
        if (earlier := await self.memory.done("stamp")) is not None:
            return {"memory_id": earlier["memory_id"]}
        await asyncio.sleep(0.2)
        reply = await self.memory.add_memory(f"stamp {time.monotonic_ns()}", request_id=self.key("stamp"))
        return {"memory_id": reply["memory_id"]}

    @action
    async def elsewhere(self, text: str) -> Fields:
        """Write in another namespace, as nobody."""
        with acting(namespace="elsewhere", agent_id=None):
            reply = await self.memory.add_memory(text)
        return {"memory_id": reply["memory_id"]}

    @action
    async def missing(self) -> Fields:
        """What the service refuses."""
        return await self.memory.get_memory("mem-nowhere")

    @action
    async def own_error(self) -> Fields:
        """What the agent refuses."""
        raise MemoryNotFound("there is none", topic="none")

    @action
    async def defect(self) -> Fields:
        """A defect."""
        raise ZeroDivisionError("secret")

    @action
    async def slow(self, seconds: Annotated[float, Span(0, 60)]) -> Fields:
        """Take so long."""
        await asyncio.sleep(seconds)
        return {"slept": seconds}

    @action
    async def crash(self) -> None:
        """Have a part of the agent end by a defect."""
        self.spawn(self._fail())

    async def _fail(self) -> None:
        raise RuntimeError("a part failed")


if __name__ == "__main__":
    ProbeAgent.main()
