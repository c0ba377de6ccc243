"""Loading, refusing and documenting settings."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import yaml

from memory_system.config_loader import Key
from memory_system.errors import ConfigError
from memory_system.lifecycle_settings import TypeSettings
from memory_system.settings import PROJECT, RedisSettings, Settings, config_file, load_settings

KEYS = list(Settings().all_keys())
NAMES = [key.name for key in KEYS]
YAML_FILE = PROJECT / "config" / "memory_config.yaml"
DOCS = (PROJECT / "docs" / "configuration.md").read_text(encoding="utf-8")


def write(folder: Path, text: str) -> str:
    file = folder / "my.yaml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def refusal(path: str | None = None, environ: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_settings(path, environ or {})
    assert "\n" not in caught.value.message
    return caught.value.message


def shown(key: Key) -> str:
    value = list(key.value) if isinstance(key.value, tuple) else key.value
    written = yaml.safe_dump(value, default_flow_style=True, width=1_000_000)
    return '""' if value == "" else written.removesuffix("...\n").strip()


def test_layers_override_one_another_key_by_key(tmp_path: Path) -> None:
    path = write(tmp_path, "network: {port: 7001, backlog: 7}\nlifecycle: {short: {decay_rate: 0.3}}\n")
    environ = {"MEMORY__NETWORK__PORT": "7002", "MEMORY__LIFECYCLE__LONG__DECAY_RATE": "0", "UNRELATED": "1"}
    settings = load_settings(path, environ)
    assert settings.network.port == 7002
    assert settings.network.backlog == 7
    assert settings.network.bind == "127.0.0.1"
    assert settings.lifecycle.short.decay_rate == 0.3
    assert settings.lifecycle.short.max_age_days == 7.0
    assert settings.lifecycle.long.decay_rate == 0.0


def test_file_is_the_argument_else_the_variable_else_the_projects_own(tmp_path: Path) -> None:
    path = write(tmp_path, "network: {port: 7001}")
    assert load_settings(None, {"MEMORY_CONFIG": path}).network.port == 7001
    assert load_settings(path, {"MEMORY_CONFIG": "/does/not/exist"}).network.port == 7001
    assert config_file(None, {}) == YAML_FILE
    assert "cannot read the configuration /does/not/exist" in refusal(None, {"MEMORY_CONFIG": "/does/not/exist"})


@pytest.mark.parametrize("text", ["", "# nothing\n", "network:\n", "network:\n  # port: 7141\nredis: {}\n"])
def test_empty_file_and_empty_sections_change_nothing(tmp_path: Path, text: str) -> None:
    assert load_settings(write(tmp_path, text), {}) == Settings().resolved()


def test_words_that_yaml_reads_as_booleans_are_text_where_text_is_expected(tmp_path: Path) -> None:
    path = write(tmp_path, "embedding: {provider: off}\nredis: {prefix: yes}\n")
    settings = load_settings(path, {})
    assert settings.embedding.provider == "off"
    assert settings.redis.prefix == "yes"
    assert load_settings(path, {"MEMORY__EMBEDDING__PROVIDER": "off"}).embedding.provider == "off"


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("MEMORY__SECURITY__INSECURE_PEERS", "[10.1.0.0/16, 'fd00::/8']", ("10.1.0.0/16", "fd00::/8")),
        ("MEMORY__STORAGE__IDEMPOTENCY", "false", False),
        ("MEMORY__STORAGE__GROUP_MS", "5", 5.0),
        ("MEMORY__REDIS__URL", "redis://:a: #b%@host:6379/0", "redis://:a: #b%@host:6379/0"),
        ("MEMORY__REDIS__URL", "", ""),
        ("MEMORY__REDIS__PREFIX", "12", "12"),
    ],
)
def test_variables_are_yaml_except_for_text(variable: str, text: str, expected: object) -> None:
    settings = load_settings(str(YAML_FILE), {variable: text})
    value = {key.variable: key.value for key in settings.all_keys()}[variable]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("network:\n  prot: 1\n", ["my.yaml:2:", "unknown key network.prot", "network.port"]),
        ("netwrok:\n  port: 1\n", ["my.yaml:1:", "unknown key netwrok", "is network"]),
        (
            "lifecycle:\n  short:\n    decay: 1\n",
            ["my.yaml:3:", "lifecycle.short.decay;", "lifecycle.short.decay_rate"],
        ),
        ("port: 7140\n", ["my.yaml:1:", "unknown key port"]),
        ("network: 7140\n", ["my.yaml:1:", "network is a section"]),
        ("lifecycle: {short: 1}\n", ["lifecycle.short is a section"]),
        ("network:\n  port: 1\n  port: 2\n", ["my.yaml:3:", "network.port is given twice"]),
        ("network:\n  port: 70000\n", ["my.yaml:2: network.port = 70000: expected an integer from 1 to 65535"]),
        ("network:\n  port: '7140'\n", ["network.port = '7140': expected an integer"]),
        ("network:\n  port: true\n", ["network.port = True"]),
        ("network:\n  port: {a: 1}\n", ["network.port = {'a': 1}"]),
        ("network:\n  port: 7140.0\n", ["network.port = 7140.0"]),
        ("network:\n  bind: pc2\n", ["network.bind = 'pc2': expected an IP address or localhost"]),
        ("network:\n  heartbeat_s: .nan\n", ["network.heartbeat_s = nan"]),
        (f"network:\n  heartbeat_s: 1{'0' * 400}\n", ["network.heartbeat_s = 1000", "…"]),
        ("storage:\n  path: ''\n", ["storage.path = '': expected a file path"]),
        ("storage:\n  synchronous: off\n", ["storage.synchronous = 'off': expected one of full, normal"]),
        ("storage:\n  idempotency: 1\n", ["storage.idempotency = 1: expected true or false"]),
        ("security:\n  insecure_peers: 10.0.0.0/8\n", ["security.insecure_peers = '10.0.0.0/8': expected a list"]),
        ("security:\n  insecure_peers: [10.0.0.1/8]\n", ["security.insecure_peers", "no host bits"]),
        ("ranking:\n  dense_weight: 0\n  keyword_weight: 0\n", ["ranking.dense_weight", "ranking.keyword_weight"]),
        ("limits:\n  max_in_flight: 8\n", ["limits.max_in_flight_per_client = 64", "limits.max_in_flight = 8"]),
        ("network:\n  port: [1\n", ["my.yaml:3: not valid YAML"]),
        ("network:\n\tport: 1\n", ["my.yaml:2: not valid YAML"]),
        ("network:\n  port: 2001-99-99\n", ["not valid YAML"]),
        ("a: 1\n---\nb: 1\n", ["not valid YAML"]),
        ("- 1\n", ["expected sections"]),
        ("network: {port: !!python/object:os.system {}}\n", ["not valid YAML"]),
        ("\x01", ["not valid YAML"]),
        ("[" * 3000, ["not valid YAML"]),
        ("? " * 100_000, ["not valid YAML: more than 100 levels"]),
    ],
)
def test_refusals_are_one_line_with_place_key_and_what_is_expected(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(write(tmp_path, text))
    assert all(part in message for part in parts), message


def test_refused_variables_are_named(tmp_path: Path) -> None:
    message = refusal(environ={"MEMORY__NETWORK__PRT": "1"})
    assert "unknown variable MEMORY__NETWORK__PRT; the nearest known one is MEMORY__NETWORK__PORT" in message
    message = refusal(environ={"MEMORY__NETWORK__PORT": "[1"})
    assert "environment variable MEMORY__NETWORK__PORT: network.port = '[1': expected an integer" in message


@pytest.mark.parametrize("key", [key for key in KEYS if key.kind in (int, float)], ids=lambda key: key.name)
def test_numbers_are_taken_up_to_their_bounds_and_not_beyond(key: Key) -> None:
    low, high = key.rule.span
    for value in (low, high):
        environ = {key.variable: str(value), "MEMORY__LIMITS__MAX_IN_FLIGHT": "100000"}
        if key.name == "limits.max_in_flight":
            environ = {key.variable: str(value), "MEMORY__LIMITS__MAX_IN_FLIGHT_PER_CLIENT": "1"}
        load_settings(str(YAML_FILE), environ)
    step = 1 if key.kind is int else 0.001
    for value in (low - step, high + step):
        assert f"{key.name} = " in refusal(environ={key.variable: str(value)})


def test_types_are_a_table_of_their_own(tmp_path: Path) -> None:
    text = "lifecycle:\n  memory_types:\n    fact: {memory_tier: long, importance: 1}\n    note: {}\n"
    types = load_settings(write(tmp_path, text), {}).lifecycle.memory_types
    assert types == {"fact": TypeSettings("long", 1.0, None), "note": TypeSettings()}
    assert isinstance(types["fact"].importance, float)
    environ = {"MEMORY__LIFECYCLE__MEMORY_TYPES": "{fact: {reinforcement_factor: 1.5}}"}
    types = load_settings(write(tmp_path, text), environ).lifecycle.memory_types
    assert types == {"fact": TypeSettings(reinforcement_factor=1.5)}
    assert load_settings(write(tmp_path, "lifecycle:\n  memory_types:\n"), {}).lifecycle.memory_types == {}


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        (
            "{fact: {importnce: 1}}",
            ["unknown key lifecycle.memory_types.fact.importnce", "memory_types.fact.importance"],
        ),
        ("{fact: {importance: 2}}", ["lifecycle.memory_types.fact.importance = 2: expected a number from 0 to 1"]),
        (
            "{fact: {memory_tier: forever}}",
            ["memory_types.fact.memory_tier = 'forever': expected one of short, m"],
        ),
        ("{fact: {importance: null}}", ["lifecycle.memory_types.fact.importance = None: expected a number"]),
        (
            "{fact: 0.5}",
            ["memory_types = {'fact': 0.5}: expected a mapping of a memory type to any of memory_tier"],
        ),
        ("[fact]", ["lifecycle.memory_types = ['fact']: expected a mapping"]),
        ("{1: {}}", ["lifecycle.memory_types = {1: {}}: expected a mapping"]),
        ("{fact: {}, fact: {}}", ["lifecycle.memory_types.fact is given twice"]),
        ("{fact: {importance: 0, importance: 1}}", ["lifecycle.memory_types.fact.importance is given twice"]),
    ],
)
def test_types_are_checked_entry_by_entry(tmp_path: Path, table: str, parts: list[str]) -> None:
    message = refusal(write(tmp_path, f"lifecycle:\n  memory_types: {table}\n"))
    assert all(part in message for part in [*parts, "my.yaml:2: "]), message
    if "twice" not in message:
        message = refusal(environ={"MEMORY__LIFECYCLE__MEMORY_TYPES": table})
        assert all(part in message for part in [*parts, "environment variable MEMORY__LIFECYCLE__MEMORY_TYPES"]), (
            message
        )


def test_relative_paths_start_at_the_project_whatever_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    environ = {"MEMORY__STORAGE__PATH": "here.db", "MEMORY__LOG__DIR": "~/logs"}
    settings = load_settings(None, environ)
    assert settings.storage.path == str(PROJECT / "here.db")
    assert settings.log.dir == "/home/someone/logs"
    assert Settings().resolved(tmp_path).storage.path == str(tmp_path / "data" / "memory.db")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Settings().network.port = 1  # type: ignore[misc]


def test_the_redis_url_is_in_no_repr_and_no_message() -> None:
    url = "redis://:s3cret@host:6379/0"
    assert "s3cret" not in repr(load_settings(str(YAML_FILE), {"MEMORY__REDIS__URL": url}))
    assert "s3cret" not in repr(RedisSettings(url=url))
    message = refusal(environ={"MEMORY__REDIS__URL": "http://:s3cret@host"})
    assert "redis.url = (value not shown)" in message
    assert "s3cret" not in message


def test_importing_settings_does_not_import_yaml() -> None:
    code = "import sys, memory_system.settings; sys.exit('yaml' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True, timeout=90)


def test_the_projects_file_holds_every_key_with_its_built_in_value() -> None:
    raw = yaml.safe_load(YAML_FILE.read_text(encoding="utf-8"))

    def leaves(node: dict[str, object], prefix: str = "") -> list[str]:
        found: list[str] = []
        for name, value in node.items():
            found += leaves(value, f"{prefix}{name}.") if isinstance(value, dict) and value else [prefix + name]
        return found

    assert leaves(raw) == NAMES
    assert load_settings(str(YAML_FILE), {}) == Settings().resolved()


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_the_projects_file_comments_every_key(key: Key) -> None:
    lines = [line.strip() for line in YAML_FILE.read_text(encoding="utf-8").splitlines()]
    comment = ["# " + key.rule.doc, f"# Default: {shown(key)}; takes {key.expected}."]
    leaf = f"{key.name.rpartition('.')[2]}: {shown(key)}"
    joined = "\n".join([*comment, leaf])
    assert joined in "\n".join(lines), f"expected in {YAML_FILE.name}:\n{joined}"


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.name)
def test_the_documentation_has_a_row_for_every_key(key: Key) -> None:
    row = f"| `{key.name}` | `{shown(key)}` | {key.expected} | {key.rule.doc} |"
    assert row in DOCS.splitlines(), f"expected in docs/configuration.md:\n{row}"


def test_the_documentation_has_no_row_for_a_key_that_is_gone() -> None:
    rows = [line.split("`")[1] for line in DOCS.splitlines() if line.startswith("| `") and "." in line.split("`")[1]]
    assert [name for name in rows if not name.endswith(".log")] == NAMES
