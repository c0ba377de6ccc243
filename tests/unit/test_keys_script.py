"""`make keys`: what is made, what is refused, and that nobody else can read it."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest

from memory_system import keys
from memory_system.grants import Grants
from tests.support.process import PROJECT

PROGRAMS = {
    *("orchestrator", "health_manager", "memory_scheduler", "operator"),
    *("knowledge_base_agent", "session_memory_agent", "context_manager_agent"),
}


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("keys_script", PROJECT / "scripts" / "keys.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


class Keys:
    """The program, with a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._capsys = capsys

    def __call__(self, *arguments: str) -> str:
        status = SCRIPT.main(arguments)
        said = self._capsys.readouterr()
        assert (status, said.err) == (0, "")
        return said.out

    def refused(self, *arguments: str) -> str:
        assert SCRIPT.main(arguments) == 1
        return self._capsys.readouterr().err

    @property
    def grants(self) -> Grants:
        return Grants.load(self.folder / keys.GRANTS_FILE)


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Keys:
    monkeypatch.setenv("MEMORY_CONFIG", os.devnull)
    monkeypatch.setenv("MEMORY__SECURITY__KEYS_DIR", str(tmp_path / "data" / "keys"))
    return Keys(tmp_path / "data" / "keys", capsys)


def test_alone_it_makes_the_keys_of_the_service_and_its_programs(make: Keys) -> None:
    said = make()
    assert set(make.grants.by_name) == PROGRAMS
    service = keys.load_key_file(make.folder / "service.key")
    assert (make.folder / "service.pub").read_text() == f"{service.public.decode()}\n"
    for name in PROGRAMS:
        key = keys.load_key_file(make.folder / f"{name}.key")
        assert (key.name, key.server) == (name, service.public)
        assert make.grants.by_key[key.public.decode()].name == name
        assert name in said
        assert key.secret.decode() not in said
    assert make.grants.by_name["knowledge_base_agent"].act_for == ("*",)
    assert make.grants.by_name["memory_scheduler"].roles == {"admin"}
    assert make.grants.by_name["health_manager"].roles == {"operator"}


def test_nobody_else_can_read_what_is_made(make: Keys) -> None:
    before = os.umask(0)
    try:
        make()
        make("--agent", "planner")
        make("--revoke", "planner")
    finally:
        os.umask(before)
    assert make.folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in make.folder.iterdir()} == {0o600}


def test_a_second_time_it_changes_nothing(make: Keys) -> None:
    make()
    before = {path.name: path.read_bytes() for path in make.folder.iterdir()}
    assert "made" not in make()
    assert {path.name: path.read_bytes() for path in make.folder.iterdir()} == before


def test_what_is_missing_is_made_anew(make: Keys) -> None:
    make()
    before = make.grants.by_name
    (make.folder / "operator.key").unlink()
    assert "made" in make()
    key = keys.load_key_file(make.folder / "operator.key")
    assert make.grants.by_key[key.public.decode()].roles == {"admin"}
    assert make.grants.by_name["operator"].public != before["operator"].public
    assert make.grants.by_name["orchestrator"] == before["orchestrator"]


def test_a_key_of_an_agent(make: Keys) -> None:
    said = make("--agent", "planner", "--role", "writer", "--namespaces", "home, work/desk", "--act-for", "ada")
    grant = make.grants.by_name["planner"]
    assert (grant.roles, grant.namespaces, grant.act_for) == ({"writer"}, ("home", "work/desk"), ("ada",))
    key = keys.load_key_file(make.folder / "planner.key")
    assert key.public.decode() == grant.public
    assert str(make.folder / "planner.key") in said
    assert "MEMORY_KEY_FILE" in said


@pytest.mark.parametrize(
    ("role", "namespaces"),
    [("writer", ("default",)), ("reader", ("default",)), ("operator", ()), ("admin", ("*",)), ("reader,admin", ("*",))],
)
def test_namespaces_that_nobody_named(make: Keys, role: str, namespaces: tuple[str, ...]) -> None:
    make("--agent", "x", "--role", role)
    assert make.grants.by_name["x"].namespaces == namespaces


@pytest.mark.parametrize("arguments", [("--role", "writer"), ("--namespaces", "home"), ("--list", "--act-for", "ada")])
def test_a_grant_needs_a_name(make: Keys, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as ended:
        SCRIPT.main(arguments)
    said = capsys.readouterr()
    assert (ended.value.code, said.out) == (2, "")
    assert "AGENT is missing" in said.err
    assert not make.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--agent", "a b"), "letters, digits"),
        (("--agent", "a/b"), "letters, digits"),
        (("--agent", "a>b"), "letters, digits"),
        (("--agent", "@a"), "letters, digits"),
        (("--agent", "../x"), "letters, digits"),
        (("--agent", "x", "--role", "write"), "'write' is no role"),
        (("--agent", "x", "--role", ""), "there is no role"),
        (("--agent", "x", "--namespaces", "home*"), "is no namespace"),
        (("--agent", "service"), "there is a key of service"),
        (("--agent", "operator"), "make keys REVOKE=operator"),
        (("--revoke", "nobody"), "there is no key of nobody; there are orchestrator"),
    ],
)
def test_what_is_refused_changes_nothing(make: Keys, arguments: tuple[str, ...], told: str) -> None:
    make()
    before = {path.name: path.read_bytes() for path in make.folder.iterdir()}
    assert told in make.refused(*arguments)
    assert {path.name: path.read_bytes() for path in make.folder.iterdir()} == before


def test_a_key_is_revoked_and_made_anew(make: Keys) -> None:
    make("--agent", "planner")
    first = keys.load_key_file(make.folder / "planner.key").public.decode()
    make("--revoke", "planner")
    assert make.grants.by_key[first].revoked
    assert "revoked 2" in make("--list")
    make("--agent", "planner")
    assert not make.grants.by_name["planner"].revoked
    assert first not in make.grants.by_key


def test_a_revoked_program_is_not_given_another_key(make: Keys) -> None:
    make()
    make("--revoke", "operator")
    make()
    assert make.grants.by_name["operator"].revoked


def test_what_others_reach_is_refused(make: Keys) -> None:
    make()
    make.folder.chmod(0o750)
    assert f"chmod 700 {make.folder}" in make.refused()
    make.folder.chmod(0o700)
    (make.folder / keys.GRANTS_FILE).chmod(0o666)
    assert "chmod go-w" in make.refused("--list")


def test_without_the_services_key_the_others_are_of_no_use(make: Keys) -> None:
    make()
    (make.folder / keys.SERVICE_KEY_FILE).unlink()
    assert "is gone, and every key file names it" in make.refused()


def test_where_there_are_no_keys_none_are_listed(make: Keys) -> None:
    assert "make keys" in make.refused("--list")
    assert "make keys" in make.refused("--revoke", "x")
    assert not make.folder.exists()


def test_it_tells_what_stands_in_the_way_of_the_keys(make: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMORY__SECURITY__ALLOW_INSECURE", "true")
    assert "allow_insecure is true" in make()
    monkeypatch.setenv("MEMORY__SECURITY__CURVE", "off")
    assert "security.curve is off" in make()
