"""Which programs make up host PC2, where each answers, and how long they take to stop: config/supervisord.conf."""

from __future__ import annotations

import configparser
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from memory_system.errors import ConfigError
from memory_system.settings import PROJECT, Settings

SUPERVISOR_CONFIG: Final = PROJECT / "config" / "supervisord.conf"
_MAX_PORT: Final = 65_535
_PROGRAM: Final = "program:"
_STOP_S: Final = "10"  # supervisor's own default of stopwaitsecs
_HERE: Final = {"0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1", "::": "::1", "[::]": "::1"}


@dataclass(frozen=True, slots=True)
class Address:
    """Where a program listens, and the settings section that says so: empty for a program that has none."""

    section: str
    bind: str
    port: int

    @property
    def shown(self) -> str:
        return f"tcp://{_bracketed(self.bind)}:{self.port}"

    @property
    def endpoint(self) -> str:
        """What a caller on this host connects to."""
        return f"tcp://{_bracketed(_HERE.get(self.bind, self.bind))}:{self.port}"

    @property
    def is_ipv6(self) -> bool:
        return ":" in self.bind

    @property
    def bind_key(self) -> str:
        """The settings key of `bind`: every program listens on the address of the service."""
        return "network.bind"

    @property
    def port_key(self) -> str:
        return f"{self.section}.port" if self.section else "address in supervisord.conf"


def program_addresses(settings: Settings, path: Path = SUPERVISOR_CONFIG) -> dict[str, Address]:
    """The address of each program that supervisord runs, by its name there, in the order of the file.

    Raises ConfigError when the file cannot be read, or a program in it has no `address` that is a port or names a
    settings section with one.
    """
    return {name: _address(name, options.get("address", ""), settings) for name, options in _programs(path)}


def settings_section(settings: Settings, name: str) -> Any:
    """The section of this name: `network`, `agents.knowledge_base`. Raises AttributeError for one that is not there."""
    return attrgetter(name)(settings)


def longest_stop_s(path: Path = SUPERVISOR_CONFIG) -> float:
    """How long supervisord may take to stop all programs, which end one after the other. Raises ConfigError."""
    return sum(_stop_s(name, options.get("stopwaitsecs", _STOP_S)) for name, options in _programs(path))


def _stop_s(program: str, text: str) -> float:
    if not text.isdecimal():
        raise ConfigError(f"[{_PROGRAM}{program}] has stopwaitsecs={text}: expected whole seconds")
    return float(text)


def _programs(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Name and options of each program. Raises ConfigError."""
    parser = configparser.RawConfigParser(inline_comment_prefixes=(";", "#"))
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    for name in parser.sections():
        if name.startswith(_PROGRAM):
            yield name.removeprefix(_PROGRAM), parser[name]


def _address(program: str, section: str, settings: Settings) -> Address:
    if section.isdecimal() and len(section) <= 5 and 1 <= int(section) <= _MAX_PORT:
        return Address("", settings.network.bind, int(section))
    try:
        port = settings_section(settings, section).port
    except AttributeError:
        port = None
    if not isinstance(port, int):
        raise ConfigError(
            f"[{_PROGRAM}{program}] has address={section or '(none)'}: "
            "expected a section of the settings that has a port, such as network, or a port"
        )
    return Address(section, settings.network.bind, port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
