"""Reaching the service, and starting it when nothing answers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from report import Report

from memory_client import MemoryClient
from memory_system.protocol import ENDPOINT_VARIABLE
from memory_system.settings import load_settings

PROJECT = Path(__file__).resolve().parent.parent
PROBE_MS = 1500
CALL_MS = 30_000


class NoService(Exception):
    """There is no service to talk to; the message says what was tried."""


def connect(report: Report, namespace: str) -> MemoryClient:
    """A client of the running service, which is started first when nothing answers and no address was given.

    Raises NoService, ConfigError.
    """
    given = os.environ.get(ENDPOINT_VARIABLE)
    endpoint = given or _configured()
    if not _answers(endpoint):
        if given:
            raise NoService(f"nothing answers at {given}, which {ENDPOINT_VARIABLE} names; start it there, or unset it")
        report.say("the service does not run yet")
        _start()
        if not _answers(endpoint):
            raise NoService(f"the service was started, but nothing answers at {endpoint}")
    return MemoryClient(endpoint, agent_id="demo", namespace=namespace, timeout_ms=CALL_MS, raise_on_error=True)


def _configured() -> str:
    from supervision import Address

    network = load_settings().network
    return Address("network", network.bind, network.port).endpoint


def _answers(endpoint: str) -> bool:
    with MemoryClient(endpoint, timeout_ms=PROBE_MS) as client:
        return bool(client.health_check()["status"] == "success")


def _start() -> None:
    sys.stdout.flush()
    done = subprocess.run([sys.executable, str(PROJECT / "scripts" / "pc2.py"), "start"], cwd=PROJECT)
    if done.returncode != 0:
        raise NoService("the service did not start; the line above says why")
