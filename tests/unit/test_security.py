"""Who may bind where, and who may come in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memory_system import keys
from memory_system.errors import AccessDenied, ConfigError
from memory_system.security import PeerPolicy, check_bind, is_admin, is_loopback, policy_for
from memory_system.settings import NetworkSettings, SecuritySettings

OPEN = SecuritySettings(allow_insecure=True, insecure_peers=("10.1.0.0/16", "192.168.5.7/32", "fd00::/8"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    check_bind(NetworkSettings(bind=host), SecuritySettings())


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "*", "192.168.1.5", "10.0.0.1", "example.org", "", "127.0.0.1.evil.org"]
)
def test_addresses_that_others_reach_need_to_say_who_comes(host: str) -> None:
    assert not is_loopback(host)
    network = NetworkSettings(bind=host)
    with pytest.raises(ConfigError, match=r"network\.bind.*allow_insecure"):
        check_bind(network, SecuritySettings())
    with pytest.raises(ConfigError, match=r"network\.bind.*allow_insecure"):
        check_bind(network, SecuritySettings(insecure_peers=("10.0.0.0/8",)))
    with pytest.raises(ConfigError, match="insecure_peers"):
        check_bind(network, SecuritySettings(allow_insecure=True))
    check_bind(network, OPEN)


def with_keys(folder: Path, **settings: Any) -> SecuritySettings:
    """Of a host whose service has a key."""
    keys.write_private(folder / keys.SERVICE_KEY_FILE, keys.key_text(keys.new_key(keys.SERVICE), "a test's"))
    return SecuritySettings(keys_dir=str(folder), **settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "192.168.1.5"])
def test_with_keys_it_may_listen_anywhere(tmp_path: Path, host: str) -> None:
    check_bind(NetworkSettings(bind=host), with_keys(tmp_path))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_keys_and_plaintext_callers_exclude_each_other(tmp_path: Path, host: str) -> None:
    plaintext = {"allow_insecure": True, "insecure_peers": ("10.0.0.0/8",)}
    with pytest.raises(ConfigError, match="allow_insecure lets plaintext callers in"):
        check_bind(NetworkSettings(bind=host), with_keys(tmp_path, **plaintext))
    check_bind(NetworkSettings(bind=host), replace(OPEN, keys_dir=str(tmp_path), curve="off"))


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_keys_that_are_wanted_have_to_be_there(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=r"service\.key does not exist; make it: make keys"):
        check_bind(NetworkSettings(bind=host), SecuritySettings(keys_dir=str(tmp_path), curve="on"))


def test_keys_that_are_not_wanted_do_not_open_the_port(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"network\.bind"):
        check_bind(NetworkSettings(bind="0.0.0.0"), with_keys(tmp_path, curve="off"))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.1.2.3", "::1", "::ffff:127.0.0.1", "10.1.255.255", "::ffff:10.1.2.3", "192.168.5.7", "fd12::1"],
)
def test_peers_that_may_come_in(address: str) -> None:
    PeerPolicy(OPEN).check(address)


@pytest.mark.parametrize(
    "address",
    ["10.2.0.0", "192.168.5.8", "8.8.8.8", "::ffff:8.8.8.8", "fe80::1", "", "localhost", "10.1.0.0/16", "10.1.2"],
)
def test_peers_that_may_not(address: str) -> None:
    policy = PeerPolicy(OPEN)
    for _ in range(2):
        with pytest.raises(AccessDenied, match="insecure_peers"):
            policy.check(address)


def test_networks_count_only_when_plaintext_is_allowed() -> None:
    policy = PeerPolicy(SecuritySettings(allow_insecure=False, insecure_peers=("10.1.0.0/16",)))
    policy.check("127.0.0.1")
    with pytest.raises(AccessDenied):
        policy.check("10.1.2.3")


def test_what_is_remembered_of_peers_is_bounded() -> None:
    policy = PeerPolicy(OPEN)
    for number in range(25_000):
        policy.check(f"10.1.{number // 256 % 256}.{number % 256}")
    assert len(policy._known) <= 10_001


@pytest.mark.parametrize(
    ("bind", "address"),
    [("192.0.2.2", "192.0.2.2"), ("192.0.2.2", "::ffff:192.0.2.2"), ("fd00::2", "fd00::2"), ("[fd00::2]", "fd00::2")],
)
def test_programs_of_this_host_come_from_the_address_that_is_listened_on(bind: str, address: str) -> None:
    policy = policy_for(NetworkSettings(bind=bind), OPEN)
    assert policy is not None
    policy.check(address)
    with pytest.raises(AccessDenied):
        policy.check("192.0.2.3")


@pytest.mark.parametrize("address", ["", "127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"])
def test_who_is_of_this_machine_is_admin(address: str) -> None:
    assert is_admin(address)


@pytest.mark.parametrize(
    ("address", "bind", "admin"),
    [
        ("10.0.0.5", "10.0.0.5", True),
        ("::ffff:10.0.0.5", "10.0.0.5", True),
        ("fd00::5", "[fd00::5]", True),
        ("127.0.0.1", "10.0.0.5", True),
        ("10.0.0.6", "10.0.0.5", False),
        ("10.0.0.5", "0.0.0.0", False),
        ("unknown", "localhost", False),
        ("unknown", "unknown", False),
    ],
)
def test_on_one_address_this_machines_programs_call_from_it(address: str, bind: str, admin: bool) -> None:
    assert is_admin(address, bind) is admin


@pytest.mark.parametrize(
    "address",
    ["198.51.100.3", "0.0.0.0", "255.255.255.255", "::", "::ffff:8.8.8.8", "fe80::1", "unknown", "localhost"],
)
def test_others_are_not(address: str) -> None:
    assert not is_admin(address)
