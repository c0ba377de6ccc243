"""Two hosts on one machine: two network namespaces with a cable (a veth pair) between them, which a test can pull.

with two_hosts() as hosts:
    Popen([*hosts.at_service, "python", ...]); Popen([*hosts.at_client, "python", ...])
    hosts.pull(); hosts.plug()

The namespaces have no names and belong to processes that wait: they end with the block, and nothing of the machine's
own network is touched. It takes root, or a kernel that lets others make namespaces; `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

ADDRESS: Final = "10.213.7.1"
PROGRAMS: Final = {"ip": "iproute2", "unshare": "util-linux", "nsenter": "util-linux"}
# As root, and else in a user namespace, where everybody is.
MADE_BY: Final = (("unshare", "--net"), ("unshare", "--user", "--map-root-user", "--net"))
STEPS_INTO: Final = (("nsenter", "--net"), ("nsenter", "--user", "--preserve-credentials", "--net"))
WAITS: Final = ("sh", "-c", "echo ready; exec sleep infinity")
ADVICE: Final = "run the tests as root (in a container: with --cap-add SYS_ADMIN --cap-add NET_ADMIN)"


class NoNamespaces(Exception):
    """They cannot be made here; the message says why."""


def why_not() -> str:
    """Why there can be no two hosts here, and what to do about it; "" if there can."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            return f"two hosts need the program {program}: install {package}"
    try:
        with two_hosts():
            return ""
    except NoNamespaces as error:
        return f"no network namespaces can be made here ({error}): {ADVICE}"


@dataclass(frozen=True)
class Hosts:
    """`at_service` and `at_client` go before a command that is to run on that host, and become what it runs."""

    at_service: tuple[str, ...]
    at_client: tuple[str, ...]
    address: str = ADDRESS

    def pull(self) -> None:
        """Nothing gets from one host to the other, and neither is told: it is the client's end of the cable."""
        _run(*self.at_client, "ip", "link", "set", "cable1", "down")

    def plug(self) -> None:
        _run(*self.at_client, "ip", "link", "set", "cable1", "up")


@contextlib.contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Raises NoNamespaces."""
    way = 0 if os.geteuid() == 0 and _works(MADE_BY[0]) else 1
    with contextlib.ExitStack() as made:
        service = made.enter_context(_waiting(MADE_BY[way]))
        # In the same user namespace, if there is one: a cable joins namespaces of one owner.
        client = made.enter_context(_waiting((*_into(service, way), "unshare", "--net")))
        hosts = Hosts(_into(service, way), _into(client, way))
        _run(*hosts.at_service, "ip", "link", "add", "cable0", "type", "veth", "peer", "cable1", "netns", str(client))
        for number, host in enumerate((hosts.at_service, hosts.at_client)):
            _run(*host, "ip", "addr", "add", f"10.213.7.{number + 1}/24", "dev", f"cable{number}")
            _run(*host, "ip", "link", "set", f"cable{number}", "up")
            _run(*host, "ip", "link", "set", "lo", "up")
        yield hosts


def _works(command: tuple[str, ...]) -> bool:
    return subprocess.run([*command, "true"], capture_output=True).returncode == 0


@contextlib.contextmanager
def _waiting(made_by: tuple[str, ...]) -> Iterator[int]:
    """The process id of one that waits in namespaces of its own."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*made_by, *WAITS], text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            if process.stdout.readline() != "ready\n":
                raise NoNamespaces(process.stderr.read().strip())
            yield process.pid
        finally:
            process.kill()


def _into(pid: int, way: int) -> tuple[str, ...]:
    return (*STEPS_INTO[way], "--target", str(pid))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoNamespaces(done.stderr.strip())
