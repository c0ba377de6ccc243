"""The service on one host and its clients on another, with a cable that is pulled for a while."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.crowd import Members, crowd, not_once
from tests.support.footprint import Footprint, footprint
from tests.support.netns import Hosts, two_hosts
from tests.support.process import Orchestrator, free_port, wait_until
from tests.support.wire import environment

HEARTBEAT_S = 0.5
# The service asks after HEARTBEAT_S of silence, and waits twice that for the answer.
DETECTED_S = 3 * HEARTBEAT_S


@dataclass
class Cut:
    """`noticed_s`: after the cable was pulled, until the service had closed the connections. `back_s`: for each client,
    after it was plugged in, until its next answer."""

    noticed_s: float
    back_s: list[float]
    wrong: dict[str, int]
    errors: dict[str, int]
    before: Footprint
    after: Footprint
    clients_before: list[Footprint]
    clients_after: list[Footprint]

    def __str__(self) -> str:
        return (
            f"noticed after {self.noticed_s:.1f} s, {len(self.back_s)} clients back after {max(self.back_s):.1f} s; "
            f"{len(self.wrong)} writes not there once; sockets of the service {self.before.sockets} before, "
            f"{self.after.sockets} after; files of the clients {sum(f.files for f in self.clients_before)} before, "
            f"{sum(f.files for f in self.clients_after)} after; errors {self.errors}"
        )


def cable_pulled(
    folder: Path, *, clients: int, away_s: float, period_s: float = 0.5, watched_s: float = 10.0, **settings: Any
) -> Cut:
    """Pull the cable between the service and its clients, wait, and plug it in again."""
    port = free_port()
    with two_hosts() as hosts:
        service = _service(hosts, folder, port, settings)
        try:
            endpoint = f"tcp://{hosts.address}:{port}"
            with crowd(
                endpoint, clients=clients, kinds=("threads", "async"), period_s=period_s, prefix=hosts.at_client
            ) as members:
                time.sleep(2.0)
                before, clients_before = footprint(service.pid), _footprints(members)
                pulled_s = time.monotonic()
                hosts.pull()
                wait_until(lambda: footprint(service.pid).sockets <= before.sockets - clients, "noticed", 30.0)
                noticed_s = time.monotonic() - pulled_s
                time.sleep(max(0.0, pulled_s + away_s - time.monotonic()))
                hosts.plug()
                plugged_s = time.monotonic()
                time.sleep(watched_s)
                after, clients_after = footprint(service.pid), _footprints(members)
        finally:
            service.kill()
            service.wait(30)
    wrong = not_once(folder / "memory.db", members.texts)
    back_s = members.back_after_s(plugged_s)
    return Cut(noticed_s, back_s, wrong, dict(members.errors), before, after, clients_before, clients_after)


def _footprints(members: Members) -> list[Footprint]:
    return [footprint(pid) for pid in members.pids]


def _service(hosts: Hosts, folder: Path, port: int, settings: dict[str, Any]) -> subprocess.Popen[str]:
    """`hosts.at_service` becomes the program that it runs, so the process is the service's own."""
    network = {
        "network__bind": hosts.address,
        "network__port": port,
        "network__heartbeat_s": HEARTBEAT_S,
        "security__allow_insecure": True,
        "security__insecure_peers": '["10.213.7.0/24"]',
    }
    orchestrator = Orchestrator(folder, port, environment(folder, {**network, **settings}))
    orchestrator.command = [*hosts.at_service, *orchestrator.command]
    orchestrator.context.destroy()
    process = orchestrator.launch()
    assert process.stderr is not None
    process.stderr.close()
    return process
