"""What each key may do: roles, namespaces, and for whom it may speak. Rules without I/O, but for `Grants.load`.

grants = Grants.load(Path("data/keys/grants.yaml"))
identity = Identity(grants.by_key[public_key])
identity.may("write") and identity.allows_namespace("home/kitchen")
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from memory_system import keys, protocol
from memory_system.errors import AccessDenied, ConfigError

ANY: Final = "any"  # whoever has a key
READ: Final = "read"
WRITE: Final = "write"
OPERATE: Final = "operate"
ADMIN: Final = "admin"

# role -> what it permits. An operator sees how the programs are, and no memory.
ROLES: Final[Mapping[str, frozenset[str]]] = {
    "reader": frozenset({ANY, READ}),
    "writer": frozenset({ANY, READ, WRITE}),
    "operator": frozenset({ANY, OPERATE}),
    "admin": frozenset({ANY, READ, WRITE, OPERATE, ADMIN}),
}

# The sockets that let peers in: kind -> what a key must permit. A socket that publishes has no later chance to refuse.
DOMAINS: Final[Mapping[str, str]] = {"memory": ANY, "manager": ANY, "bus": OPERATE, "ingest": ANY, "agents": ANY}

FOR_EVERYBODY: Final = frozenset({"health_check", "get_request_status"})
OPERATOR_ACTIONS: Final = frozenset({"get_health", "get_errors", "list_jobs", "list_runs"})

EVERY: Final = "*"
CHAIN: Final = ">"
MAX_CHAIN: Final = 4  # keys
_SEPARATOR: Final = "/"
_FIELDS: Final = ("name", "public_key", "roles", "namespaces", "act_for", "created", "revoked")
_NEEDED: Final = ("name", "public_key", "roles")
# About 6,000 keys, which take a second of a processor to read; docs/security.md says so.
_MAX_FILE_BYTES: Final = 1024 * 1024
_MAX_DEPTH: Final = 8  # a list of grants with lists of names has three

_NEEDED_PERMISSIONS: Final[Mapping[str, str]] = {
    **dict.fromkeys(protocol.WRITE_ACTIONS, WRITE),
    **dict.fromkeys(protocol.READ_ACTIONS, READ),
    **dict.fromkeys(OPERATOR_ACTIONS, OPERATE),
    **dict.fromkeys(FOR_EVERYBODY, ANY),
}


def permission_for(action: str) -> str:
    """What an action of the memory service, the health manager or the scheduler needs; ADMIN for any other."""
    return _NEEDED_PERMISSIONS.get(action, ADMIN)


@dataclass(frozen=True, slots=True)
class Grant:
    """What one key may do. `act_for`: names of keys that it may speak for, or "*"."""

    name: str
    public: str
    roles: frozenset[str]
    namespaces: tuple[str, ...] = ()
    act_for: tuple[str, ...] = ()
    revoked: bool = False

    @property
    def permits(self) -> frozenset[str]:
        """What its roles permit together."""
        return frozenset[str]().union(*(ROLES[role] for role in self.roles))

    def may(self, permission: str) -> bool:
        return permission in self.permits

    def allows_namespace(self, namespace: str) -> bool:
        """A grant of "home" covers "home" and "home/kitchen", never "homeless"; "*" covers all."""
        return any(
            granted in (EVERY, namespace) or namespace.startswith(granted + _SEPARATOR) for granted in self.namespaces
        )

    @property
    def implied_roles(self) -> frozenset[str]:
        """The roles of this key, and those that permit no more than they: a writer is a reader as well."""
        permits = self.permits
        return frozenset(role for role, permissions in ROLES.items() if permissions <= permits)

    def may_act_for(self, name: str) -> bool:
        return EVERY in self.act_for or name in self.act_for

    def may_enter(self, domain: str) -> bool:
        """Whether this key is let into sockets of this kind (one of DOMAINS)."""
        needed = DOMAINS.get(domain)
        return needed is not None and not self.revoked and self.may(needed)


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a request is authorised as: a key, then the keys it speaks for, one after the other; all of them have to
    permit what is done.

    `name` is that of the key. `caller` is who wants it: the last of the chain. `scope` says whose request_ids they are:
    "key", or "key>caller"; names have no ">". `roles` are those that every key of the chain has or implies,
    `permits` what all of them permit.
    """

    grants: tuple[Grant, ...]
    name: str
    caller: str
    scope: str
    roles: frozenset[str]
    permits: frozenset[str]
    # (action, namespace) that were found to be allowed, see authorise.py: forgotten with these grants.
    allowed: set[tuple[str, str]] = field(default_factory=set, repr=False, compare=False)

    @classmethod
    def of(cls, *grants: Grant) -> Identity:
        names = [grant.name for grant in grants]
        roles = frozenset.intersection(*(grant.implied_roles for grant in grants))
        permits = frozenset.intersection(*(grant.permits for grant in grants))
        return cls(grants, names[0], names[-1], CHAIN.join(names), roles, permits)

    def may(self, permission: str) -> bool:
        return permission in self.permits

    def allows_namespace(self, namespace: str) -> bool:
        return all(grant.allows_namespace(namespace) for grant in self.grants)

    def check_permission(self, permission: str, action: str) -> None:
        """Raise AccessDenied, with the key that lacks it, for an action that not all permit."""
        for grant in self.grants:
            if not grant.may(permission):
                raise AccessDenied(f"{action} needs a role that the key of {grant.name} has not")

    def check_namespace(self, namespace: str) -> None:
        """Raise AccessDenied, with the key that lacks it, for a namespace that is not granted to all."""
        for grant in self.grants:
            if not grant.allows_namespace(namespace):
                raise AccessDenied(f"the namespace {namespace!r} is not granted to the key of {grant.name}")


