"""Which programs config/supervisord.conf names, and where they answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from memory_system.deployment import Address, longest_stop_s, program_addresses
from memory_system.errors import ConfigError
from memory_system.settings import NetworkSettings, Settings


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "supervisord.conf"
    path.write_text(text)
    return path


def test_the_programs_of_this_project() -> None:
    found = program_addresses(Settings())
    assert found["orchestrator"] == Address("network", "127.0.0.1", 7140)


def test_programs_stop_one_after_the_other(tmp_path: Path) -> None:
    text = "[supervisord]\n[program:b]\naddress=health\nstopwaitsecs=8 ; then KILL\n[program:a]\naddress=network\n"
    assert longest_stop_s(written(tmp_path, text)) == 18.0
    assert longest_stop_s() == 8.0 * len(program_addresses(Settings()))
    with pytest.raises(ConfigError, match=r"\[program:b\] has stopwaitsecs=soon: expected whole seconds"):
        longest_stop_s(written(tmp_path, text.replace("8 ;", "soon ;")))


def test_every_program_listens_on_the_address_of_the_service(tmp_path: Path) -> None:
    text = "[supervisord]\n[program:b]\naddress=health ; its port\n[program:a]\naddress=network\n"
    settings = replace(Settings(), network=NetworkSettings(bind="10.0.0.5", port=7999))
    found = program_addresses(settings, written(tmp_path, text))
    assert list(found.items()) == [
        ("b", Address("health", "10.0.0.5", 7121)),
        ("a", Address("network", "10.0.0.5", 7999)),
    ]
    assert (found["b"].bind_key, found["b"].port_key) == ("network.bind", "health.port")


def test_sections_within_sections_and_plain_ports(tmp_path: Path) -> None:
    text = "[program:a]\naddress=agents.knowledge_base\n[program:b]\naddress=5600\n"
    settings = replace(Settings(), network=NetworkSettings(bind="10.0.0.5"))
    found = program_addresses(settings, written(tmp_path, text))
    assert found == {"a": Address("agents.knowledge_base", "10.0.0.5", 5715), "b": Address("", "10.0.0.5", 5600)}
    assert (found["a"].port_key, found["b"].port_key) == ("agents.knowledge_base.port", "address in supervisord.conf")


@pytest.mark.parametrize(
    "address",
    [
        *("", "address=", "address=nowhere", "address=storage", "address=all_keys", "address=agents."),
        *("address=agents", "address=0", "address=65536", "address=-1", "address=5600.port"),
    ],
)
def test_a_program_without_a_usable_address_is_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match=r"\[program:a\].*expected a section"):
        program_addresses(Settings(), written(tmp_path, f"[program:a]\n{address}\n"))


@pytest.mark.parametrize("text", [None, "command=x\n", "[program:a]\n[program:a]\n"])
def test_a_file_that_cannot_be_read_is_refused_with_its_name(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "supervisord.conf" if text is None else written(tmp_path, text)
    with pytest.raises(ConfigError, match=r"supervisord\.conf cannot be read: [^\n]*$"):
        program_addresses(Settings(), path)


@pytest.mark.parametrize(
    ("bind", "shown", "endpoint"),
    [
        ("127.0.0.1", "tcp://127.0.0.1:7", "tcp://127.0.0.1:7"),
        ("0.0.0.0", "tcp://0.0.0.0:7", "tcp://127.0.0.1:7"),
        ("localhost", "tcp://localhost:7", "tcp://127.0.0.1:7"),
        ("::", "tcp://[::]:7", "tcp://[::1]:7"),
        ("fe80::1", "tcp://[fe80::1]:7", "tcp://[fe80::1]:7"),
        ("10.0.0.5", "tcp://10.0.0.5:7", "tcp://10.0.0.5:7"),
    ],
)
def test_what_is_shown_and_what_a_caller_connects_to(bind: str, shown: str, endpoint: str) -> None:
    address = Address("network", bind, 7)
    assert (address.shown, address.endpoint, address.is_ipv6) == (shown, endpoint, ":" in bind)
