#!/usr/bin/env python3
"""Makes, lists and revokes the keys of the mesh, in security.keys_dir.

    keys.py                                                     the service's key and those of its programs
    keys.py --agent planner --role writer --namespaces home,work [--act-for ada,bob]
    keys.py --revoke planner
    keys.py --list

Running programs follow grants.yaml within a second; that callers need keys at all begins with their next start.
Exit status: 0 done, 1 refused, 2 wrong arguments or configuration.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from output import put
from status_table import columns

from memory_system import keys
from memory_system.errors import ConfigError
from memory_system.grants import EVERY, Grant, Grants, check_grant
from memory_system.keys import KeyFile
from memory_system.settings import Settings, load_settings

# The programs of this host and its operator: what their keys are granted.
OWN: Final[Mapping[str, Mapping[str, Sequence[str]]]] = {
    "orchestrator": {"roles": ["reader"]},
    "health_manager": {"roles": ["operator"]},
    "memory_scheduler": {"roles": ["admin"], "namespaces": [EVERY]},
    "knowledge_base_agent": {"roles": ["writer"], "namespaces": [EVERY], "act_for": [EVERY]},
    "session_memory_agent": {"roles": ["writer"], "namespaces": [EVERY], "act_for": [EVERY]},
    "context_manager_agent": {"roles": ["writer"], "namespaces": [EVERY], "act_for": [EVERY]},
    "operator": {"roles": ["admin"], "namespaces": [EVERY]},
}
DEFAULT_NAMESPACES: Final = {"reader": "default", "writer": "default", "operator": "", "admin": EVERY}
HEADINGS: Final = ("NAME", "ROLES", "NAMESPACES", "ACTS FOR", "STATE", "PUBLIC KEY")
HEADER: Final = """\
# Who may come in, and what each key may do; docs/security.md tells what the fields mean. Running programs follow this
# file within a second. `make keys` writes it anew and keeps the entries, not the comments.
"""

Entry = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        settings = load_settings()
        with Folder(Path(settings.security.keys_dir)).locked(make=not (options.list or options.revoke)) as folder:
            return act(folder, options, settings)
    except ConfigError as error:
        sys.stderr.write(f"keys: {error.message}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"keys: {error.filename}: {error.strerror}\n")
        return 1


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Makes, lists and revokes the keys of the mesh.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--agent", metavar="NAME", help="make a key of this name")
    which.add_argument("--revoke", metavar="NAME", help="have this key refused from now on")
    which.add_argument("--list", action="store_true", help="show the keys, and change nothing")
    parser.add_argument("--role", help="reader, writer (the default), operator or admin; or several")
    parser.add_argument("--namespaces", help="namespaces, each with all below it; '*': all (default: default)")
    parser.add_argument("--act-for", help="names of keys that it may speak for; '*': all")
    options = parser.parse_args(arguments)
    granted = (options.role, options.namespaces, options.act_for)
    if options.agent is None and any(each is not None for each in granted):
        parser.error("whose key? AGENT is missing: make keys AGENT=name ROLE=writer NAMESPACES=home,work")
    return options


def act(folder: Folder, options: argparse.Namespace, settings: Settings) -> int:
    if options.revoke:
        folder.revoke(options.revoke)
        put(f"the key of {options.revoke} is revoked; running programs refuse it within a second")
        return 0
    if not options.list:
        for line in (*folder.make_own(), *remarks(settings)):
            put(line)
        if options.agent:
            put(told(folder.make(wanted(options)), settings))
    show(folder.entries)
    return 0


def wanted(options: argparse.Namespace) -> Entry:
    """The grant that the command line asks for. Raises ConfigError."""
    if not keys.NAME.fullmatch(options.agent):
        raise ConfigError(
            f"AGENT={options.agent!r}: expected letters, digits, dots, dashes and underscores, at most 64"
        )
    roles = split("writer" if options.role is None else options.role)
    namespaces = options.namespaces
    if namespaces is None:
        namespaces = next((DEFAULT_NAMESPACES[role] for role in ("admin", "writer", "reader") if role in roles), "")
    entry = {
        "name": options.agent,
        "roles": roles,
        "namespaces": split(namespaces),
        "act_for": split(options.act_for or ""),
    }
    check_grant(Grant(options.agent, "", frozenset(roles), tuple(entry["namespaces"])), f"AGENT={options.agent}")
    return entry


def split(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def remarks(settings: Settings) -> Iterator[str]:
    """What stands in the way of these keys."""
    if settings.security.curve == "off":
        yield "security.curve is off: callers need no key, whatever is made here"
    elif settings.security.allow_insecure:
        yield "security.allow_insecure is true: the programs do not start with keys before it is false"


def told(path: Path, settings: Settings) -> str:
    bus = f" and MEMORY_ERROR_BUS_ADDR (port {settings.health.report_port})"
    return (
        f"{path}\n"
        f"carry this file to the agent's host (scp, mode 600), remove it here, and start the agent with\n"
        f"{keys.KEY_FILE_VARIABLE}=<the file>, MEMORY_ORCHESTRATOR_ADDR (port {settings.network.port}){bus}"
    )


def show(entries: Sequence[Entry]) -> None:
    put(columns(HEADINGS, [row_of(entry) for entry in entries]))


def row_of(entry: Entry) -> tuple[str, ...]:
    lists = (",".join(entry.get(name) or ()) or "-" for name in ("roles", "namespaces", "act_for"))
    state = f"revoked {entry['revoked']}" if entry.get("revoked") else "in force"
    return (entry["name"], *lists, state, entry["public_key"])


class Folder:
    """The folder of the keys. Its grants are replaced in one step, and two of these programs wait for each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[Entry] = []

    @contextlib.contextmanager
    def locked(self, *, make: bool) -> Iterator[Folder]:
        """Raises ConfigError for a folder or grants that others can change, or, unless `make`, that are not there."""
        if make and not self.path.exists():
            self.path.mkdir(parents=True)
            self.path.chmod(0o700)
        if not self.path.exists():
            raise ConfigError(f"there are no keys in {self.path}; make them: make keys")
        mode = stat.S_IMODE(self.path.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(f"{self.path} is open to others (mode {mode:04o}); run: chmod 700 {self.path}")
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            self._load()
            yield self
        finally:
            os.close(descriptor)

    def make_own(self) -> Iterator[str]:
        """The service's key and those of its programs, where they are missing; says what was made."""
        if not (self.path / keys.SERVICE_KEY_FILE).exists():
            if self.entries:
                raise ConfigError(
                    f"{self.path / keys.SERVICE_KEY_FILE} is gone, and every key file names it: restore it, or remove "
                    f"{self.path} and make all keys anew"
                )
            key = keys.new_key(keys.SERVICE)
            public = f"{key.public.decode()}\n"
            keys.write_private(self.path / keys.SERVICE_PUBLIC_FILE, public, replace=True)
            text = keys.key_text(key, "The key of the memory service. It stays on this host.")
            keys.write_private(self.path / keys.SERVICE_KEY_FILE, text)
            yield f"made {self.path / keys.SERVICE_KEY_FILE}: from their next start the programs let in keys only"
        for name, granted in OWN.items():
            entry = self.find(name)
            if entry is None or not (entry.get("revoked") or self._key_path(name).exists()):
                yield f"made {self._make({'name': name, **granted})}"

    def make(self, entry: Entry) -> Path:
        """A new key with this grant; its file. Raises ConfigError for a name that is in use."""
        found = self.find(entry["name"])
        if entry["name"] == keys.SERVICE or (found is not None and not found.get("revoked")):
            raise ConfigError(
                f"there is a key of {entry['name']}; change its grant in {self._grants_path()}, or, for a new key, "
                f"revoke it first: make keys REVOKE={entry['name']}"
            )
        return self._make(entry)

    def revoke(self, name: str) -> None:
        """Raises ConfigError for a name that there is not."""
        entry = self.find(name)
        if entry is None:
            raise ConfigError(
                f"there is no key of {name}; there are {', '.join(each['name'] for each in self.entries)}"
            )
        entry["revoked"] = entry.get("revoked") or now()
        self._save()

    def find(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry["name"] == name), None)

    def _make(self, entry: Entry) -> Path:
        """The file first: a grant of a key that nobody has would do no harm, but neither would it help."""
        key = keys.new_key(entry["name"], self._service().public)
        path = self._key_path(key.name)
        comment = f"The key of {key.name}. Who has this file is {key.name}: keep it, mode 600, where {key.name} runs."
        keys.write_private(path, keys.key_text(key, comment), replace=True)
        granted = {
            "name": key.name,
            "public_key": key.public.decode(),
            "roles": list(entry["roles"]),
            "namespaces": list(entry.get("namespaces", ())),
            "act_for": list(entry.get("act_for", ())),
            "created": now(),
        }
        self.entries = [each for each in self.entries if each["name"] != key.name] + [granted]
        self._save()
        return path

    def _service(self) -> KeyFile:
        return keys.load_key_file(self.path / keys.SERVICE_KEY_FILE)

    def _key_path(self, name: str) -> Path:
        return self.path / f"{name}.key"

    def _grants_path(self) -> Path:
        return self.path / keys.GRANTS_FILE

    def _load(self) -> None:
        path = self._grants_path()
        if path.exists():
            Grants.load(path)
            self.entries = yaml.safe_load(path.read_text(encoding="utf-8")) or []

    def _save(self) -> None:
        text = HEADER + yaml.safe_dump(self.entries, sort_keys=False, width=120, default_flow_style=None)
        Grants.parse(text.encode(), "the new grants")
        keys.write_private(self._grants_path(), text, replace=True)


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


if __name__ == "__main__":
    sys.exit(main())
