"""The demo as a person runs it, against a real orchestrator."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.test_operations import PC2, Host
from tests.support.service import Orchestrator, running_orchestrator, wait_until

PROJECT = Path(__file__).resolve().parents[2]
DEMO = PROJECT / "examples" / "demo.py"
SMALL = PROJECT / "examples" / "conversation.json"
NAMESPACE = {"namespace": "demo"}

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Orchestrator]:
    with running_orchestrator(tmp_path) as orchestrator:
        yield orchestrator


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-W", "error::ResourceWarning", str(DEMO), *map(str, arguments)]


def environ(orchestrator: Orchestrator | None) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
    return kept if orchestrator is None else {**kept, "MEMORY_ORCHESTRATOR_ADDR": orchestrator.address}


def demo(orchestrator: Orchestrator | None, *arguments: object, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env={**environ(orchestrator), **more}, capture_output=True, text=True, timeout=90
    )


def small() -> list[dict[str, Any]]:
    raw: list[dict[str, Any]] = json.loads(SMALL.read_text(encoding="utf-8"))
    return raw


def stored(orchestrator: Orchestrator) -> dict[str, int]:
    """Source id of each turn in the store -> how often it is there."""
    reply = orchestrator.ask("list_memories", NAMESPACE, limit=1000)
    ids = [memory["metadata"]["dia_id"] for memory in reply["results"]]
    return {dia_id: ids.count(dia_id) for dia_id in ids}


def expected() -> dict[str, int]:
    spoken = small()[0]["conversation"]
    return {turn["dia_id"]: 1 for turns in spoken.values() if isinstance(turns, list) for turn in turns}


def test_stores_each_turn_once_and_answers(service: Orchestrator) -> None:
    first = demo(service, SMALL, "--questions", "all")
    assert (first.returncode, first.stderr) == (0, "")
    assert f"{len(expected())} turns stored" in first.stdout
    assert "12 questions · recall of evidence@10 0." in first.stdout
    assert stored(service) == expected()
    again = demo(service, SMALL, "--ask", "Who is Biscuit?", "--show", "3")
    assert again.returncode == 0
    assert f"{len(expected())} turns already stored" in again.stdout
    assert "Who is Biscuit?" in again.stdout
    assert stored(service) == expected()


def test_memories_carry_their_source(service: Orchestrator) -> None:
    assert demo(service, SMALL, "--questions", "1").returncode == 0
    turns = {turn["dia_id"]: turn for turn in small()[0]["conversation"]["session_1"]}
    (session,) = (
        found
        for found in service.ask("list_sessions", NAMESPACE, user_id="theo-nora")["results"]
        if found["metadata"]["number"] == 1
    )
    assert session["session_state"] == "ended"
    children = service.ask(
        "get_children",
        NAMESPACE,
        parent_id=session["session_id"],
        sort_field="occurred_at",
        sort_order="asc",
    )["results"]
    assert [memory["metadata"]["dia_id"] for memory in children] == list(turns)
    image = children[11]
    assert image["content"].startswith("Nora: Measuring groundwater")
    assert image["content"].endswith("[image: a muddy pair of boots next to a steel well cover]")
    assert image["tags"] == ["Nora"]
    assert image["metadata"] == {"dia_id": "D1:12", "speaker": "Nora", "sample_id": "theo-nora"}
    assert image["user_id"] == "theo-nora"
    assert children[0]["occurred_at"] == 1704536100.0  # 10:15 on 6 January 2024, UTC


def long_conversation(path: Path, sessions: int = 150) -> Path:
    """One with enough sessions to be broken off in the middle."""
    spoken: dict[str, Any] = {"speaker_a": "A", "speaker_b": "B"}
    for number in range(1, sessions + 1):
        spoken[f"session_{number}_date_time"] = "1:56 pm on 8 May, 2023"
        spoken[f"session_{number}"] = [
            {"speaker": "A", "dia_id": f"D{number}:{turn}", "text": f"Word{number} and word{turn}."}
            for turn in range(1, 11)
        ]
    path.write_text(json.dumps({"sample_id": "long", "conversation": spoken, "qa": []}))
    return path


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_broken_off_leaves_nothing_twice(service: Orchestrator, tmp_path: Path, how: int) -> None:
    path = long_conversation(tmp_path / "long.json")
    with subprocess.Popen(
        command(path), env=environ(service), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as broken:
        wait_until(lambda: service.ask("stats", NAMESPACE)["sessions"] > 10, "ten sessions")
        broken.send_signal(how)
        _, told = broken.communicate(timeout=90)
    assert service.ask("stats", NAMESPACE)["sessions"] < 150, "it was not broken off in the middle"
    if how == signal.SIGINT:
        assert (broken.returncode, told.count("\n")) == (130, 1)
    # What is the hardest to tell: a session with some of its turns.
    session = service.ask("create_session", NAMESPACE, user_id="long", session_metadata={"number": 3})["session_id"]
    service.ask("add_memory", NAMESPACE, content="A: Word3 and word1.", parent_id=session, metadata={"dia_id": "D3:1"})
    done = demo(service, path, "--ask", "word7")
    assert done.returncode == 0, done.stderr
    counts = service.ask("stats", NAMESPACE)
    assert (counts["sessions"], counts["memories"]) == (150, 1500)
    listed = service.ask("list_memories", NAMESPACE, limit=1000)
    ids = [memory["metadata"]["dia_id"] for memory in listed["results"]]
    assert len(set(ids)) == len(ids) == 1000


def test_a_changed_file_replaces_what_changed(service: Orchestrator, tmp_path: Path) -> None:
    assert demo(service, SMALL, "--questions", "1").returncode == 0
    raw = small()
    raw[0]["conversation"]["session_2"][0]["text"] = "The piano is a pianola."
    del raw[0]["conversation"]["session_5"], raw[0]["qa"]
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(raw))
    done = demo(service, path, "--ask", "pianola")
    assert f"{len(raw[0]['conversation']['session_2'])} turns stored" in done.stdout
    assert "The piano is a pianola." in done.stdout
    assert stored(service) == {dia_id: 1 for dia_id in expected() if not dia_id.startswith("D5:")}


def without(*keys: str) -> str:
    raw: Any = small()
    place = raw[0]
    for key in keys[:-1]:
        place = place[int(key) - 1] if isinstance(place, list) else place[key]
    del place[keys[-1]]
    return json.dumps(raw)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "not JSON"),
        ("[]", "the list of conversations is empty"),
        ("[1]", "conversation 1 is not a map"),
        (without("sample_id"), "conversation 1: sample_id is missing"),
        (without("conversation"), "conversation 1 (theo-nora): conversation is missing"),
        (without("conversation", "session_2_date_time"), "session_2_date_time is missing"),
        (without("conversation", "session_3", "2", "dia_id"), "session_3, turn 2: dia_id is missing"),
        (without("conversation", "session_3", "2", "text"), "session_3, turn 2: text is missing"),
        (SMALL.read_text(encoding="utf-8").replace("8:05 am on 17", "17"), "not like"),
        (SMALL.read_text(encoding="utf-8").replace('"D1:2"', '"D1:1"'), "two turns have the same dia_id"),
    ],
)
def test_a_file_in_another_format_gets_one_clear_line(
    text: str, complaint: str, service: Orchestrator, tmp_path: Path
) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    done = demo(service, path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(path) in done.stderr
    assert complaint in done.stderr
    assert stored(service) == {}


def test_a_missing_file_and_an_address_where_nobody_is(tmp_path: Path) -> None:
    missing = demo(None, tmp_path / "none.json")
    assert (missing.returncode, missing.stderr.count("\n")) == (2, 1)
    nobody = demo(None, SMALL, MEMORY_ORCHESTRATOR_ADDR="tcp://127.0.0.1:9")
    assert (nobody.returncode, nobody.stderr.count("\n")) == (1, 1)
    assert "tcp://127.0.0.1:9" in nobody.stderr


def test_starts_the_service_when_it_does_not_run(tmp_path: Path) -> None:
    host = Host(tmp_path, tmp_path / "run")
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, [*PC2, "stop"], env=host.environ(), capture_output=True, timeout=60)
        done = subprocess.run(
            command(SMALL, "--questions", "2"), env=host.environ(), capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, done.stderr
        assert "2 questions" in done.stdout
        assert host.row()["STATE"]