@dataclass(frozen=True, slots=True)
class Grants:
    """All keys that are known, by name and by public key (Z85)."""

    by_name: Mapping[str, Grant]
    by_key: Mapping[str, Grant]

    @classmethod
    def of(cls, grants: Iterable[Grant]) -> Grants:
        """Raises ConfigError for a name or a key that is given twice."""
        by_name: dict[str, Grant] = {}
        by_key: dict[str, Grant] = {}
        for grant in grants:
            if grant.name in by_name or grant.public in by_key:
                what = "name" if grant.name in by_name else "public_key"
                raise ConfigError(f"{grant.name}: this {what} is given twice")
            by_name[grant.name] = by_key[grant.public] = grant
        return cls(by_name, by_key)

    @classmethod
    def load(cls, path: Path) -> Grants:
        """Raises ConfigError, naming line and field, for a file that is not usable or that others can change."""
        try:
            with path.open("rb") as file:
                keys.check_private(path, os.fstat(file.fileno()).st_mode, readable=True)
                text = file.read(_MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"the grants {path} cannot be read: {error.strerror}; make them: make keys") from error
        if len(text) > _MAX_FILE_BYTES:
            raise ConfigError(f"{path} is larger than {_MAX_FILE_BYTES} bytes, about 6,000 keys")
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: bytes, where: str) -> Grants:
        """The grants in this YAML. Raises ConfigError, naming line and field, also where there are none at all: that
        is a file that was cut short, or is being written, and not a wish to lock everybody out."""
        try:
            grants = cls.of(_grants(text, where))
            if not grants.by_key:
                raise ConfigError(f"{where} has no grant in it; restore it, or remove it and run: make keys")
            return grants
        except ConfigError as error:
            if error.message.startswith(where):
                raise
            raise ConfigError(f"{where}: {error.message}") from None

    def identity(self, public: str) -> Identity:
        """Raises AccessDenied for a key that is not known, or was revoked."""
        grant = self.by_key.get(public)
        if grant is None:
            raise AccessDenied("this key is not known here")
        if grant.revoked:
            raise AccessDenied(f"the key of {grant.name} was revoked")
        return Identity.of(grant)

    def acting(self, identity: Identity, on_behalf_of: str) -> Identity:
        """The identity that speaks for others: "planner", or "planner>ada" for a planner that speaks for ada; each step
        needs `act_for` of the one before. Raises AccessDenied."""
        chain = [*identity.grants]
        names = on_behalf_of.split(CHAIN)
        if len(chain) + len(names) > MAX_CHAIN:
            raise AccessDenied(f"on_behalf_of has {len(names)} names; a chain has at most {MAX_CHAIN} keys")
        for name in names:
            if not chain[-1].may_act_for(name):
                raise AccessDenied(f"the key of {chain[-1].name} may not act for {name[:64]!r}: see act_for")
            other = self.by_name.get(name)
            if other is None or other.revoked:
                raise AccessDenied(f"there is no key of {name[:64]!r} to act for, or it was revoked")
            chain.append(other)
        return Identity.of(*chain)


