"""A store that a killed service left, damaged in ways that disks have, and what becomes of it.

The judge knows what was acknowledged. A store may be refused, with a message; or be whole; or be damaged in a way that
the integrity check names. One that is opened, passes the check and lacks something is what must never be.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from memory_system.errors import StorageFailed
from memory_system.storage import integrity
from memory_system.storage.database import open_store
from tests.support.service import Orchestrator

Damage = Callable[[Path], None]
WAL_HEADER, FRAME_HEADER, PAGE = 32, 24, 4096
FRAME: Final = FRAME_HEADER + PAGE


@dataclass(frozen=True)
class Left:
    """The files of a killed service, and the texts by memory_id that it had acknowledged."""

    folder: Path
    texts: dict[str, str]

    @property
    def database(self) -> Path:
        return self.folder / "memory.db"

    @property
    def wal(self) -> Path:
        return self.folder / "memory.db-wal"


def fill_and_kill(orchestrator: Orchestrator, memories: int = 120) -> Left:
    """Half of the memories are in the database, the others in the write-ahead log alone."""
    texts: dict[str, str] = {}

    def add(count: int) -> None:
        for _ in range(count):
            text = f"memory number{len(texts)} of a store that is to be damaged"
            reply = orchestrator.ask("add_memory", content=text)
            assert reply["status"] == "success", reply
            texts[reply["memory_id"]] = text

    add(memories // 2)
    assert orchestrator.ask("run_checkpoint")["status"] == "success"
    add(memories - memories // 2)
    orchestrator.kill()
    return Left(orchestrator.database.parent, texts)


Kinds = Callable[[Left, random.Random, int], Iterator[tuple[str, Damage]]]


@dataclass
class Outcomes:
    """How often which; `silent`: the damages that nobody would have noticed."""

    counts: Counter[str] = field(default_factory=Counter)
    silent: list[str] = field(default_factory=list)
    messages: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        return ", ".join(f"{count} {what}" for what, count in sorted(self.counts.items()))


def judged(left: Left, copy: Path, damages: Iterator[tuple[str, Damage]]) -> Outcomes:
    """Damage a copy of the store, time and again, and open it."""
    found = Outcomes()
    for name, damage in damages:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(left.folder, copy, ignore=shutil.ignore_patterns("*-shm", "logs", "*.index", "*.lock"))
        damage(copy)
        outcome, message = _opened(copy / left.database.name, left.texts)
        found.counts[outcome] += 1
        if outcome == "silently wrong":
            found.silent.append(f"{name}: {message}")
        elif outcome == "refused":
            found.messages[message.replace(str(copy), "")[:60]] += 1
    return found


def _opened(database: Path, texts: dict[str, str]) -> tuple[str, str]:
    try:
        db = open_store(database)
    except StorageFailed as error:
        return "refused", error.message
    with contextlib.closing(db):
        try:
            stored = dict(db.execute("SELECT memory_id, content FROM memories NOT INDEXED"))
        except (sqlite3.Error, UnicodeDecodeError) as error:
            return "named by the read", str(error)
    if _problems(database):
        return "named by the integrity check", ""
    lacking = {memory_id for memory_id, text in texts.items() if stored.get(memory_id) != text}
    return ("silently wrong", f"{len(lacking)} of {len(texts)}") if lacking else ("whole", "")


def _problems(database: Path) -> list[str]:
    """What the service's integrity check would find of pages, keys, texts and vectors."""
    with contextlib.closing(integrity.connect(database, lambda: False)) as db:
        try:
            found = [*integrity.pages(db, None), *integrity.texts(db, _ignored), *integrity.vectors(db, _ignored)]
            for table in integrity.tables(db):
                found += integrity.foreign_keys(db, table)
        except (sqlite3.Error, UnicodeDecodeError) as error:
            return [str(error)]
    return [problem.what for problem in found]


def _ignored(rows: int) -> None:
    return None


# -- damages ----------------------------------------------------------------------------------------------------------


def flipped(name: str, at: int, mask: int) -> Damage:
    """One byte of a file changed."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= mask
        (folder / name).write_bytes(data)

    return damage


def cut(name: str, length: int) -> Damage:
    """A file cut off."""

    def damage(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.truncate(length)

    return damage


def removed(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def zeroed(name: str, at: int, length: int) -> Damage:
    """A sector that reads as zeros."""

    def damage(folder: Path) -> None:
        with (folder / name).open("r+b") as file:
            file.seek(at)
            file.write(bytes(length))

    return damage


def of_the_log(left: Left, chance: random.Random, count: int) -> Iterator[tuple[str, Damage]]:
    """Each byte of its header, bytes of frame headers and of pages, cut-offs, sectors of zeros, and no log at all."""
    name, size = left.wal.name, left.wal.stat().st_size
    frames = (size - WAL_HEADER) // FRAME
    spots = [*range(WAL_HEADER)]
    spots += [WAL_HEADER + FRAME * chance.randrange(frames) + chance.randrange(FRAME_HEADER) for _ in range(count)]
    spots += [chance.randrange(WAL_HEADER, WAL_HEADER + FRAME * frames) for _ in range(count)]
    for at in spots:
        yield f"flip {at}", flipped(name, at, 1 << chance.randrange(8))
    lengths = [0, 1, WAL_HEADER, size // 2, size - 1]
    lengths += [WAL_HEADER + FRAME * chance.randrange(frames) for _ in range(count // 2)]
    for length in lengths:
        yield f"cut at {length}", cut(name, length)
    for _ in range(count // 2):
        at = 512 * chance.randrange(size // 512)
        yield f"zeros at {at}", zeroed(name, at, 512)
    yield "removed", removed(name)


def of_the_database(left: Left, chance: random.Random, count: int) -> Iterator[tuple[str, Damage]]:
    """Each byte of its header, bytes of pages' headers and of all else, cut-offs, sectors of zeros."""
    name, size = left.database.name, left.database.stat().st_size
    pages = size // PAGE
    spots = [*range(100)]
    spots += [PAGE * chance.randrange(1, pages) + chance.randrange(12) for _ in range(count)]
    spots += [chance.randrange(size) for _ in range(count)]
    for at in spots:
        yield f"flip {at}", flipped(name, at, 1 << chance.randrange(8))
    for length in [0, 1, 100, PAGE, size // 2, size - 1, *(PAGE * chance.randrange(pages) for _ in range(count // 4))]:
        yield f"cut at {length}", cut(name, length)
    for _ in range(count // 2):
        at = 512 * chance.randrange(size // 512)
        yield f"zeros at {at}", zeroed(name, at, 512)
