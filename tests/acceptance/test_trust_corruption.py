"""Damaged files: a store is refused with a sentence, or whole; never does one that lacks something seem sound."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from unittest import mock

import pytest

from memory_system.storage import inspection
from tests.acceptance.test_crash import seed_of_run
from tests.support import damage
from tests.support.damage import Left
from tests.support.service import PROJECT, Orchestrator, Service, eventually, running_orchestrator, running_service

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    folder = tmp_path_factory.mktemp("left")
    with running_orchestrator(folder, storage__synchronous="full") as orchestrator:
        return damage.fill_and_kill(orchestrator)


def chance_of_run() -> random.Random:
    seed = seed_of_run()
    print(f"CRASH_SEED={seed}")  # noqa: T201  pytest shows it when the test fails
    return random.Random(seed)


def test_a_damaged_log_never_shortens_the_store_silently(left: Left, tmp_path: Path) -> None:
    found = damage.judged(left, tmp_path / "copy", damage.of_the_log(left, chance_of_run(), 12))
    assert found.silent == []
    assert set(found.counts) == {"refused", "whole"}
    assert found.counts["refused"] > 20


def test_without_the_mark_it_would(left: Left, tmp_path: Path) -> None:
    """The negative control: SQLite by itself opens what is left of the log, and finds nothing wrong."""
    with mock.patch.object(inspection.mark, "read", return_value=None):
        found = damage.judged(left, tmp_path / "copy", damage.of_the_log(left, chance_of_run(), 12))
    assert len(found.silent) > 20


def test_a_damaged_database_is_refused_or_named(left: Left, tmp_path: Path) -> None:
    found = damage.judged(left, tmp_path / "copy", damage.of_the_database(left, chance_of_run(), 30))
    assert found.silent == []
    assert found.counts["refused"] > 20


# -- what a person sees -----------------------------------------------------------------------------------------------


def refusal(orchestrator: Orchestrator) -> str:
    """The one line with which the program ends."""
    process = orchestrator.launch()
    try:
        _, told = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 1, told
    assert "Traceback" not in told
    lines: list[str] = told.strip().splitlines()
    return lines[-1]


def accept_store(orchestrator: Orchestrator) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
    done = subprocess.run(
        [sys.executable, str(PROJECT / "scripts" / "accept_store.py")],
        env={**kept, "MEMORY_CONFIG": os.devnull, **orchestrator.environ},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_store_without_its_log_is_refused_until_it_is_accepted(left: Left, tmp_path: Path) -> None:
    shutil.copytree(left.folder, tmp_path, ignore=shutil.ignore_patterns("*-shm", "logs"), dirs_exist_ok=True)
    (tmp_path / left.wal.name).rename(tmp_path / "aside")
    with running_orchestrator(tmp_path, start=False, storage__synchronous="full") as orchestrator:
        for _ in range(2):  # nothing is changed by a refusal
            told = refusal(orchestrator)
            assert "lacks the last" in told
            assert "make restore FROM=latest" in told
            assert "make accept-store" in told
        shutil.copy(tmp_path / "aside", tmp_path / left.wal.name)
        orchestrator.start()
        assert orchestrator.ask("stats")["memories"] == len(left.texts)
        orchestrator.kill()

        shutil.copy(left.database, orchestrator.database)
        (tmp_path / left.wal.name).unlink()
        assert "lacks the last" in refusal(orchestrator)
        assert "acknowledged writes are given up" in accept_store(orchestrator)
        orchestrator.start()
        here = orchestrator.ask("stats")["memories"]
        assert len(left.texts) // 2 <= here < len(left.texts)
        assert orchestrator.ask("add_memory", content="after it")["status"] == "success"
        assert orchestrator.ask("search_memory", query="number7")["count"] == 1
        orchestrator.restart()
        assert orchestrator.ask("stats")["memories"] == here + 1


def test_a_damaged_page_and_a_newer_schema_are_one_clear_line(left: Left, tmp_path: Path) -> None:
    shutil.copytree(left.folder, tmp_path, ignore=shutil.ignore_patterns("*-shm", "logs"), dirs_exist_ok=True)
    with running_orchestrator(tmp_path, start=False, storage__synchronous="full") as orchestrator:
        with closing(sqlite3.connect(orchestrator.database, isolation_level=None)) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            db.execute(f"PRAGMA user_version = {version + 1}")
        assert f"has schema version {version + 1}" in refusal(orchestrator)
        with closing(sqlite3.connect(orchestrator.database, isolation_level=None)) as db:
            db.execute(f"PRAGMA user_version = {version}")
            (page,) = db.execute("SELECT rootpage FROM sqlite_master WHERE name = 'memories'").fetchone()
        damage.zeroed(orchestrator.database.name, (page - 1) * damage.PAGE, damage.PAGE)(tmp_path)
        told = refusal(orchestrator)
        assert "damaged" in told or "malformed" in told
        assert "make restore" in told


# -- the indexes ------------------------------------------------------------------------------------------------------


def test_a_damaged_snapshot_is_built_anew_and_answers_the_same(left: Left, tmp_path: Path) -> None:
    """Each file of it, damaged in each way; that each single byte counts, the tests of the two formats show."""
    asyncio.run(_damage_snapshots(left, tmp_path))


async def _damage_snapshots(left: Left, tmp_path: Path) -> None:
    settings = {"storage__path": tmp_path / left.database.name, "search__graph_from": 20, "search__exact_max": 20}
    shutil.copytree(left.folder, tmp_path, ignore=shutil.ignore_patterns("*-shm", "logs"), dirs_exist_ok=True)
    async with running_service(tmp_path, **settings) as service:
        await service.settled()
        expected = await answers(service)
        await eventually(lambda: saved_with_graph(service))
    index = tmp_path / f"{left.database.name}.index"
    whole = tmp_path / "whole"
    shutil.copytree(index, whole)
    names = sorted(file.name for file in whole.iterdir())
    assert {name.partition("-")[0] for name in names} >= {"words", "graph", "rows", "axes", "manifest.json"}
    chance = chance_of_run()
    for name in names:
        size = (whole / name).stat().st_size
        at = chance.randrange(size)
        for harm in (damage.flipped(name, at, 1 << chance.randrange(8)), damage.cut(name, at), damage.removed(name)):
            shutil.rmtree(index)
            shutil.copytree(whole, index)
            harm(index)
            async with running_service(tmp_path, **settings) as service:
                await service.settled()
                assert await answers(service) == expected, name


async def saved_with_graph(service: Service) -> bool:
    """Whether there was a graph yet when the index was saved."""
    await service.ok("run_snapshot")
    return any(name.startswith("graph-") for name in os.listdir(f"{service.path}.index"))


async def answers(service: Service) -> list[list[tuple[str, float]]]:
    """What searches find."""
    found = []
    for action, query in (("search_memory", "number7"), ("search_memory", "store"), ("semantic_search", "number33")):
        reply = await service.ok(action, query=query, touch=False)
        found.append([(result["memory_id"], round(result["score"], 4)) for result in reply["results"]])
    return found
