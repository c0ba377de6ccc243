"""Figures from samples, and how they are shown: a table on the terminal, Markdown for the documents."""

from __future__ import annotations

import os
import platform
import sqlite3
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import zmq
from clients import Sample
from rich.console import Console
from rich.table import Table
from workloads import BY_NAME

HEADINGS: Final = (
    "workload",
    "clients",
    "per s",
    "min to max",
    "p50 ms",
    "p99 ms",
    "of echo",
    "of ref.",
    "CPU µs",
)
_UNITS: Final = {"batch_add_memories": "batch_add, 1,000 a call"}


@dataclass(frozen=True, slots=True)
class Measured:
    """One sample with its place: which workload, how many clients, which repetition; server CPU seconds, if known."""

    workload: str
    clients: int
    repeat: int
    sample: Sample
    cpu_s: float | None


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the repetitions. Rates are calls per second, memories per second for batches.

    `of_echo`, `of_reference`: calls per second over those of the other at as many clients in the same repetition.
    `cpu_us`: processor time of the server for each call (each memory of a batch).
    """

    workload: str
    clients: int
    repeats: int
    per_s: float
    least_per_s: float
    most_per_s: float
    p50_ms: float
    p99_ms: float
    of_echo: float | None
    of_reference: float | None
    cpu_us: float | None
    request_bytes: int
    reply_bytes: int


def rows(measured: list[Measured]) -> list[Row]:
    places = dict.fromkeys((entry.workload, entry.clients) for entry in measured)
    order = list(BY_NAME)
    return [
        _row([entry for entry in measured if (entry.workload, entry.clients) == place], measured)
        for place in sorted(places, key=lambda place: (order.index(place[0]), place[1]))
    ]


def _row(entries: list[Measured], measured: list[Measured]) -> Row:
    first = entries[0]
    items = BY_NAME[first.workload].items
    rates = [entry.sample.calls_per_s * items for entry in entries]
    cpu_us = [1e6 * entry.cpu_s / (entry.sample.calls * items) for entry in entries if entry.cpu_s is not None]
    durable = first.workload.startswith("add_memory")
    return Row(
        workload=first.workload,
        clients=first.clients,
        repeats=len(entries),
        per_s=statistics.median(rates),
        least_per_s=min(rates),
        most_per_s=max(rates),
        p50_ms=statistics.median(entry.sample.percentile_ms(50) for entry in entries),
        p99_ms=statistics.median(entry.sample.percentile_ms(99) for entry in entries),
        of_echo=None if items > 1 or first.workload == "echo" else _share(entries, measured, "echo"),
        of_reference=_share(entries, measured, "reference add") if durable else None,
        cpu_us=statistics.median(cpu_us) if cpu_us else None,
        request_bytes=first.sample.request_bytes,
        reply_bytes=first.sample.reply_bytes,
    )


def _share(entries: list[Measured], measured: list[Measured], other: str) -> float | None:
    base = {
        entry.repeat: entry.sample.calls_per_s
        for entry in measured
        if entry.workload == other and entry.clients == entries[0].clients
    }
    shares = [entry.sample.calls_per_s / base[entry.repeat] for entry in entries if entry.repeat in base]
    return statistics.median(shares) if shares else None


def _cells(row: Row) -> tuple[str, ...]:
    return (
        _UNITS.get(row.workload, row.workload),
        str(row.clients),
        _rate(row.per_s),
        f"{_rate(row.least_per_s)} to {_rate(row.most_per_s)}",
        _ms(row.p50_ms),
        _ms(row.p99_ms),
        "" if row.of_echo is None else f"{row.of_echo:.2f}",
        "" if row.of_reference is None else f"{row.of_reference:.2f}",
        "" if row.cpu_us is None else f"{row.cpu_us:,.0f}",
    )


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}" if per_s >= 10.0 else f"{per_s:.1f}"


def _ms(value: float) -> str:
    return f"{value:.2f}" if value < 10.0 else f"{value:,.1f}" if value < 100.0 else f"{value:,.0f}"


def print_table(console: Console, table_rows: list[Row]) -> None:
    table = Table(*HEADINGS)
    for column in table.columns[1:]:
        column.justify = "right"
    previous = None
    for row in table_rows:
        if previous is not None and row.workload != previous:
            table.add_section()
        table.add_row(*_cells(row))
        previous = row.workload
    console.print(table)


def markdown(table_rows: list[Row]) -> str:
    lines = [HEADINGS, ("---", *("--:" for _ in HEADINGS[1:])), *map(_cells, table_rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def overhead_line(differences_us: list[float]) -> str:
    low, high = min(differences_us), max(differences_us)
    middle = statistics.median(differences_us)
    return f"MemoryClient beyond a bare REQ: {middle:.0f} µs a call ({low:.0f} to {high:.0f})"


def machine(file_system: str) -> dict[str, Any]:
    """What the figures depend on."""
    packages = ("pyzmq", "uvloop", "msgpack", "msgspec", "aiosqlite")
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_before": load_average(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "libzmq": zmq.zmq_version(),
        **{name: version(name) for name in packages},
        "sqlite": sqlite3.sqlite_version,
        "synchronous": "FULL",
        "file_system": file_system,
    }


def load_average() -> float:
    """Programs that ran or waited to run, over the last minute: more than the cores means that others were at work."""
    return round(os.getloadavg()[0], 2)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def machine_line(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in facts.items())


def as_json(
    facts: dict[str, Any], table_rows: list[Row], measured: list[Measured], more: dict[str, Any]
) -> dict[str, Any]:
    """Everything but the single latencies."""
    samples = [
        {
            "workload": entry.workload,
            "clients": entry.clients,
            "repeat": entry.repeat,
            "calls": entry.sample.calls,
            "elapsed_s": entry.sample.elapsed_s,
            "cpu_s": entry.cpu_s,
        }
        for entry in measured
    ]
    return {"machine": facts, "rows": [asdict(row) for row in table_rows], "samples": samples, **more}