def _grants(text: bytes, where: str) -> Iterator[Grant]:
    import yaml

    # In C where there is one: ten times as fast. It recurses without a bound, so what is too deep does not reach it.
    loader_class = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        decoded = text.decode()
        _check_depth(yaml.parse(decoded, Loader=loader_class), where)
        loader = loader_class(decoded)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.SequenceNode):
            raise ConfigError(f"{where}:{root.start_mark.line + 1}: expected a list of grants")
        for node in root.value:
            place = f"{where}:{node.start_mark.line + 1}"
            yield _grant(loader.construct_object(node, deep=True), place)
    except (yaml.YAMLError, ValueError, RecursionError, LookupError, AttributeError) as error:
        # The last two: what PyYAML raises for a value that is not of its tag, such as `!!float ""`.
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{where}{line}: not valid YAML") from None


def _check_depth(events: Iterable[Any], where: str) -> None:
    """Raise ConfigError for lists in lists deeper than grants have; `events` is read no further than that."""
    import yaml

    depth = 0
    for event in events:
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise ConfigError(f"{where}:{event.start_mark.line + 1}: lists in lists: expected a list of grants")


def _grant(fields: Any, place: str) -> Grant:
    if not isinstance(fields, dict):
        raise ConfigError(f"{place}: expected a grant: {', '.join(_FIELDS)}")
    for name in fields:
        if name not in _FIELDS:
            raise ConfigError(f"{place}: unknown field {str(name)[:64]}; a grant has {', '.join(_FIELDS)}")
    for name in _NEEDED:
        if name not in fields:
            raise ConfigError(f"{place}: {name} is missing")
    _check_text(fields["name"], keys.NAME, "name", "letters, digits, dots, dashes and underscores", place)
    _check_text(fields["public_key"], keys.KEY, "public_key", "a public key, 40 characters of Z85", place)
    grant = Grant(
        name=fields["name"],
        public=fields["public_key"],
        roles=frozenset(_names(fields, "roles", place)),
        namespaces=_names(fields, "namespaces", place),
        act_for=_names(fields, "act_for", place),
        revoked=bool(fields.get("revoked")),
    )
    check_grant(grant, place)
    return grant


def check_grant(grant: Grant, place: str) -> None:
    """Raise ConfigError for roles and namespaces that mean nothing; `place` begins the message."""
    unknown = sorted(grant.roles - set(ROLES))
    if unknown or not grant.roles:
        said = f"{unknown[0][:64]!r} is no role" if unknown else "there is no role"
        raise ConfigError(f"{place}: roles: {said}; there are {', '.join(ROLES)}")
    for namespace in grant.namespaces:
        if not namespace or namespace != namespace.strip(_SEPARATOR) or (EVERY in namespace and namespace != EVERY):
            raise ConfigError(f"{place}: namespaces: {namespace[:64]!r} is no namespace, and not '*' for all")


def _check_text(value: Any, pattern: Any, field: str, expected: str, place: str) -> None:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ConfigError(f"{place}: {field}: expected {expected}")


def _names(fields: Mapping[Any, Any], field: str, place: str) -> tuple[str, ...]:
    value = fields.get(field, [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ConfigError(f"{place}: {field}: expected a list of names")
    return tuple(value)
