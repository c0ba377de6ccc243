"""kill -9 at named points of the code, under eight clients: all or nothing, and once."""

from __future__ import annotations

import random
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from unittest import mock

import pytest

from tests.acceptance.test_crash import CLIENTS, all_embedded, damage_of_copy, seed_of_run, vectors
from tests.acceptance.test_lifecycle_crash import fill_with_kin, said, whole_merges
from tests.support import crash
from tests.support.crash import Findings
from tests.support.lifecycle import ageing_orchestrator, asking
from tests.support.service import PROJECT, Orchestrator, encode, envelope, request_id, running_orchestrator, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

LAUNCHER = [sys.executable, str(PROJECT / "tests" / "programs" / "failing_orchestrator.py")]
STORAGE, SEARCH = "memory_system.storage", "memory_system.search"
# Those that clients alone come by; each with the number of the call that is not survived.
UNDER_LOAD = {
    "before the commit": f"{STORAGE}.group:GroupRunner._finish:after:40",
    "after the commit": f"{STORAGE}.mark:MarkFile.advance:before:40",
    "after the mark": f"{STORAGE}.writer:Writer._deliver:before:40",
    "before the reply": "memory_system.router:Router.send:before:60",
    "after the reply": "memory_system.router:Router.send:after:60",
    "before a snapshot is named": f"{SEARCH}.manifest:publish:before:2",
    "a snapshot synced in part": f"{SEARCH}.manifest:sync:after:4",
    "after a snapshot is named": f"{SEARCH}.manifest:publish:after:3",
}
# Those of a backup, which is asked for.
OF_A_BACKUP = {
    "a backup is written": f"{STORAGE}.backup:write_copy:after:1",
    "a backup is checked": f"{STORAGE}.backup:_checked:after:1",
    "a backup is named": f"{STORAGE}.backup:publish:after:1",
}
OPTIONS = {"storage__synchronous": "full", "search__snapshot_s": 0.2, "search__graph_from": 20, "search__exact_max": 20}


