"""What the scripts that move memories share: reaching the service, and a bar on stderr."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from operator_key import operator_key_file
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from memory_client import MemoryClient
from memory_system.errors import AccessDenied, Unreachable, from_reply
from memory_system.program import connect_address
from memory_system.protocol import ENDPOINT_VARIABLE
from memory_system.settings import Settings

AGENT: Final = "transfer"
INTERRUPTED: Final = 130
_PROBE_MS: Final = 2000
_CALL_MS: Final = 120_000

# (done, total, what) -> None
Advance = Callable[[float, float | None, str], None]


def add_service_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file laid over the defaults (else MEMORY_CONFIG)")
    parser.add_argument("--endpoint", metavar="ADDRESS", help="of the service (else that of the configuration)")


def endpoint_of(settings: Settings, given: str | None) -> str:
    """The address given, else what MEMORY_ORCHESTRATOR_ADDR names, else that of the configuration."""
    network = settings.network
    return given or os.environ.get(ENDPOINT_VARIABLE) or connect_address(network.bind, network.port)


def make_client(
    settings: Settings, endpoint: str, namespace: str = "default", timeout_ms: float = _CALL_MS
) -> MemoryClient:
    """A client that shows the operator's key, where there is one. Raises ConfigError for one that cannot be used."""
    return MemoryClient(
        endpoint,
        agent_id=AGENT,
        namespace=namespace,
        timeout_ms=timeout_ms,
        raise_on_error=True,
        key_file=operator_key_file(settings),
    )


@contextlib.contextmanager
def reached(settings: Settings, endpoint: str, namespace: str = "default") -> Iterator[MemoryClient]:
    """A client of a service that answers, with patience for one that restarts meanwhile. Raises Unreachable,
    AccessDenied."""
    if not answers(settings, endpoint):
        raise Unreachable(f"no service answers at {endpoint}; is it running? (make status)")
    with make_client(settings, endpoint, namespace) as client:
        yield client


def answers(settings: Settings, endpoint: str) -> bool:
    """Whether a service is there. Raises AccessDenied for one that does not take the operator's key."""
    with MemoryClient(endpoint, agent_id=AGENT, timeout_ms=_PROBE_MS, key_file=operator_key_file(settings)) as client:
        reply = client.health_check()
    if reply.get("error_code") == AccessDenied.code:
        raise from_reply(reply)
    return bool(reply["status"] == "success")


@contextlib.contextmanager
def bar(title: str) -> Iterator[Advance]:
    """A bar on stderr, where that is a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=None)

        def advance(done: float, total: float | None, what: str) -> None:
            progress.update(task, completed=done, total=total, description=f"{title} {what}".rstrip())

        yield advance


def fail(program: str, text: str, status: int) -> int:
    sys.stderr.write(f"{program}: {text}\n")
    return status
