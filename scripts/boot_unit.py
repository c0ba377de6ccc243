"""The text of the systemd unit that `boot.py` writes: pure, from a Plan."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervision import Failure

UNIT: Final = "memory-system.service"
VARIABLES: Final = "memory-system.env"
MARK: Final = "# Written by 'make install-boot' of"
SHARED_TEMPORARY: Final = (Path("/tmp"), Path("/var/tmp"))
PRIVILEGED_PORTS: Final = 1024

UNIT_TEXT: Final = """\
{mark}
# Choices of your own belong beside it: {control} edit {unit}

[Unit]
Description=Memory service for a mesh of agents
{order}RequiresMountsFor={mounts}
ConditionFileIsExecutable={python}
StartLimitIntervalSec=0

[Service]
Type=exec
{user}EnvironmentFile={variables}
SyslogIdentifier=memory-system
UMask=0077
# supervisord itself, which starts the programs again; when it is killed, systemd ends them and starts it again.
ExecStart={run}
# What is ordered after this unit finds the programs answering. A program that does not is left to supervisord.
ExecStartPost=-{wait}
ExecStop={stop}
TimeoutStartSec=90
TimeoutStopSec=90
Restart=on-failure
RestartSec=2
# 2: the configuration is refused, and starting again would not help.
RestartPreventExitStatus=2

LimitNOFILE=65536
# Above all a bound on what hostile or broken peers make the programs keep.
MemoryMax=80%
# One program killed for want of memory is started again by supervisord; the others go on.
OOMPolicy=continue
{oom}
# None of these needs privileges.
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
{sandbox}
[Install]
WantedBy={target}
"""

SANDBOX: Final = """
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={writable}
PrivateTmp={private_tmp}
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
CapabilityBoundingSet={capabilities}
{ambient}"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be brought back, and with which choices. `user` None: a unit of the user who installs it.

    `folder` is where the unit lies; `writable` are all folders that the programs write to; `temporary` is the
    temporary folder that holds supervisord's socket, None when MEMORY_RUN_DIR does; `bind` and `ports` are where the
    programs listen.
    """

    project: Path
    python: Path
    folder: Path
    environ: Mapping[str, str]
    writable: tuple[Path, ...]
    temporary: Path | None
    user: str | None
    bind: str
    ports: tuple[int, ...]


def unit_text(plan: Plan) -> str:
    """Raises Failure for a path that no unit can name."""
    system = plan.user is not None
    command = quoted([*_program(plan.python), str(plan.project / "scripts" / "pc2.py")])
    return UNIT_TEXT.format(
        mark=f"{MARK} {_printable(str(plan.project))}",
        control="systemctl" if system else "systemctl --user",
        unit=UNIT,
        order=_order(plan.bind) if system else "",
        mounts=quoted(str(path) for path in _needed(plan)),
        python=_to_the_end(plan.python),
        user=f"User={plan.user}\n" if system else "",
        variables=_to_the_end(plan.folder / VARIABLES),
        run=f"{command} run",
        wait=f"{command} wait",
        stop=f"{command} stop",
        oom="OOMScoreAdjust=-200\n" if system else "",
        sandbox=_sandbox(plan) if system else "",
        target="multi-user.target" if system else "default.target",
    )


def environment_text(plan: Plan) -> str:
    """The EnvironmentFile: one variable a line. Raises Failure for a value that it cannot hold."""
    lines = [f"{MARK} {plan.project}"]
    for name, value in sorted(plan.environ.items()):
        escaped = "".join(f"\\{char}" if char in '\\"$`' else char for char in _printable(value))
        lines.append(f'{name}="{escaped}"')
    return "\n".join(lines) + "\n"


def quoted(words: Iterable[str]) -> str:
    """A list of words as a unit writes it. Raises Failure for what cannot be written."""
    return " ".join(f'"{_escaped(word)}"' for word in words)


def _program(path: Path) -> list[str]:
    """The first words of a command. The ":" keeps systemd from putting variables in place of "$"."""
    # systemd takes these in every word but the first.
    return [":/usr/bin/env", str(path)] if set(str(path)) & set("\"'\\") else [f":{path}"]


def _to_the_end(path: Path) -> str:
    """A path for a setting that takes the rest of its line as it is."""
    return _printable(str(path)).replace("%", "%%")


def _escaped(word: str) -> str:
    return _printable(word).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")


def _printable(word: str) -> str:
    if not word.isprintable():
        raise Failure(f"{word!r} has characters that systemd does not take")
    return word


def _order(bind: str) -> str:
    """Only an address of a network card has to be there before a program can listen on it."""
    try:
        address = ipaddress.ip_address(bind)
    except ValueError:  # localhost
        return "After=network.target\n"
    if address.is_loopback or address.is_unspecified:
        return "After=network.target\n"
    return "Wants=network-online.target\nAfter=network-online.target\n"


def _needed(plan: Plan) -> Iterator[Path]:
    """What may lie on file systems that are mounted late."""
    yield from dict.fromkeys(path.resolve() for path in (plan.project, plan.python.parent, *plan.writable))


def _sandbox(plan: Plan) -> str:
    shared = _shared_temporary(plan)
    capabilities = _capabilities(plan)
    return SANDBOX.format(
        writable=quoted(str(path) for path in dict.fromkeys([*plan.writable, *shared])),
        private_tmp="no" if shared else "yes",
        capabilities=" ".join(capabilities),
        ambient=f"AmbientCapabilities={' '.join(capabilities)}\n" if capabilities and plan.user != "root" else "",
    )


def _shared_temporary(plan: Plan) -> tuple[Path, ...]:
    """The temporary folders that the unit has to share with the rest of the machine; none of them as a rule."""
    if plan.temporary is not None:
        return (plan.temporary, *SHARED_TEMPORARY)
    inside = [plan.project, plan.python, *plan.writable]
    return SHARED_TEMPORARY if any(path.is_relative_to(top) for path in inside for top in SHARED_TEMPORARY) else ()


def _capabilities(plan: Plan) -> list[str]:
    """Root without any could not read what another user keeps to itself, such as a project in a private home."""
    needed = ["CAP_DAC_OVERRIDE"] if plan.user == "root" else []
    return [*needed, "CAP_NET_BIND_SERVICE"] if min(plan.ports) < PRIVILEGED_PORTS else needed
