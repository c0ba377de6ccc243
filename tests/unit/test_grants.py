"""What a key may do: roles, namespaces, and for whom it may speak."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import yaml

from memory_system import grants as g
from memory_system import protocol
from memory_system.errors import AccessDenied, ConfigError
from memory_system.grants import Grant, Grants, Identity, permission_for

KEYS = [letter * 40 for letter in "abcdefgh"]


def grant(name: str = "planner", key: int = 0, roles: str = "writer", **rest: object) -> Grant:
    return Grant(name, KEYS[key], frozenset(roles.split()), **rest)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("granted", "namespace", "allowed"),
    [
        (("home",), "home", True),
        (("home",), "home/kitchen", True),
        (("home",), "home/kitchen/sink", True),
        (("home",), "homeless", False),
        (("home",), "hom", False),
        (("home",), "Home", False),
        (("home",), "", False),
        (("home",), "home ", False),
        (("home",), "/home", False),
        (("home",), "work/home", False),
        (("home",), "home/", True),
        (("home/kitchen",), "home", False),
        (("home/kitchen",), "home/kitchen/sink", True),
        (("home", "work"), "work/desk", True),
        (("*",), "anything/at all", True),
        (("*",), "", True),
        ((), "home", False),
        ((), "*", False),
        (("home",), "*", False),
    ],
)
def test_namespaces_are_matched_by_whole_segments(granted: tuple[str, ...], namespace: str, allowed: bool) -> None:
    assert grant(namespaces=granted).allows_namespace(namespace) is allowed


def test_every_action_of_the_service_needs_something_that_a_role_permits() -> None:
    needed = {action: permission_for(action) for action in protocol.ACTIONS}
    assert {action for action, need in needed.items() if need == g.WRITE} == protocol.WRITE_ACTIONS
    assert {action for action, need in needed.items() if need == g.READ} == protocol.READ_ACTIONS - g.FOR_EVERYBODY
    assert {action for action, need in needed.items() if need == g.ADMIN} == protocol.ADMIN_ACTIONS - {"list_runs"}
    assert permission_for("an action that is not known") == g.ADMIN


PERMITTED = {
    "reader": {g.ANY, g.READ},
    "writer": {g.ANY, g.READ, g.WRITE},
    "operator": {g.ANY, g.OPERATE},
    "admin": {g.ANY, g.READ, g.WRITE, g.OPERATE, g.ADMIN},
}


@pytest.mark.parametrize("role", PERMITTED)
@pytest.mark.parametrize("permission", [g.ANY, g.READ, g.WRITE, g.OPERATE, g.ADMIN])
def test_roles(role: str, permission: str) -> None:
    assert grant(roles=role).may(permission) is (permission in PERMITTED[role])
    assert Identity.of(grant(roles=role)).may(permission) is (permission in PERMITTED[role])


def test_several_roles_permit_what_each_does() -> None:
    both = grant(roles="reader operator")
    assert both.may(g.READ)
    assert both.may(g.OPERATE)
    assert not both.may(g.WRITE)


@pytest.mark.parametrize(
    ("domain", "roles"),
    [
        ("memory", {"reader", "writer", "operator", "admin"}),
        ("manager", {"reader", "writer", "operator", "admin"}),
        ("ingest", {"reader", "writer", "operator", "admin"}),
        ("agents", {"reader", "writer", "operator", "admin"}),
        ("bus", {"operator", "admin"}),
        ("another", set()),
        ("", set()),
    ],
)
def test_who_may_connect_where(domain: str, roles: set[str]) -> None:
    assert {role for role in g.ROLES if grant(roles=role).may_enter(domain)} == roles
    assert not any(grant(roles=role, revoked=True).may_enter(domain) for role in g.ROLES)


def test_acting_for_others_is_the_intersection_of_all_rights() -> None:
    agent = grant("agent", 0, "writer", namespaces=("*",), act_for=("*",))
    ada = grant("ada", 1, "reader", namespaces=("home",))
    identity = Grants.of([agent, ada]).acting(Identity.of(agent), "ada")
    assert (identity.name, identity.caller, identity.scope) == ("agent", "ada", "agent>ada")
    assert identity.roles == {"reader"}
    assert identity.may(g.READ)
    assert not identity.may(g.WRITE)
    assert identity.allows_namespace("home")
    assert not identity.allows_namespace("work")
    identity.check_namespace("home")
    with pytest.raises(AccessDenied, match="'work' is not granted to the key of ada"):
        identity.check_namespace("work")
    with pytest.raises(AccessDenied, match="add_memory needs a role that the key of ada has not"):
        identity.check_permission(g.WRITE, "add_memory")


def test_a_refusal_names_the_key_that_lacks_something() -> None:
    agent = grant("agent", 0, "reader", namespaces=("home",))
    both = Identity.of(agent, grant("ada", 1, "writer", namespaces=("*",)))
    with pytest.raises(AccessDenied, match="'work' is not granted to the key of agent"):
        both.check_namespace("work")
    with pytest.raises(AccessDenied, match="add_memory needs a role that the key of agent has not"):
        both.check_permission(g.WRITE, "add_memory")


def test_an_intersection_is_never_more_than_each_of_its_parts() -> None:
    for mine, theirs in itertools.product(g.ROLES, repeat=2):
        both = Identity.of(grant("a", 0, mine, namespaces=("home",)), grant("b", 1, theirs, namespaces=("home/x", "b")))
        for permission in PERMITTED["admin"]:
            assert both.may(permission) is (permission in PERMITTED[mine] & PERMITTED[theirs])
        for role in both.roles:
            assert PERMITTED[role] <= PERMITTED[mine] & PERMITTED[theirs]
        assert [name for name in ("home", "home/x", "b", "c") if both.allows_namespace(name)] == ["home/x"]


def test_each_step_of_a_chain_needs_the_word_of_the_one_before() -> None:
    found = Grants.of(
        [
            grant("agent", 0, act_for=("planner",)),
            grant("planner", 1, act_for=("ada", "gone", "nobody")),
            grant("ada", 2),
            grant("gone", 3, revoked=True),
        ]
    )
    me = Identity.of(found.by_name["agent"])
    assert found.acting(me, "planner").scope == "agent>planner"
    assert found.acting(me, "planner>ada").scope == "agent>planner>ada"
    for refused in ("ada", "planner>agent", "planner>gone", "planner>nobody", "planner>", ">planner", "", "*"):
        with pytest.raises(AccessDenied):
            found.acting(me, refused)


def test_a_chain_has_an_end() -> None:
    everybody = Grants.of([grant("a", 0, act_for=("*",))])
    me = Identity.of(everybody.by_name["a"])
    assert everybody.acting(me, "a>a>a").scope == "a>a>a>a"
    with pytest.raises(AccessDenied, match="at most 4"):
        everybody.acting(me, "a>a>a>a")
    with pytest.raises(AccessDenied):
        everybody.acting(me, ">".join("a" * 100_000))


def test_unknown_and_revoked_keys_have_no_identity() -> None:
    found = Grants.of([grant("ada", 0), grant("gone", 1, revoked=True)])
    assert found.identity(KEYS[0]).name == "ada"
    for public in (KEYS[1], KEYS[2], "", "ada"):
        with pytest.raises(AccessDenied):
            found.identity(public)


ENTRY = {"name": "planner", "public_key": KEYS[0], "roles": ["writer"], "namespaces": ["home"]}


def parsed(*entries: object) -> Grants:
    return Grants.parse(yaml.safe_dump(list(entries)).encode(), "grants.yaml")


def test_a_file_of_grants() -> None:
    found = parsed(ENTRY, {"name": "b", "public_key": KEYS[1], "roles": ["reader"], "revoked": "2026-01-01T00:00:00Z"})
    assert found.by_key[KEYS[0]] == grant(namespaces=("home",))
    assert found.by_name["b"].revoked
    assert not found.by_name["planner"].revoked


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": None}, "name: expected letters"),
        ({"name": "a>b"}, "name: expected letters"),
        ({"name": "@a"}, "name: expected letters"),
        ({"name": "a" * 65}, "name: expected letters"),
        ({"public_key": "short"}, "public_key: expected a public key"),
        ({"public_key": 5}, "public_key: expected a public key"),
        ({"roles": "writer"}, "roles: expected a list of names"),
        ({"roles": []}, "roles: there is no role"),
        ({"roles": ["write"]}, "'write' is no role; there are reader"),
        ({"namespaces": [5]}, "namespaces: expected a list of names"),
        ({"namespaces": ["home/"]}, "'home/' is no namespace"),
        ({"namespaces": ["home*"]}, r"'home\*' is no namespace"),
        ({"namespaces": [""]}, "'' is no namespace"),
        ({"act_for": "ada"}, "act_for: expected a list of names"),
        ({"role": ["writer"]}, "unknown field role"),
    ],
)
def test_a_grant_that_is_not_usable_is_named_with_its_line(change: dict[str, object], told: str) -> None:
    text = yaml.safe_dump([{**ENTRY, "name": "first", "public_key": KEYS[1]}]) + yaml.safe_dump([{**ENTRY, **change}])
    line = text.count("\n", 0, text.rindex("\n- ") + 1) + 1
    with pytest.raises(ConfigError, match=told) as refused:
        Grants.parse(text.encode(), "grants.yaml")
    assert refused.value.message.startswith(f"grants.yaml:{line}: ")


@pytest.mark.parametrize("missing", ["name", "public_key", "roles"])
def test_a_grant_without_a_needed_field(missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"grants.yaml:1: {missing} is missing"):
        parsed({name: value for name, value in ENTRY.items() if name != missing})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"a: b", "grants.yaml:1: expected a list of grants"),
        (b"- a\n- b", "grants.yaml:1: expected a grant"),
        (b"- [", "grants.yaml:.*not valid YAML"),
        (b"\xff", "not valid YAML"),
        (b"- !!python/object/apply:os.system [x]", "not valid YAML"),
        (b"[" * 100_000, "grants.yaml:1: lists in lists"),
        (b"- " * 100_000, "grants.yaml:1: lists in lists"),
        (b"{a: " * 100_000, "grants.yaml:1: lists in lists"),
        (b"", "grants.yaml has no grant in it; restore it"),
        (b"# nobody yet\n", "grants.yaml has no grant in it"),
        (b"[]", "grants.yaml has no grant in it"),
        (b'- {name: !!float ""}', "not valid YAML"),
        (b"- {revoked: !!bool x}", "not valid YAML"),
        (b"- {created: !!timestamp x}", "not valid YAML"),
    ],
)
def test_what_is_no_file_of_grants(text: bytes, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Grants.parse(text, "grants.yaml")


def test_no_name_and_no_key_twice() -> None:
    with pytest.raises(ConfigError, match="planner: this name is given twice"):
        parsed(ENTRY, {**ENTRY, "public_key": KEYS[1]})
    with pytest.raises(ConfigError, match="other: this public_key is given twice"):
        parsed(ENTRY, {**ENTRY, "name": "other"})


def test_grants_that_others_can_change_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "grants.yaml"
    with pytest.raises(ConfigError, match="make keys"):
        Grants.load(path)
    path.write_text(yaml.safe_dump([ENTRY]))
    path.chmod(0o644)
    assert set(Grants.load(path).by_name) == {"planner"}
    for mode in (0o664, 0o646, 0o666):
        path.chmod(mode)
        with pytest.raises(ConfigError, match="chmod go-w"):
            Grants.load(path)
