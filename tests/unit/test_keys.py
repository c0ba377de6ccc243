"""Key files: what is written, what is read, and what is refused."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from memory_system import keys
from memory_system.errors import ConfigError
from memory_system.keys import KeyFile, key_for, key_of_environment, key_text, load_key_file, new_key, write_private
from memory_system.settings import SecuritySettings, Settings

SERVICE = new_key("service")


def written(path: Path, key: KeyFile | None = None) -> Path:
    write_private(path, key_text(key or new_key("planner", SERVICE.public), "a test's"))
    return path


def test_a_key_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    key = new_key("planner", SERVICE.public)
    assert load_key_file(written(tmp_path / "planner.key", key)) == key
    assert key.server == SERVICE.public
    assert SERVICE.server == SERVICE.public


def test_nobody_else_can_read_it_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        path = written(tmp_path / "planner.key")
        write_private(tmp_path / "other", "x", replace=True)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o600


def test_a_key_is_not_overwritten_by_mistake(tmp_path: Path) -> None:
    path = written(tmp_path / "planner.key")
    before = path.read_text()
    with pytest.raises(FileExistsError):
        written(path)
    assert path.read_text() == before
    write_private(path, "x", replace=True)
    assert path.read_text() == "x"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o601, 0o620, 0o777])
def test_a_file_that_others_reach_is_refused(tmp_path: Path, mode: int) -> None:
    path = written(tmp_path / "planner.key")
    path.chmod(mode)
    with pytest.raises(ConfigError, match=rf"mode {mode:04o}\); run: chmod 600 {path}"):
        load_key_file(path)
    path.chmod(0o400)
    load_key_file(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("name: planner", "name: plan ner"), r":2: name is not of letters"),
        (("name: planner", "name: a>b"), r":2: name is not of letters"),
        (("name: planner\n", ""), "has no name"),
        (("secret: ", "secret: x"), r":4: secret is not of 40 characters of Z85"),
        (("secret: ", "geheim: "), r":4: expected each of name, public, secret, server once"),
        (("server: ", "public: "), r":5: expected each of"),
        (("server: ", "server "), r":5: expected each of"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(tmp_path: Path, change: tuple[str, str], told: str) -> None:
    key = KeyFile("planner", *(bytes([letter]) * 40 for letter in b"abc"))
    path = tmp_path / "planner.key"
    write_private(path, key_text(key, "a test's").replace(*change))
    with pytest.raises(ConfigError, match=told) as refused:
        load_key_file(path)
    assert "bbbb" not in refused.value.message, "no message has a secret"


def test_what_is_no_key_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "planner.key"
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_key_file(path)
    path.write_bytes(b"\xff\xfe")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="it is not text"):
        load_key_file(path)
    path.write_bytes(b"# \n" * 4096)
    with pytest.raises(ConfigError, match="larger than a key file"):
        load_key_file(path)
    path.write_bytes(b"")
    with pytest.raises(ConfigError, match="has no name"):
        load_key_file(path)


def test_the_two_keys_must_be_of_one_pair(tmp_path: Path) -> None:
    one, other = new_key("planner", SERVICE.public), new_key("planner", SERVICE.public)
    path = written(tmp_path / "planner.key", KeyFile("planner", one.public, other.secret, one.server))
    with pytest.raises(ConfigError, match="not of one pair"):
        load_key_file(path)


def test_the_secret_is_in_no_repr() -> None:
    assert SERVICE.secret.decode() not in repr(SERVICE)
    assert SERVICE.public.decode() in repr(SERVICE)


def settings_of(folder: Path, curve: str = "auto") -> Settings:
    return Settings(security=SecuritySettings(keys_dir=str(folder), curve=curve))


@pytest.mark.parametrize("name", ["secret", "server"])
def test_what_has_the_form_of_a_key_and_is_none_is_refused(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "planner.key", replace(new_key("planner", SERVICE.public), **{name: b"#" * 40}))
    with pytest.raises(ConfigError, match=r"planner\.key: secret or server is not a key") as refused:
        load_key_file(path)
    assert "####" not in refused.value.message


def test_a_lost_key_of_the_service_does_not_open_its_sockets(tmp_path: Path) -> None:
    (tmp_path / keys.GRANTS_FILE).write_text("[]")
    with pytest.raises(ConfigError, match=r"service\.key is gone.*set security.curve to off"):
        keys.curve_on(settings_of(tmp_path).security)
    assert not keys.curve_on(settings_of(tmp_path, "off").security)


def test_a_folder_that_cannot_be_looked_into_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "exists", denied)
    with pytest.raises(ConfigError, match=r"service\.key cannot be looked for: Permission denied"):
        keys.curve_on(settings_of(tmp_path).security)


def test_keys_are_on_when_the_service_has_one(tmp_path: Path) -> None:
    assert not keys.curve_on(settings_of(tmp_path).security)
    with pytest.raises(ConfigError, match="make keys"):
        keys.curve_on(settings_of(tmp_path, "on").security)
    written(tmp_path / "service.key", SERVICE)
    assert keys.curve_on(settings_of(tmp_path).security)
    assert keys.curve_on(settings_of(tmp_path, "on").security)
    assert not keys.curve_on(settings_of(tmp_path, "off").security)


def test_a_program_of_the_services_host_has_its_key_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(keys.KEY_FILE_VARIABLE, raising=False)
    settings = settings_of(tmp_path)
    assert key_for("planner", settings) is None
    written(tmp_path / "service.key", SERVICE)
    with pytest.raises(ConfigError, match=r"planner\.key.*make keys"):
        key_for("planner", settings)
    key = new_key("planner", SERVICE.public)
    written(tmp_path / "planner.key", key)
    assert key_for("planner", settings) == key


def test_on_another_host_the_environment_names_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = new_key("planner", SERVICE.public)
    path = written(tmp_path / "carried.key", key)
    assert key_of_environment({keys.KEY_FILE_VARIABLE: str(path)}) == key
    assert key_of_environment({}) is None
    assert key_of_environment({keys.KEY_FILE_VARIABLE: ""}) is None
    monkeypatch.setenv(keys.KEY_FILE_VARIABLE, str(path))
    assert key_for("whatever", settings_of(tmp_path / "none")) == key


def test_what_is_set_on_a_socket() -> None:
    key = new_key("planner", SERVICE.public)
    with zmq.Context() as context, context.socket(zmq.REQ) as client, context.socket(zmq.ROUTER) as server:
        keys.apply_client(client, None)
        assert client.getsockopt(zmq.MECHANISM) == zmq.NULL
        keys.apply_client(client, key)
        assert client.getsockopt(zmq.MECHANISM) == zmq.CURVE
        keys.apply_server(server, SERVICE, "memory")
        assert server.getsockopt(zmq.CURVE_SERVER) == 1
        assert server.getsockopt(zmq.ZAP_DOMAIN) == b"memory"
        assert server.getsockopt(zmq.ZAP_ENFORCE_DOMAIN) == 1


@pytest.mark.parametrize(("curve", "version", "told"), [(False, (4, 3, 5), "no CURVE"), (True, (4, 3, 4), "4.3.5")])
def test_a_library_without_sound_curve_is_refused(
    monkeypatch: pytest.MonkeyPatch, curve: bool, version: tuple[int, int, int], told: str
) -> None:
    monkeypatch.setattr(zmq, "has", lambda _: curve)
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: version)
    with pytest.raises(ConfigError, match=told):
        keys.check_curve()


def test_an_empty_path_is_a_mistake_and_not_the_working_folder() -> None:
    with pytest.raises(ConfigError, match="key_file is empty"):
        keys.key_given("")
