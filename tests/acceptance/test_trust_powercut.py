"""A power cut: what was not synced is gone, in part or wholly; what was acknowledged is there, once, and sound."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from memory_system.errors import StorageFailed
from memory_system.storage import inspection
from memory_system.storage.database import open_store
from tests.acceptance.test_crash import CLIENTS, seed_of_run
from tests.support import crash, powercut
from tests.support.crash import Entry, Findings
from tests.support.service import Orchestrator, running_orchestrator

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

# How likely a step that was not synced is on the disk all the same.
KEEP = (0.0, 0.5, 0.9)


class Trial:
    """A service whose disk is journalled, and what cuts at many moments of its lives do to its store."""

    def __init__(self, orchestrator: Orchestrator, folder: Path, seed: int) -> None:
        print(f"CRASH_SEED={seed}")  # noqa: T201  pytest shows it when the test fails
        self.orchestrator = orchestrator
        self.folder = folder
        self.chance = random.Random(seed)
        self.built = powercut.library(folder)
        self.lives = self.cuts = 0
        self.wrong: list[str] = []
        self.journals: list[list[Entry]] = []

    def live(self, seconds: float, cuts: int) -> None:
        """One life under load, and then cuts at many moments of it; the next begins with the last of them."""
        life = powercut.begin(self.orchestrator, self.built, self.folder / "journal")
        seed, first = self.chance.randrange(2**32), self.lives * CLIENTS
        with crash.writing_clients(self.orchestrator.address, self.folder, seed, CLIENTS, first=first) as workers:
            time.sleep(seconds)
        self.orchestrator.kill()
        self.lives += 1
        for disk, at_s in life.cuts(self.chance, cuts):
            self.journals_then = [*self.journals, *(crash.until(worker.journal.entries, at_s) for worker in workers)]
            self._cut(disk)
        assert powercut.differences(life.before, self.data) == []
        shutil.rmtree(self.data)
        (self.folder / "next").rename(self.data)
        self.journals = self.journals_then

    @property
    def data(self) -> Path:
        return self.orchestrator.database.parent

    def _cut(self, disk: powercut.Disk) -> None:
        keep = self.chance.choice(KEEP)
        found = disk.after_cut(self.chance, keep)
        for name in ("cut", "next"):  # looking at a store changes it
            powercut.write_folder(self.folder / name, found)
        self.cuts += 1
        told = wrong_with(self.folder / "cut" / self.orchestrator.database.name, self.journals_then)
        self.wrong += [f"life {self.lives}, cut {self.cuts}, keep {keep}: {what}" for what in told]

    def start_after(self) -> None:
        """Start the service itself, without the journal, on the disk as the last cut left it."""
        for name in ("LD_PRELOAD", "POWERCUT_ROOT", "POWERCUT_JOURNAL"):
            del self.orchestrator.environ[name]
        self.orchestrator.start()


def wrong_with(database: Path, journals: list[list[Entry]]) -> list[str]:
    """What is not as it should be in a store after a cut; that the service would refuse it is wrong too."""
    if not any(entry.outcome == "ok" for entries in journals for entry in entries):
        open_store(database).close()  # made in part, it is made anew
        return []
    try:
        inspection.inspect(database)
        found = crash.check(database, journals)
    except (StorageFailed, sqlite3.Error) as error:
        return [str(error)]
    return [] if found == Findings() else [str(found)]


@contextlib.contextmanager
def powered(folder: Path, seed: int, synchronous: str = "full") -> Iterator[Trial]:
    path = folder / "data" / "memory.db"
    settings = {"storage__synchronous": synchronous, "storage__path": path, "search__snapshot_s": 0.3}
    with running_orchestrator(folder, start=False, **settings) as orchestrator:
        yield Trial(orchestrator, folder, seed)


def test_a_power_cut_loses_no_acknowledged_write(tmp_path: Path) -> None:
    with powered(tmp_path, seed_of_run()) as trial:
        for _ in range(2):
            trial.live(2.0, cuts=15)
        assert trial.wrong == []
        trial.start_after()
        reply = trial.orchestrator.ask("run_integrity_check", full=True, timeout_s=60.0)
        assert (reply["ok"], reply["problems"]) == (True, [])


def test_a_store_that_is_not_synced_with_each_commit_is_found_out(tmp_path: Path) -> None:
    """The negative control: storage.synchronous normal may lose the last writes at a power cut, and does."""
    with powered(tmp_path, seed_of_run(), "normal") as trial:
        trial.live(1.0, cuts=10)
        assert len(trial.wrong) > 3
