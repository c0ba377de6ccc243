"""Both clients behind one face, and the fake service that they call."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from memory_client import AsyncMemoryClient, MemoryClient
from tests.contract.fake_orchestrator import FakeOrchestrator


class Harness:
    """Either client, its methods called and waited for as plain functions."""

    def __init__(self, kind: str, endpoint: str | None, **options: Any) -> None:
        self.runner = None if kind == "sync" else asyncio.Runner()
        self.client: Any = (MemoryClient if kind == "sync" else AsyncMemoryClient)(endpoint, **options)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            return self.runner.run(result) if self.runner is not None and inspect.iscoroutine(result) else result

        return call

    def stop(self) -> None:
        if self.runner is None:
            self.client.close()
            return
        self.runner.run(self.client.close())
        self.runner.close()


@pytest.fixture
def server() -> Iterator[FakeOrchestrator]:
    with FakeOrchestrator() as fake:
        yield fake


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest, server: FakeOrchestrator) -> Iterator[Callable[..., Any]]:
    made: list[Harness] = []

    def build(endpoint: str | None = None, **options: Any) -> Any:
        made.append(Harness(request.param, endpoint or server.endpoint, **options))
        return made[-1]

    yield build
    for harness in made:
        harness.stop()
