"""Backup, restore, export and import with the real programs, under load and killed on the way."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.support.load import clients_at_work, lacking
from tests.support.service import PROJECT, Orchestrator, free_port, running_orchestrator, wait_until
from tests.support.stores import everything

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

CONFLICTS = 3


def folder(tmp_path: Path, name: str) -> Path:
    """One for a second store."""
    (tmp_path / name).mkdir()
    return tmp_path / name


def command(script: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, str(PROJECT / "scripts" / f"{script}.py"), *map(str, arguments)]


def environment(orchestrator: Orchestrator, **changes: Any) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
    own = {f"MEMORY__{name.upper()}": str(value) for name, value in changes.items()}
    return {**kept, "MEMORY_CONFIG": os.devnull, **orchestrator.environ, **own}


def run(orchestrator: Orchestrator, script: str, *arguments: str | Path, status: int = 0, **changes: Any) -> str:
    """What a script says; fails unless it ends with this status."""
    done = subprocess.run(
        command(script, *arguments),
        env=environment(orchestrator, **changes),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == status, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


# -- backup and restore -----------------------------------------------------------------------------------------------


def test_a_restored_backup_holds_every_write_acknowledged_before_it_began(tmp_path: Path) -> None:
    backups = []
    with running_orchestrator(tmp_path, storage__synchronous="full") as orchestrator:
        with clients_at_work(orchestrator.address) as clients:
            for number in range(4):
                time.sleep(0.2)
                # The negative control: what a copy of the main file holds, taken at the very same moment.
                written = clients.written()
                bare = tmp_path / f"bare-{number}.db"
                shutil.copy(orchestrator.database, bare)
                reply = orchestrator.ask("backup", timeout_s=60)
                assert reply["status"] == "success", reply
                backups.append((Path(reply["path"]), bare, written))
            at_the_end = clients.written()
        assert orchestrator.terminate() == 0
        run(orchestrator, "backup")  # also while no service runs
        backups.append((max((tmp_path / "backups").iterdir()), backups[-1][1], at_the_end))
        for number, (backup, _, written) in enumerate(backups):
            store = tmp_path / f"restored-{number}" / "memory.db"
            if not backup.exists():
                assert number < 2  # backup.keep is 3: rotated away meanwhile
                continue
            run(orchestrator, "restore", backup, storage__path=store)
            assert lacking(store, written) == []
    # One of them may have been taken just after a checkpoint.
    assert any(lacking(bare, written) for _, bare, written in backups)
    assert len(backups[0][2]) > 150
    assert all(len(a[2]) < len(b[2]) for a, b in itertools.pairwise(backups))


def test_the_service_answers_from_a_restored_store_and_keeps_the_replaced_one(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path) as orchestrator:
        kept = orchestrator.ask("add_memory", content="from before the backup")["memory_id"]
        run(orchestrator, "backup")
        before = everything(orchestrator.database)
        lost = orchestrator.ask("add_memory", content="from after the backup")["memory_id"]
        told = run(orchestrator, "restore", "latest", status=1)
        assert f"(pid {orchestrator.pid})" in told
        assert "stop it first" in told
        orchestrator.kill()
        assert "1 memories" in run(orchestrator, "restore", "latest")
        orchestrator.start()
        assert orchestrator.ask("get_memory", memory_id=kept)["memory"]["content"] == "from before the backup"
        assert orchestrator.ask("get_memory", memory_id=lost)["error_code"] == "memory_not_found"
        assert orchestrator.ask("list_runs")["results"][0]["state"] == "interrupted"
        wait_until(lambda: orchestrator.ask("stats")["pending"] == 0, "every memory has its vector")
        assert everything(orchestrator.database)["groups"] == before["groups"]
        (replaced,) = tmp_path.glob("memory.db.before-restore-*")
        assert len(everything(replaced)["memories"]) == 2


def test_backups_are_rotated_and_a_dry_run_takes_none(tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    with running_orchestrator(tmp_path, backup__keep=2, backup__keep_days=0) as orchestrator:
        for number in range(3):
            orchestrator.ask("add_memory", content=f"memory {number}")
            run(orchestrator, "backup")
        names = sorted(path.name for path in backups.iterdir())
        assert len(names) == 2
        told = run(orchestrator, "backup", "--dry-run")
        assert f"would remove {names[0]}" in told
        assert sorted(path.name for path in backups.iterdir()) == names
        listed = run(orchestrator, "restore", status=2)
        assert listed.index(names[1]) < listed.index(names[0])
        repeated = {"request_id": "scheduled-backup-2026-01-31"}
        first = orchestrator.ask("backup", repeated)
        assert orchestrator.ask("backup", repeated) == {**first, "replayed": True}


# -- export and import ------------------------------------------------------------------------------------------------


def fill(orchestrator: Orchestrator, memories: int) -> None:
    """Memories with all that belongs to them, in two namespaces."""
    for namespace in ("default", "other"):
        around = {"namespace": namespace}
        session = orchestrator.ask("create_session", around, user_id="ada")["session_id"]
        batch = [{"content": f"memory {number} of {namespace}", "parent_id": session} for number in range(memories)]
        ids = orchestrator.ask("batch_add_memories", around, memories=batch)["memory_ids"]
        group = orchestrator.ask("create_context_group", around, name="people")["group_id"]
        for one, other in zip(ids[:20], ids[20:40], strict=True):
            orchestrator.ask("update_memory", around, memory_id=one, update_payload={"tags": ["new"]})
            orchestrator.ask(
                "add_relationship", around, source_id=one, target_id=other, relationship_type="follows", strength=0.5
            )
            orchestrator.ask("add_to_group", around, group_id=group, memory_id=other)


def test_an_import_killed_half_way_and_repeated_ends_equal(tmp_path: Path) -> None:
    file = tmp_path / "export.jsonl"
    with running_orchestrator(folder(tmp_path, "one")) as orchestrator:
        fill(orchestrator, 1000)
        run(orchestrator, "export_memories", file)
    source = everything(orchestrator.database)
    assert file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []

    with running_orchestrator(folder(tmp_path, "two")) as orchestrator:
        for killed in ("the script", "the service"):
            before = commit_seq(orchestrator)
            script = subprocess.Popen(
                command("import_memories", file), env=environment(orchestrator), stdout=-1, stderr=-1, text=True
            )
            wait_until(lambda seq=before: commit_seq(orchestrator) > seq, "a part of it is in", 60.0)
            (script.kill if killed == "the script" else orchestrator.kill)()
            if killed == "the service":
                orchestrator.start()  # the script tries again until it answers
            script.communicate(timeout=120)
            assert script.returncode == (-9 if killed == "the script" else 0)
        assert everything(orchestrator.database) == source
        wait_until(lambda: orchestrator.ask("stats")["pending"] == 0, "every memory has its vector", 90.0)
        seq = commit_seq(orchestrator)
        assert run(orchestrator, "import_memories", file).startswith("unchanged: ")
        assert commit_seq(orchestrator) == seq
        assert everything(orchestrator.database) == source


def commit_seq(orchestrator: Orchestrator) -> int:
    seq: int = sum(
        orchestrator.ask("get_commit_seq", {"namespace": namespace})["commit_seq"] for namespace in ("default", "other")
    )
    return seq


def test_conflicts_are_told_by_line_and_overwritten_only_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "export.jsonl"
    with running_orchestrator(tmp_path) as orchestrator:
        fill(orchestrator, 40)
        run(orchestrator, "export_memories", file, "--namespace", "other")
        lines = file.read_text().splitlines()
        memory_id = json.loads(lines[5])["memory_id"]
        around = {"namespace": "other"}
        orchestrator.ask("update_memory", around, memory_id=memory_id, update_payload={"content": "changed since"})
        told = run(orchestrator, "import_memories", file, status=CONFLICTS)
        assert f"line 6: memory {memory_id} is there with another content" in told
        assert content(orchestrator, memory_id) == "changed since"
        run(orchestrator, "import_memories", file, "--overwrite", "--dry-run")
        assert content(orchestrator, memory_id) == "changed since"
        assert "overwritten: 1 memory" in run(orchestrator, "import_memories", file, "--overwrite")
        assert content(orchestrator, memory_id) == json.loads(lines[5])["content"]
        assert "added: 1 group, 41 memory" in run(orchestrator, "import_memories", file, "--namespace", "third")
        assert orchestrator.ask("stats", {"namespace": "third"})["memories"] == 40


def content(orchestrator: Orchestrator, memory_id: str) -> str:
    found: str = orchestrator.ask("get_memory", {"namespace": "other"}, memory_id=memory_id)["memory"]["content"]
    return found


def test_what_is_wrong_with_a_file_is_told_before_anything_is_written(tmp_path: Path) -> None:
    """What can be wrong, tests/unit/test_export_file.py has; here: that the store is not touched."""
    file, spoilt = tmp_path / "export.jsonl", tmp_path / "spoilt.jsonl"
    with running_orchestrator(folder(tmp_path, "one")) as orchestrator:
        fill(orchestrator, 300)
        run(orchestrator, "export_memories", file)
    lines = file.read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if '"kind":"relationship"' in line)
    malformed = json.dumps({**json.loads(lines[last]), "strength": "strong"})
    dangling = json.dumps({**json.loads(lines[last]), "target_id": "mem-x"})
    cases = {
        malformed: f"line {last + 1}: strength: expected float, got str",
        dangling: f"line {last + 1}: target_id: no memory mem-x above in the file, and none in the store",
    }
    with running_orchestrator(folder(tmp_path, "two")) as orchestrator:
        for line, told in cases.items():
            spoilt.write_text("\n".join([*lines[:last], line, *lines[last + 1 :]]) + "\n")
            said = run(orchestrator, "import_memories", spoilt, status=2)
            assert told in said
            assert "nothing was changed" in said
        assert commit_seq(orchestrator) == 0
        run(orchestrator, "import_memories", tmp_path / "missing.jsonl", status=2)
        assert "line 1: this is no export" in run(orchestrator, "import_memories", os.devnull, status=2)


def test_without_a_service_the_scripts_say_so(tmp_path: Path) -> None:
    with running_orchestrator(tmp_path, start=False, network__port=free_port()) as orchestrator:
        file = tmp_path / "file.jsonl"
        file.write_text(json.dumps({"kind": "header", "format": "memory-export", "version": 1}) + "\n")
        for script in ("export_memories", "import_memories"):
            assert "no service answers at tcp://" in run(orchestrator, script, file, status=1)
        assert "there is no store" in run(orchestrator, "backup", status=1)
        assert "there is no backup in" in run(orchestrator, "restore", "latest", status=1)
        assert "backup.keep" in run(orchestrator, "backup", status=2, backup__keep=0)
