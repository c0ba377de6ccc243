"""What a process holds: files, sockets, threads, memory; as the kernel tells it to anybody."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Footprint:
    """`sockets` are among `files`."""

    files: int
    sockets: int
    threads: int
    resident_kib: int

    def __str__(self) -> str:
        mib = self.resident_kib / 1024
        return f"{self.files} files, {self.sockets} of them sockets, {self.threads} threads, {mib:.1f} MiB"


def footprint(pid: int | None = None) -> Footprint:
    """Of a process, this one by default."""
    process = Path(f"/proc/{pid or os.getpid()}")
    kinds = _open_files(process)
    status = dict(line.split(":", 1) for line in (process / "status").read_text().splitlines())
    sockets = sum(kind.startswith("socket:") for kind in kinds)
    return Footprint(len(kinds), sockets, int(status["Threads"]), int(status["VmRSS"].split()[0]))


def sockets_of(pid: int) -> set[str]:
    """The sockets that a process has open, each by its inode."""
    return {kind for kind in _open_files(Path(f"/proc/{pid}")) if kind.startswith("socket:")}


def _open_files(process: Path) -> list[str]:
    kinds = []
    for file in os.listdir(process / "fd"):
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            kinds.append(os.readlink(process / "fd" / file))
    return kinds


def wal_kib(database: Path) -> int:
    """Size of the write-ahead log beside a database."""
    log = database.with_name(database.name + "-wal")
    return log.stat().st_size // 1024 if log.exists() else 0


def slope_per_hour(samples: list[tuple[float, float]]) -> float:
    """By how much the second figure grows in an hour; the first are seconds. Least squares."""
    count = len(samples)
    mean_s, mean = (sum(sample[part] for sample in samples) / count for part in (0, 1))
    spread = sum((at_s - mean_s) ** 2 for at_s, _ in samples)
    return 3600.0 * sum((at_s - mean_s) * (value - mean) for at_s, value in samples) / spread if spread else 0.0
