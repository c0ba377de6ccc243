"""A simulated power cut: what a disk would hold of a folder if only what was synced were sure to be on it.

A small library, preloaded into the service, journals each write, truncation, new name and sync below the folder
(powercut.c). From the journal the folder is built anew as of any moment: what was synced is there; of the rest some
steps, drawn by a seed, and of a write perhaps a part of its sectors. Names are sure once their folder was synced; of
the later ones the disk has the first so many, as journalling file systems keep their order.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pytest

from tests.support.process import Orchestrator

SOURCE: Final = Path(__file__).with_name("powercut.c")
CREATE, WRITE, TRUNCATE, SYNC, SYNC_FOLDER, RENAME, UNLINK, LINK = range(1, 9)
_HEADER: Final = struct.Struct("<IIQQqQ")
_MAGIC: Final = 0x50435554
_SECTOR: Final = 512
NOT_REBUILT: Final = ("-shm", ".lock")  # SQLite makes the one anew; the other has no contents that count


def library(folder: Path) -> Path:
    """Build the library. Skips where there is no compiler, except in CI."""
    built = folder / "powercut.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        if os.environ.get("CI"):
            pytest.fail("no C compiler: the power cut cannot be simulated")
        pytest.skip("no C compiler: the power cut cannot be simulated")
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", str(built), str(SOURCE), "-ldl", "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return built


@dataclass(frozen=True)
class Record:
    """One step. `data`: what was written, or the names, relative to the folder."""

    op: int
    at_s: float
    inode: int
    offset: int
    data: bytes

    @property
    def names(self) -> list[str]:
        return [os.fsdecode(name) for name in self.data.split(b"\0")]


def records(journal: Path) -> list[Record]:
    """All steps in their order, but for one that the end of the process cut off."""
    data, found, position = journal.read_bytes(), [], 0
    while position + _HEADER.size <= len(data):
        magic, op, at_ns, inode, offset, length = _HEADER.unpack_from(data, position)
        assert magic == _MAGIC, f"the journal is damaged at {position}"
        start = position + _HEADER.size
        position = start + length
        if position <= len(data):
            found.append(Record(op, at_ns / 1e9, inode, offset, data[start:position]))
    return found


@dataclass(eq=False)
class _File:
    """`synced`: its contents on the disk; `later`: the steps since: (offset, data), or (length, None) to cut it off."""

    synced: bytearray = field(default_factory=bytearray)
    later: list[tuple[int, bytes | None]] = field(default_factory=list)

    def sync(self) -> None:
        for step in self.later:
            _apply(self.synced, step)
        self.later.clear()

    def contents(self, chance: random.Random, keep: float) -> bytearray:
        """What might be found of it: each later step is there with the probability `keep`, some of them in part."""
        found = bytearray(self.synced)
        for step in self.later:
            if chance.random() < keep:
                _apply(found, step if keep >= 1.0 else _torn(chance, step))
        return found


def _apply(contents: bytearray, step: tuple[int, bytes | None]) -> None:
    where, data = step
    end = where if data is None else where + len(data)
    if end > len(contents):
        contents.extend(bytes(end - len(contents)))
    if data is None:
        del contents[where:]
    else:
        contents[where:end] = data


def _torn(chance: random.Random, step: tuple[int, bytes | None]) -> tuple[int, bytes | None]:
    """A write of which, now and then, only the first or the last sectors reached the disk."""
    where, data = step
    if data is None or len(data) <= _SECTOR or chance.random() < 0.7:
        return step
    cut = _SECTOR * chance.randrange(1, (len(data) - 1) // _SECTOR + 1)
    return (where, data[:cut]) if chance.random() < 0.5 else (where + cut, data[cut:])


class Disk:
    """Follows the steps. `names` are those that the process sees, `sure` those on the disk."""

    def __init__(self, before: Path) -> None:
        """`before`: the folder before the first step, all of which counts as synced; inodes are the originals'."""
        self.names: dict[str, _File] = {}
        self._inodes: dict[int, _File] = {}
        self._later: list[tuple[str, str, _File | None]] = []  # (folder, name, what it names from then on)
        for path in sorted(before.rglob("*")):
            if path.is_file():
                file = _File(bytearray(path.read_bytes()))
                self.names[str(path.relative_to(before))] = self._inodes[path.stat().st_ino] = file
        self.sure = dict(self.names)

    def follow(self, record: Record) -> None:
        if record.op == CREATE:
            self._inodes[record.inode] = _File()
            self._name(record.names[0], self._inodes[record.inode])
        elif record.op in (WRITE, TRUNCATE):
            data = record.data if record.op == WRITE else None
            self._inodes[record.inode].later.append((record.offset, data))
        elif record.op == SYNC:
            self._inodes[record.inode].sync()
        elif record.op == SYNC_FOLDER:
            self._sync_folder(record.names[0])
        elif record.op == UNLINK:
            self._name(record.names[0], None)
        else:
            self._rename(record.op, *record.names)

    def _rename(self, op: int, source: str, target: str) -> None:
        file = self.names[source]
        self._name(target, file)
        if op == RENAME:
            self._name(source, None)

    def _name(self, name: str, file: _File | None) -> None:
        self._later.append((os.path.dirname(name), name, file))
        _set(self.names, name, file)

    def _sync_folder(self, folder: str) -> None:
        for parent, name, file in self._later:
            if parent == folder:
                _set(self.sure, name, file)
        self._later = [step for step in self._later if step[0] != folder]

    def after_cut(self, chance: random.Random, keep: float) -> dict[str, bytearray]:
        """What the disk might hold if the power went now. `keep`: how likely each unsynced step is to be there."""
        names = dict(self.sure)
        count = sum(chance.random() < keep for _ in self._later)
        for _, name, file in self._later[:count]:
            _set(names, name, file)
        drawn = {id(file): file.contents(chance, keep) for file in names.values()}
        return {name: drawn[id(file)] for name, file in names.items()}


