"""Real starts: after a clean stop, after kill -9, over a store that changed meanwhile and over damaged derived files,
every search is answered as by a service that builds everything from the store."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from memory_system.digest import content_digest
from tests.support.process import Orchestrator, running_orchestrator, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

QUERIES = ("a heron on the pier", "tax forms", "bread and river", "other words altogether")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Orchestrator]:
    with running_orchestrator(tmp_path, embedding__provider="stub") as running:
        texts = [f"The {what} of day {day}" for day in range(60) for what in ("heron", "pier", "tax form", "bread")]
        running.ask("batch_add_memories", memories=[{"content": text} for text in texts])
        wait_until(lambda: running.ask("stats")["pending"] == 0, "every memory has its vector")
        yield running


def answers(service: Orchestrator) -> list[Any]:
    """What searches say once everything is there."""

    def ready() -> bool:
        parts = service.ask("health_check")["readiness"]
        return {parts["search_index"], parts["embedding"]} == {"ready"}

    def asked(query: str) -> Any:
        reply = service.ask("semantic_search", query=query, k=20, touch=False)
        return None if reply["degraded"] else [(one["memory_id"], round(one["score"], 4)) for one in reply["results"]]

    wait_until(ready, "index and model are ready")
    wait_until(lambda: all(asked(query) is not None for query in QUERIES), "searches are answered in full")
    return [asked(query) for query in QUERIES]


def built_anew(service: Orchestrator) -> list[Any]:
    """The answers of a start that finds nothing derived."""
    service.terminate()
    shutil.rmtree(folder(service), ignore_errors=True)
    service.restart()
    return answers(service)


def folder(service: Orchestrator) -> Path:
    return Path(f"{service.database}.index")


def stop(service: Orchestrator) -> None:
    assert service.terminate() == 0


def kill(service: Orchestrator) -> None:
    service.ask("add_memory", content="The heron that came last, before the end")
    service.kill()


def change(service: Orchestrator) -> None:
    """Another text in the place of one, of which the log says nothing."""
    assert service.terminate() == 0
    text = "A heron on the pier, a heron on the pier"
    with contextlib.closing(sqlite3.connect(service.database, isolation_level=None)) as db:
        (row_id,) = db.execute("SELECT min(row_id) FROM memories WHERE content LIKE '%bread%'").fetchone()
        fields = (text, content_digest(text), row_id)
        db.execute("UPDATE memories SET content = ?, content_digest = ? WHERE row_id = ?", fields)


def damage(service: Orchestrator) -> None:
    assert service.terminate() == 0
    files = sorted(folder(service).iterdir())
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)


@pytest.mark.parametrize("end", [stop, kill, change, damage])
def test_a_start_answers_as_one_that_builds_everything(
    service: Orchestrator, end: Callable[[Orchestrator], None]
) -> None:
    before = answers(service)
    end(service)
    service.restart()
    wait_until(lambda: service.ask("stats")["pending"] == 0, "every memory has its vector")
    found = answers(service)
    assert found == built_anew(service)
    assert (found == before) == (end in (stop, damage)), "what the store says differs where it was changed"
