"""What the key of a caller permits at the programs whose actions are functions, and what becomes of its reports."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Annotated, Any, cast

import pytest

from memory_system.actions import Actions, Request
from memory_system.errors import AccessDenied
from memory_system.events import make_event
from memory_system.fields import Span
from memory_system.grants import ANY, READ, Grant, Grants
from memory_system.health import reports
from memory_system.permits import Permits
from memory_system.router import Sender
from memory_system.security import Gate

LONG = "x" * 63  # a name may have one more
GRANTS = Grants.of(
    [
        Grant("agent", "A" * 40, frozenset({"writer"}), ("*",), ("*",)),
        Grant("planner", "B" * 40, frozenset({"writer"}), ("home",)),
        Grant("guest", "C" * 40, frozenset({"reader"}), ("home",)),
        Grant("watcher", "D" * 40, frozenset({"operator"})),
        Grant("chief", "E" * 40, frozenset({"admin"}), ("*",)),
        Grant("leaver", "F" * 40, frozenset({"writer"}), ("home",), revoked=True),
        Grant(LONG + "1", "G" * 40, frozenset({"writer"}), ("home",), (LONG + "2",)),
        Grant(LONG + "2", "H" * 40, frozenset({"writer"}), ("home",), ("planner",)),
    ]
)


class FakeGate:
    """Keys without sockets."""

    grants = GRANTS
    on_refused: Any = None

    def identity(self, user_id: str | None, on_behalf_of: str | None = None) -> Any:
        if user_id is None:
            raise AccessDenied("the connection has no key")
        identity = GRANTS.identity(user_id)
        return identity if on_behalf_of is None else GRANTS.acting(identity, on_behalf_of)


async def find(*, request: Request, limit: Annotated[int, Span(1, 9)] = 1) -> dict[str, Any]:
    assert request.identity is not None
    return {"scope": request.identity.scope}


def nothing() -> None: ...


def asked(name: str | None, action: str = "find", **around: Any) -> dict[str, Any]:
    """The reply to a request with the key of this name; None: a connection without a key."""
    actions = Actions(
        {"find": find, "get_health": nothing, "run_job": nothing, "health_check": nothing},
        permits=Permits(cast(Gate, FakeGate()), lambda each: READ if each == "find" else _needs(each)),
    )
    sender = Sender("10.0.0.7", None if name is None else GRANTS.by_name[name].public)
    body = json.dumps({"v": 1, "action": action, "request_id": "r" * 20, **around}).encode()

    async def answer() -> bytes:
        answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        actions.handle(body, answered.set_result, b"", sender)
        return await answered

    reply: dict[str, Any] = json.loads(asyncio.run(answer()))
    return reply


def _needs(action: str) -> str:
    return {"get_health": "operate", "run_job": "admin"}.get(action, ANY)


@pytest.mark.parametrize(
    ("name", "action", "namespace", "allowed"),
    [
        ("planner", "find", "home", True),
        ("planner", "find", "home/kitchen", True),
        ("planner", "find", "homeless", False),
        ("planner", "find", "default", False),
        ("guest", "find", "home", True),
        ("watcher", "find", "home", False),
        ("chief", "find", "anything", True),
        ("leaver", "find", "home", False),
        (None, "find", "home", False),
        ("planner", "get_health", "home", False),
        ("watcher", "get_health", "home", True),
        ("watcher", "run_job", "home", False),
        ("chief", "run_job", "home", True),
        ("watcher", "health_check", "elsewhere", True),
        ("leaver", "health_check", "home", False),
        (None, "health_check", "home", False),
    ],
)
def test_roles_and_namespaces(name: str | None, action: str, namespace: str, allowed: bool) -> None:
    reply = asked(name, action, namespace=namespace)
    assert reply.get("error_code", "success") == ("success" if allowed else "access_denied"), reply


@pytest.mark.parametrize(
    ("name", "on_behalf_of", "namespace", "scope"),
    [
        ("agent", "planner", "home", "agent>planner"),
        ("agent", "planner", "work", None),
        ("agent", "agent>planner", "home", "agent>agent>planner"),
        ("agent", f"{LONG}1>{LONG}2>planner", "home", f"agent>{LONG}1>{LONG}2>planner"),
        ("agent", "planner>chief", "home", None),  # planner acts for nobody
        ("agent", "leaver", "home", None),
        ("agent", "nobody", "home", None),
        ("planner", "chief", "home", None),
        ("agent", "watcher", "home", None),
        ("agent", None, "home", "agent"),
    ],
)
def test_a_chain_may_what_all_of_it_may(name: str, on_behalf_of: str | None, namespace: str, scope: str | None) -> None:
    around = {} if on_behalf_of is None else {"on_behalf_of": on_behalf_of}
    reply = asked(name, namespace=namespace, **around)
    assert reply.get("scope") == scope, reply
    assert scope is not None or reply["error_code"] == "access_denied"


def test_without_keys_nobody_speaks_for_another() -> None:
    body = json.dumps({"v": 1, "action": "find", "on_behalf_of": "chief"}).encode()
    reply = json.loads(asyncio.run(Actions({"find": find}).answer(body)))
    assert (reply["error_code"], reply["details"]["field"]) == ("invalid_field", "on_behalf_of")


def test_an_event_is_of_the_key_that_it_came_with() -> None:
    event = make_event("orchestrator", "made_up", "it is on fire", "critical", details={"legs": 3})
    signed = reports.signed(event, "planner")
    assert (signed.agent, signed.details) == ("planner", {"legs": 3, "agent_sent": "orchestrator"})
    assert (signed.event_id, signed.message, signed.severity) == (event.event_id, event.message, event.severity)
    assert reports.signed(event, "orchestrator") is event
    crowded = make_event("x", "many", "details", details={f"d{number}": "y" * 60 for number in range(60)})
    assert reports.signed(crowded, "planner").details["agent_sent"] == "x"
    assert len(json.dumps(reports.signed(crowded, "planner").fields())) < 6000
    assert time.time() - signed.timestamp < 60