def _set(names: dict[str, _File], name: str, file: _File | None) -> None:
    if file is None:
        names.pop(name, None)
    else:
        names[name] = file


def write_folder(folder: Path, found: dict[str, bytearray]) -> None:
    """Make the folder hold exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, contents in found.items():
        if not name.endswith(NOT_REBUILT):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(contents)


def differences(disk: Disk, folder: Path) -> list[str]:
    """Files of a folder that are not what the journal says: with all steps there should be none."""
    told = disk.after_cut(random.Random(0), keep=2.0)
    names = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    found = [
        name
        for name in sorted(told.keys() | names.keys())
        if not name.endswith(NOT_REBUILT)
        and (name not in told or name not in names or bytes(told[name]) != names[name].read_bytes())
    ]
    return found


@dataclass
class Life:
    """One life of the service under the journal: the folder before it (with the originals' inodes), and the journal."""

    before: Disk
    journal: Path

    def cuts(self, chance: random.Random, count: int) -> Iterator[tuple[Disk, float]]:
        """So many moments of it, in their order: the disk then, and the time by which an answer still counts."""
        steps = records(self.journal)
        moments = sorted(chance.sample(range(1, len(steps) + 1), min(count, len(steps))))
        position = 0
        for moment in moments:
            for record in steps[position:moment]:
                self.before.follow(record)
            position = moment
            yield self.before, steps[moment].at_s if moment < len(steps) else float("inf")
        for record in steps[position:]:
            self.before.follow(record)


def begin(orchestrator: Orchestrator, built: Path, journal: Path) -> Life:
    """Start the service under the journal; its data folder is the one its database lies in."""
    folder = orchestrator.database.parent
    folder.mkdir(exist_ok=True)
    journal.unlink(missing_ok=True)
    life = Life(Disk(folder), journal)
    orchestrator.environ |= {
        "LD_PRELOAD": str(built),
        "POWERCUT_ROOT": str(folder),
        "POWERCUT_JOURNAL": str(journal),
    }
    orchestrator.start()
    return life
