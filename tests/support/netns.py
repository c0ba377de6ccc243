"""Two hosts on one machine: two network namespaces with a cable (a veth pair) between them, which a test can pull.

with two_hosts() as hosts:
    Popen([*hosts.at_service, "python", ...]); Popen([*hosts.at_client, "python", ...])
    hosts.pull(); hosts.plug()

Needs root and `ip`; `why_not` says what is missing. Never in CI, whose machines are not ours to change.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass


def why_not() -> str:
    """Why there can be no two hosts here; "" if there can."""
    if os.environ.get("CI"):
        return "not in CI: makes network namespaces"
    if os.geteuid() != 0:
        return "needs root to make network namespaces"
    if shutil.which("ip") is None:
        return "needs the program ip (iproute2)"
    try:
        with two_hosts():
            return ""
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"


@dataclass(frozen=True)
class Hosts:
    """`at_service` and `at_client` go before a command that is to run on that host."""

    service: str
    client: str
    address: str

    @property
    def at_service(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.service)

    @property
    def at_client(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.client)

    def pull(self) -> None:
        """Nothing gets from one host to the other, and neither is told: it is the client's end of the cable."""
        _ip("-n", self.client, "link", "set", "cable1", "down")

    def plug(self) -> None:
        _ip("-n", self.client, "link", "set", "cable1", "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    name = f"memory-test-{os.getpid()}"
    hosts = Hosts(f"{name}-a", f"{name}-b", "10.213.7.1")
    with contextlib.ExitStack() as made:
        for host in (hosts.service, hosts.client):
            _ip("netns", "add", host)
            made.callback(_ip, "netns", "del", host)
        _ip("link", "add", "cable0", "netns", hosts.service, "type", "veth", "peer", "cable1", "netns", hosts.client)
        for number, host in enumerate((hosts.service, hosts.client)):
            _ip("-n", host, "addr", "add", f"10.213.7.{number + 1}/24", "dev", f"cable{number}")
            _ip("-n", host, "link", "set", f"cable{number}", "up")
            _ip("-n", host, "link", "set", "lo", "up")
        yield hosts


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