def killed_at(orchestrator: Orchestrator, fault: str, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Start the service so that it is killed there, and wait until it was."""
    usual, orchestrator.command = orchestrator.command, LAUNCHER
    orchestrator.environ["FAULT"] = fault
    try:
        orchestrator.start(wait=False)
        assert orchestrator.process is not None
        meanwhile()
        assert orchestrator.process.wait(90) == -signal.SIGKILL
    finally:
        del orchestrator.environ["FAULT"]
        orchestrator.command = usual
    orchestrator._forget()


def sound(orchestrator: Orchestrator) -> None:
    """Every memory has its vector, and is found by its words: the service's own check finds nothing."""
    wait_until(lambda: all_embedded(orchestrator), "every memory has its vector", 30.0)
    reply = orchestrator.ask("run_integrity_check", full=True, timeout_s=60.0)
    assert reply["status"] == "success", reply
    assert (reply["ok"], reply["problems"]) == (True, [])
    assert reply["counts"]["words"] == sum(1 for _ in vectors(orchestrator.database))


def run_through(tmp_path: Path, points: dict[str, str], seed: int) -> Findings:
    """Have the service killed at each of the points while clients write, and compare in the end."""
    with running_orchestrator(tmp_path, start=False, **OPTIONS) as orchestrator:
        with crash.writing_clients(orchestrator.address, tmp_path, seed, CLIENTS) as workers:
            for name, fault in points.items():
                killed_at(orchestrator, fault)
                assert damage_of_copy(orchestrator.database, tmp_path / "copy") == [], name
            orchestrator.start()
            crash.written_more(workers, 3)
        sound(orchestrator)
        orchestrator.kill()
        return crash.check(orchestrator.database, [worker.journal.entries for worker in workers])


def test_killed_at_points_of_a_write_and_a_snapshot(tmp_path: Path) -> None:
    """At half of them, as the seed draws; the long version has all, and other calls."""
    seed = seed_of_run()
    drawn = random.Random(seed).sample(sorted(UNDER_LOAD), len(UNDER_LOAD) // 2)
    assert run_through(tmp_path, {name: UNDER_LOAD[name] for name in drawn}, seed) == Findings(), drawn


def test_replies_that_leave_before_the_commit_are_found_out(tmp_path: Path) -> None:
    """The negative control: were nothing found here, the test above would prove nothing."""
    with running_orchestrator(tmp_path, start=False, **OPTIONS) as orchestrator:
        orchestrator.environ["WRONG"] = "early_reply"
        with crash.writing_clients(orchestrator.address, tmp_path, seed_of_run(), CLIENTS) as workers:
            killed_at(orchestrator, UNDER_LOAD["before the commit"])
            orchestrator.start()
        orchestrator.kill()
        assert crash.check(orchestrator.database, [worker.journal.entries for worker in workers]).missing


@contextmanager
def repeating(orchestrator: Orchestrator, action: str, key: str) -> Iterator[None]:
    """Asks for a run, and gets no answer as the service is killed meanwhile."""
    with orchestrator.peer() as peer:
        peer.send(encode(envelope(action, {}, request_id=key), "msgpack"))
        yield


@pytest.mark.parametrize("name", OF_A_BACKUP)
def test_killed_in_the_midst_of_a_backup(tmp_path: Path, name: str) -> None:
    """The store is untouched, whatever has a backup's name is a whole one, and the next backup clears up."""
    folder, key = tmp_path / "backups", request_id()
    with running_orchestrator(tmp_path, start=False, **OPTIONS) as orchestrator:
        with crash.writing_clients(orchestrator.address, tmp_path, seed_of_run(), CLIENTS) as workers:

            def back_up() -> None:
                orchestrator.wait_ready()
                crash.written_more(workers, 3)
                with repeating(orchestrator, "backup", key):
                    assert orchestrator.process is not None
                    orchestrator.process.wait(30)

            killed_at(orchestrator, OF_A_BACKUP[name], back_up)
            assert damage_of_copy(orchestrator.database, tmp_path / "copy") == []
            assert [damage(path) for path in folder.glob("*.db")] == [[]] * (name == "a backup is named")
            orchestrator.start()
            acknowledged = [list(worker.journal.entries) for worker in workers]
            reply = orchestrator.ask("backup", {"request_id": key}, timeout_s=60)
            assert reply["status"] == "success", reply
        assert list(folder.glob("*.partial")) == []
        orchestrator.kill()
        journals = [worker.journal.entries for worker in workers]
        assert crash.check(orchestrator.database, journals) == Findings()
        assert copy_lacks(Path(reply["path"]), acknowledged, journals) == []


def damage(path: Path) -> list[str]:
    with closing(sqlite3.connect(path)) as db:
        return crash.damage(db)


def copy_lacks(backup: Path, acknowledged: list[list[crash.Entry]], journals: list[list[crash.Entry]]) -> list[str]:
    """Memories whose adding was acknowledged before the backup began, that nobody deleted, and that it lacks."""
    with closing(sqlite3.connect(backup)) as db:
        here = {row[0] for row in db.execute("SELECT memory_id FROM memories")}
        gone = {memory_id for entries in journals for e in entries if e.kind == "delete" for memory_id in e.memory_ids}
    made = [e for entries in acknowledged for e in entries if e.kind in ("add", "child", "batch") and e.outcome == "ok"]
    return [memory_id for entry in made for memory_id in entry.memory_ids if memory_id not in here | gone]


# -- consolidation ----------------------------------------------------------------------------------------------------

OF_A_MERGE = {
    "the merged memory is made": f"{STORAGE}.consolidations:_insert:after:2",
    "an original is taken in": f"{STORAGE}.consolidations:_take_in:after:5",
    "before the commit of a merge": f"{STORAGE}.consolidations:apply:after:3",
}


def test_killed_in_the_midst_of_a_merge(tmp_path: Path) -> None:
    """Each merge is whole or not there, while clients write elsewhere; and the run is finished by the next."""
    key = {"request_id": request_id()}
    with ageing_orchestrator(tmp_path, storage__synchronous="full") as service:
        fill_with_kin(service, 8)
        expected, as_of = said(service, "run_consolidation")
        service.orchestrator.kill()

        def consolidate() -> None:
            service.orchestrator.wait_ready()
            with asking(service, "run_consolidation", key, as_of=as_of):
                assert service.orchestrator.process is not None
                service.orchestrator.process.wait(90)

        address, database = service.orchestrator.address, service.orchestrator.database
        without_relations = mock.patch.object(crash, "KINDS", ("add", "child", "update", "delete"))
        with without_relations, crash.writing_clients(address, tmp_path, seed_of_run(), CLIENTS) as workers:
            for name, fault in OF_A_MERGE.items():
                killed_at(service.orchestrator, fault, consolidate)
                assert damage_of_copy(database, tmp_path / "copy") == [], name
                assert whole_merges(service) < expected, name
            service.orchestrator.start()
            service.ok("run_consolidation", key, as_of=as_of)
        assert whole_merges(service) == expected
        service.orchestrator.kill()
        assert crash.check(database, [worker.journal.entries for worker in workers]) == Findings()


# -- migration --------------------------------------------------------------------------------------------------------

OF_A_MIGRATION = {
    "before the backup": f"{STORAGE}.migrations:back_up:before:1",
    "the backup is made": f"{STORAGE}.migrations:back_up:after:1",
    "in the midst of a step": f"{STORAGE}.migrations:_step:inside:1",
    "after a step": f"{STORAGE}.migrations:_step:after:1",
}


def old_store(database: Path, version: int) -> None:
    """A store of an older schema with some memories, as an older program left it."""
    with closing(sqlite3.connect(database)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript((PROJECT / "tests" / "data" / f"schema-v{version}.sql").read_text())
        db.execute("INSERT INTO meta VALUES ('store_epoch', 'from-long-ago')")
        for number in range(50):
            text = f"memory number{number} of an older store"
            db.execute(
                "INSERT INTO memories (namespace, memory_id, content, content_digest, memory_type, memory_tier, "
                "importance, importance_at, created_at, updated_at, tier_since, created_by) "
                "VALUES (?, ?, ?, ?, 'general', 'long', 0.5, 1e9, 1e9, 1e9, 1e9, 'ada')",
                (crash.NAMESPACE, f"mem-{number}", text, crash.content_digest(text)),
            )
            db.execute("INSERT INTO index_log (row_id, op) VALUES (?, 'put')", (number + 1,))
        db.execute("INSERT INTO namespaces VALUES (?, 50)", (crash.NAMESPACE,))
        db.commit()


def test_killed_at_any_point_of_a_migration(tmp_path: Path) -> None:
    """Clients wait meanwhile, and every older memory is there in the end."""
    with running_orchestrator(tmp_path, start=False, **OPTIONS) as orchestrator:
        old_store(orchestrator.database, 3)
        with crash.writing_clients(orchestrator.address, tmp_path, seed_of_run(), CLIENTS) as workers:
            for fault in OF_A_MIGRATION.values():
                killed_at(orchestrator, fault)
                assert "ok" in damage_ignoring_schema(orchestrator.database)
            orchestrator.start()
            crash.written_more(workers, 3)
        found = orchestrator.ask("search_memory", {"namespace": crash.NAMESPACE}, query="number7")
        assert [result["memory_id"] for result in found["results"]] == ["mem-7"]
        sound(orchestrator)
        orchestrator.kill()
        journals = [worker.journal.entries for worker in workers]
        findings = crash.check(orchestrator.database, journals)
        older = [what for what in findings.twice if what.startswith("commit_seq")]  # it did not begin at 0
        assert findings == Findings(twice=older)


def damage_ignoring_schema(database: Path) -> list[str]:
    with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as db:
        assert db.execute("SELECT count(*) FROM memories").fetchone() == (50,)
        return [text for (text,) in db.execute("PRAGMA integrity_check")]
