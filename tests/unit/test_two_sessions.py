"""Which key examples/two_sessions.py shows."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import zmq

from memory_system.keys import key_text, new_key
from tests.support.process import PROJECT


def load_example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("two_sessions", PROJECT / "examples" / "two_sessions.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


EXAMPLE = load_example()


@pytest.fixture
def operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("MEMORY_KEY_FILE", raising=False)
    return tmp_path / "operator.key"


def test_the_key_of_the_operator_is_shown_where_there_is_one(operator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert EXAMPLE.OPERATOR_KEY == PROJECT / "data" / "keys" / "operator.key"
    assert EXAMPLE.key_file(operator) == ""
    operator.write_text("")
    assert EXAMPLE.key_file(operator) == str(operator)
    monkeypatch.setenv("MEMORY_KEY_FILE", "mine.key")
    assert EXAMPLE.key_file(operator) == "mine.key"
    monkeypatch.setenv("MEMORY_KEY_FILE", "")
    assert EXAMPLE.key_file(operator) == ""


def test_a_key_as_make_keys_writes_it_is_taken(operator: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server, _ = zmq.curve_keypair()
    key = new_key("operator", server)
    operator.write_text(key_text(key, "A comment."))
    monkeypatch.setattr(EXAMPLE, "key_file", lambda: str(operator))
    socket = SimpleNamespace()  # a real one does not tell its keys
    EXAMPLE.show_key(socket)
    assert vars(socket) == {"curve_serverkey": server, "curve_publickey": key.public, "curve_secretkey": key.secret}
