"""Who may do what: every action by every role, namespaces, plaintext callers, and what each caller counts as."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memory_system import protocol
from memory_system.audit import AuditLog
from memory_system.errors import AccessDenied, InvalidField, RateLimited
from memory_system.grants import ROLES, Grant, Identity
from memory_system.limits_settings import LimitsSettings
from memory_system.security import authorise
from memory_system.security.guard import Asked, Caller, Guard, principal_of, rates_of

PUBLIC = "x" * 40
# As docs/security.md has it. An administrator's key is one of all namespaces.
MAY = {
    "reader": protocol.READ_ACTIONS,
    "writer": protocol.READ_ACTIONS | protocol.WRITE_ACTIONS,
    "operator": frozenset({"health_check", "get_request_status", "list_runs"}),
    "admin": protocol.ACTIONS,
}


def identity(*roles: str, namespaces: tuple[str, ...] = ("home",), name: str = "planner") -> Identity:
    return Identity.of(Grant(name, PUBLIC, frozenset(roles), namespaces))


def allowed(who: Identity, action: str, namespace: str = "home") -> bool:
    try:
        authorise(who, action, namespace)
    except AccessDenied:
        return False
    return True


@pytest.mark.parametrize("role", sorted(ROLES))
def test_every_action_by_every_role(role: str) -> None:
    who = identity(role)
    assert {action for action in protocol.ACTIONS if allowed(who, action)} == MAY[role]


def test_roles_add_up() -> None:
    both = identity("reader", "operator")
    assert {action for action in protocol.ACTIONS if allowed(both, action)} == MAY["reader"] | MAY["operator"]


@pytest.mark.parametrize("action", sorted(protocol.READ_ACTIONS | protocol.WRITE_ACTIONS))
def test_every_action_on_memories_asks_for_its_namespace(action: str) -> None:
    who = identity("writer", namespaces=("home", "work/mail"))
    free = action == "health_check"
    for namespace in ("home", "home/kitchen", "home/kitchen/shelf", "work/mail"):
        assert allowed(who, action, namespace)
    for namespace in ("homeless", "hom", "Home", "work", "work/mailing", "*", "default", "/home", "home ", "x/home"):
        assert allowed(who, action, namespace) == free, namespace
    assert allowed(identity("writer", namespaces=("*",)), action, "anything")
    assert allowed(identity("writer", namespaces=()), action) == free


@pytest.mark.parametrize("action", sorted(protocol.ACTIONS))
def test_who_acts_for_another_may_do_what_both_may(action: str) -> None:
    grants = {
        role: Grant(role, PUBLIC, frozenset({role}), ("*",) if role == "admin" else ("home", "work")) for role in ROLES
    }
    for one, first in grants.items():
        for other, second in grants.items():
            together = allowed(Identity.of(first, second), action, "home")
            assert together == (action in MAY[one] and action in MAY[other]), (one, other)
    narrow = Grant("guest", PUBLIC, frozenset({"writer"}), ("home/kitchen", "garden"))
    for namespace in ("home", "work", "garden"):
        assert allowed(Identity.of(grants["writer"], narrow), action, namespace) == (action == "health_check")


def test_a_refusal_says_nothing_but_what_was_sent_and_the_name_of_the_key() -> None:
    messages = set()
    for namespace in ("exists", "does-not"):
        with pytest.raises(AccessDenied) as refused:
            authorise(identity("writer"), "get_memory", namespace)
        assert refused.value.details == {}
        messages.add(refused.value.message.replace(namespace, "N"))
    assert messages == {"the namespace 'N' is not granted to the key of planner"}


def test_what_was_allowed_is_remembered_with_the_grants_and_what_was_not_is_not() -> None:
    who = identity("writer")
    for _ in range(2):
        assert allowed(who, "get_memory", "home")
        assert not allowed(who, "get_memory", "work")
        assert not allowed(who, "backup", "home")
    assert who.allowed == {("get_memory", "home")}
    assert identity("writer") == who, "what is remembered is no part of who it is"
    assert not identity("writer").allowed
    for number in range(200):
        assert allowed(who, "get_memory", f"home/{number}")
    assert len(who.allowed) <= 64


class Keys:
    def __init__(self, who: Identity) -> None:
        self.who = who

    def identity(self, user_id: str | None, on_behalf_of: str | None = None) -> Identity:
        if user_id != PUBLIC or on_behalf_of == "nobody":
            raise AccessDenied("not known here")
        return self.who


def test_a_plaintext_caller_is_an_administrator_by_its_address() -> None:
    guard = Guard(admits=lambda address: address == "127.0.0.1")
    assert guard.admit(Asked("backup", "default", address="127.0.0.1")).identity is None
    with pytest.raises(AccessDenied, match="own machine"):
        guard.admit(Asked("backup", "default", address="10.0.0.7"))
    guard.admit(Asked("add_memory", "default", address="10.0.0.7"))
    with pytest.raises(InvalidField, match="on_behalf_of"):
        guard.admit(Asked("add_memory", "default", on_behalf_of="ada"))


def test_what_a_caller_counts_as() -> None:
    asked = Asked("stats", "home", "a label", address="10.0.0.7")
    plain = Caller(asked, None)
    assert (plain.label, plain.scope, plain.own, plain.principal) == (
        "a label",
        "a label",
        "a label",
        "@10.0.0.7/a label",
    )
    assert plain.sees_figures
    assert plain.sees_namespace("anything")
    key = Caller(asked, Identity.of(identity("writer").grants[0], identity("writer", name="ada").grants[0]))
    assert (key.label, key.scope, key.own, key.principal) == ("a label", "planner>ada", "ada", "ada")
    assert not key.sees_figures
    assert [key.sees_namespace(name) for name in ("home", "work")] == [True, False]
    assert Caller(Asked("stats", "home"), identity("operator")).label == "planner"
    assert Caller(Asked("stats", "home"), identity("operator")).sees_figures
    assert principal_of(identity("reader"), asked) == "planner"


def test_limits_are_those_of_whom_it_is_for(tmp_path: Path) -> None:
    rates = rates_of(LimitsSettings(rate_per_s=0.5, burst=3))
    guard = Guard(keys=Keys(identity("writer")), rates=rates, clock=lambda: 0.0)
    asked = Asked("stats", "home", user_id=PUBLIC)
    caller = guard.admit(asked)
    guard.charge(caller, 1)
    guard.charge(caller, 3)
    with pytest.raises(RateLimited) as refused:
        guard.admit(asked._replace(agent_id="another label", address="10.9.9.9"))
    assert refused.value.details == {"retry_after_ms": 2000}
    with pytest.raises(RateLimited):
        guard.charge(caller, 9)
    guard.charge(Caller(asked, identity("writer", name="ada")), 3)
    guard.admit(asked._replace(action="health_check"))
    with pytest.raises(RateLimited):  # an operator may ask it as well
        Guard(keys=Keys(identity("operator", name="planner")), rates=rates, clock=lambda: 0.0).admit(
            asked._replace(action="list_runs")
        )
    assert guard.figures() == {"rate_limited": 2}
    guard.ended(caller, "success")
    assert rates_of(LimitsSettings()) is None
    assert "burst 1," in repr(rates_of(LimitsSettings(rate_per_s=0.5)))


def test_denied_and_admin_requests_are_noted_and_no_others(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    guard = Guard(keys=Keys(identity("admin", namespaces=("*",))), audit=audit)
    for action in ("stats", "backup", "list_runs"):
        guard.ended(guard.admit(Asked(action, "home", user_id=PUBLIC)), "success")
    for asked in (Asked("stats", "home", user_id=None), Asked("stats", "home", user_id=PUBLIC, on_behalf_of="nobody")):
        with pytest.raises(AccessDenied):
            guard.admit(asked)
    guard.denied(Asked("connect", "", address="10.0.0.7"), AccessDenied("no key"))
    guard.not_let_in("memory", "10.0.0.8", "planner")
    guard.not_let_in("memory", "10.0.0.8", "")
    guard.close()
    text = audit.path.read_text(encoding="utf-8").splitlines()
    found = [tuple(part in line for part in ('"denied"', "stats", "backup", "planner", "nobody")) for line in text]
    assert found == [
        (False, False, True, True, False),
        (False, False, True, True, False),
        (True, True, False, False, False),
        (True, True, False, True, True),
        (True, False, False, False, False),
        (True, False, False, True, False),
        (True, False, False, False, False),
    ]
    assert "10.0.0.7" in text[-3]
    last = [json.loads(line) for line in text[-2:]]
    assert [line["name"] for line in last] == ["planner", "@10.0.0.8/"], "a key that is known goes by its name"
