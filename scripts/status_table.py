"""The table of `make status`: each program and component, as the health manager or it itself says it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from supervision import Deployment, RunDir, ask, ask_health, is_healthy

from memory_system.deployment import Address
from memory_system.keys import KeyFile

HEALTH_MANAGER: Final = "health_manager"
NOT_WELL: Final = frozenset({"down", "flapping"})
HEADINGS: Final = ("PROGRAM", "ADDRESS", "STATE", "PID", "UPTIME", "SINCE", "REASON")


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table, and whether the program can work."""

    program: str
    address: str
    state: str
    pid: str
    uptime: str
    since: str
    reason: str
    is_well: bool

    @property
    def cells(self) -> tuple[str, ...]:
        cells = (self.program, self.address, self.state, self.pid, self.uptime, self.since, self.reason)
        # Names and reasons may come from agents elsewhere.
        return tuple(map(plain, cells))


def rows(run: RunDir, deployment: Deployment, told: Mapping[str, Mapping[str, Any]]) -> Iterator[Row]:
    """`told` is the health manager's picture by component: of the programs here, then of what runs elsewhere."""
    processes, key = run.processes(), deployment.key()
    for name, address in deployment.addresses.items():
        info = processes.get(name, {})
        component = told.get(name, {})
        # Its next look may be seconds away: what has just started or ended is seen from here.
        is_fresh = (component.get("pid") or 0) == info.get("pid", 0) and component.get("state") != "starting"
        yield told_row(name, component) if component and is_fresh else seen_row(name, address, info, key)
    for name, component in told.items():
        if name not in deployment.addresses:
            yield told_row(name, component)


def told_row(name: str, component: Mapping[str, Any]) -> Row:
    """A component as the health manager sees it."""
    state = str(component.get("state", "unknown"))
    return Row(
        name,
        str(component.get("address") or ""),
        state,
        str(component.get("pid") or ""),
        uptime(component.get("uptime_s")),
        clock(component.get("since")),
        with_deaths(str(component.get("reason") or ""), component.get("deaths")),
        is_well=state not in NOT_WELL,
    )


def seen_row(name: str, address: Address, info: Mapping[str, Any], key: KeyFile | None = None) -> Row:
    """A program as its own answer shows it, or else supervisord."""
    reply = ask_health(address, key=key)
    if reply is not None and is_healthy(reply, info.get("pid", 0)):
        pid, up = str(info["pid"]), uptime(reply.get("uptime_s"))
        since = clock(info.get("start")) if reply["state"] == "starting" else ""
        return Row(name, address.shown, reply["state"], pid, up, since, own_words(reply), is_well=True)
    state = str(info.get("statename", "unknown")).lower()
    state = "no answer" if state == "running" else state
    pid = str(info.get("pid") or "")
    return Row(name, address.shown, state, pid, "", "", str(info.get("spawnerr", "")), is_well=False)


def own_words(reply: Mapping[str, Any]) -> str:
    """Why a program is in its state, in the words of the health manager."""
    if reply["state"] == "healthy":
        return "it answers"
    readiness = dict(reply.get("readiness") or {})
    wrong = ", ".join(f"{part} {state}" for part, state in readiness.items() if state not in ("ready", "off"))
    return f"it says {reply['state']}{': ' if wrong else ''}{wrong}"


def with_deaths(reason: str, deaths: int | None) -> str:
    return f"{reason} (died {deaths} {'time' if deaths == 1 else 'times'})" if deaths else reason


def plain(text: str) -> str:
    """A stranger's text as a cell: nothing of it is to steer the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text) or "-"


def uptime(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole} s" if minutes else f"{whole} s"


def clock(time_s: float | None) -> str:
    """Local time of day, with the date unless it is today; empty for None."""
    if time_s is None:
        return ""
    then = datetime.fromtimestamp(time_s)
    return then.strftime("%H:%M:%S" if then.date() == datetime.now().date() else "%Y-%m-%d %H:%M")


def ask_manager(deployment: Deployment) -> dict[str, dict[str, Any]] | None:
    """What the health manager says of each component by name, or None when it says nothing."""
    if HEALTH_MANAGER not in deployment.addresses:
        return None
    reply = ask(deployment.addresses[HEALTH_MANAGER], "get_health", key=deployment.key())
    if reply is None or not isinstance(reply.get("results"), list):
        return None
    return {str(component.get("component")): component for component in reply["results"]}


def shown(found: Iterable[Row]) -> str:
    """The rows as text, below the headings, in columns."""
    return columns(HEADINGS, (row.cells for row in found))


def columns(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text."""
    table = [headings, *rows]
    widths = [max(len(cells[column]) for cells in table) for column in range(len(headings))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) for cells in table)
    return "\n".join(line.rstrip() for line in lines)
