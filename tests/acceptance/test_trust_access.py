"""Who gets at what: every action, by strangers of every kind, at everything of a tenant, over real sockets."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import zmq

from memory_system import protocol
from tests.support.keyring import KeyRing
from tests.support.mesh import Mesh, running_mesh
from tests.support.process import PROJECT, Orchestrator, Peer, running_orchestrator, wait_until
from tests.support.tenants import ATTEMPTS, Tenant, Told, ask, attempt_everything, fill, state_of, ways

pytestmark = pytest.mark.timeout(120)

ALMA, BORIS, BELOW, OLIVE = "house/alma", "house/boris", "house/alma/below", "house/olive"
# What of a tenant an action tells whoever may ask; get_commit_seq and health_check tell of nothing but numbers.
TELLS = protocol.READ_ACTIONS - {"get_commit_seq", "health_check", "get_request_status"}
# Ways in which every action has to be refused to somebody of another namespace, whatever it asks.
REFUSED_WAYS = (
    "in its namespace",
    "in its namespace, in its name",
    "in its namespace, in its session",
    "in its namespace, under its request_id",
    "in its namespace, as a legacy caller",
    "in a namespace like it",
    "above its namespace",
    "in all namespaces",
    "in its namespace, in capitals",
    "on its behalf",
    "on its behalf, in two steps",
    "on behalf of an administrator",
)


def add_keys(ring: KeyRing) -> None:
    ring.add("alma", roles=["writer"], namespaces=[ALMA])
    ring.add("boris", roles=["writer"], namespaces=[BORIS])
    ring.add("bea", roles=["reader"], namespaces=[BORIS])
    ring.add("cain", roles=["writer"], namespaces=["house/alm", "house/alma2", BELOW])
    ring.add("olga", roles=["operator"])
    ring.add("adam", roles=["admin"], namespaces=["*"])
    ring.add("deputy", roles=["writer"], namespaces=["*"], act_for=["boris", "olga"])
    ring.add("rex", roles=["writer"], namespaces=[ALMA])
    ring.add("olive", roles=["writer"], namespaces=[OLIVE])
    ring.add("dora", roles=["writer"], namespaces=["*"], act_for=["boris"])


class House:
    """An orchestrator and a health manager under keys, a tenant's memories, and all that was said on the bus."""

    def __init__(self, mesh: Mesh, tenant: Tenant, bus: zmq.Socket[bytes]) -> None:
        self.ring = mesh.ring
        self.folder = mesh.folder
        self.tenant = tenant
        self.database = mesh.folder / "memory.db"
        self._address = mesh.endpoints["orchestrator"]
        self._context = bus.context
        self._bus = bus

    def peer(self, name: str) -> Peer:
        return Peer(self._context, self._address, **self.ring.options(name))

    def bus(self) -> list[bytes]:
        """What came over the bus since the last look."""
        messages: list[bytes] = []
        while self._bus.poll(200):
            messages.append(self._bus.recv())
        return messages

    def logs(self) -> bytes:
        return b"".join(path.read_bytes() for path in self.folder.rglob("*") if ".log" in path.name)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder, quick = tmp_path_factory.mktemp("house"), {"storage__access_flush_s": 0.05, "log__level": "debug"}
    with running_mesh(folder, supervised=False, start=False, keys=True, **quick) as mesh, zmq.Context() as context:
        add_keys(mesh.ring)
        for program in ("health_manager", "orchestrator"):
            mesh.start_program(program)
        mesh.wait_answer("orchestrator")
        mesh.wait_answer("health_manager")
        tenant = Tenant(ALMA)
        with mesh.ring.subscriber(context, mesh.endpoints["publish"], "olga") as bus:
            made = House(mesh, tenant, bus)
            with made.peer("alma") as peer:
                fill(tenant, peer)
            yield made


def leaks(told: Sequence[Told]) -> list[tuple[str, str, tuple[bytes, ...]]]:
    return [(each.action, each.way, each.leaked) for each in told if each.leaked]


def outcomes(told: Sequence[Told]) -> Counter[str]:
    return Counter(str(each.reply.get("error_code", "success")) for each in told)


def succeeded(told: Sequence[Told], way: str) -> set[str]:
    return {each.action for each in told if each.way == way and each.reply["status"] == "success"}


def test_every_action_is_attempted() -> None:
    assert set(ATTEMPTS) == protocol.ACTIONS, "say in tests/support/tenants.py what a stranger would ask of it"
    assert all(ATTEMPTS.values())
    assert set(REFUSED_WAYS) < set(ways(Tenant(ALMA, {"agent": "a"}, {"session": "s", "request": "r"}), BORIS))


@pytest.mark.parametrize("stranger", ["boris", "bea", "deputy"])
def test_nothing_of_a_tenant_reaches_another(house: House, stranger: str) -> None:
    """`deputy`: an agent whose key reaches everything, asked by somebody whose key does not."""
    before = state_of(house.tenant, house.database)
    acting = {"on_behalf_of": "boris"} if stranger == "deputy" else {}
    with house.peer(stranger) as peer:
        told = attempt_everything(house.tenant, peer, BORIS, **acting)
    assert leaks(told) == []
    assert state_of(house.tenant, house.database) == before
    for way in REFUSED_WAYS:
        # health_check is of no namespace; who may act for none is refused even that.
        assert succeeded(told, way) <= {"health_check"}, way
    assert succeeded(told, "from the own namespace") >= {"list_memories", "search_memory", "stats"}
    admin = [each for each in told if each.action in protocol.ADMIN_ACTIONS]
    assert set(outcomes(admin)) == {"access_denied"}
    if stranger == "bea":
        assert succeeded(told, "from the own namespace").isdisjoint(protocol.WRITE_ACTIONS)


def test_a_grant_covers_whole_segments_and_nothing_above(house: House) -> None:
    before = state_of(house.tenant, house.database)
    with house.peer("cain") as peer:
        told = attempt_everything(house.tenant, peer, BELOW)
    assert leaks(told) == []
    assert state_of(house.tenant, house.database) == before
    assert succeeded(told, "in its namespace") <= {"health_check"}
    assert succeeded(told, "in a namespace like it") <= {"health_check"}
    assert "add_memory" in succeeded(told, "below its namespace")


def test_an_operator_sees_how_the_service_is_and_no_memory(house: House) -> None:
    chosen = ("in its namespace", "without a namespace", "in all namespaces", "on its behalf")
    with house.peer("olga") as peer:
        told = attempt_everything(house.tenant, peer, BORIS, chosen)
    assert leaks(told) == []
    assert succeeded(told, "in its namespace") == {"health_check", "list_runs"}
    figures = [each.reply for each in told if each.action == "health_check" and each.reply["status"] == "success"]
    assert all("requests" in reply and reply["commit_seq"] == 0 for reply in figures)


def test_health_check_tells_a_tenant_nothing_of_others(house: House) -> None:
    allowed = {"status", "request_id", "commit_seq", "state", "readiness", "pid", "uptime_s", "draining", "version"}
    with house.peer("boris") as peer:
        reply = peer.ask("health_check", {"namespace": ALMA})
    assert set(reply) <= allowed | {"model_id"}
    assert reply["commit_seq"] == 0


def test_a_key_that_is_revoked_is_refused_on_the_connection_that_it_has(house: House) -> None:
    with house.peer("rex") as peer:
        granted = ask(house.tenant, peer, "get_memory", "", {"namespace": ALMA}, {
            "memory_id": house.tenant.ids["memory"], "touch": False,
        })  # fmt: skip
        assert granted.leaked
        before = state_of(house.tenant, house.database)
        house.ring.revoke("rex")
        wait_until(lambda: peer.ask("health_check").get("error_code") == "access_denied", "the key is refused", 10.0)
        told = attempt_everything(house.tenant, peer, ALMA, ("in its namespace", "from the own namespace"))
    assert leaks(told) == []
    assert set(outcomes(told)) == {"access_denied"}
    assert state_of(house.tenant, house.database) == before


def test_who_is_no_operator_hears_nothing_of_the_bus(house: House) -> None:
    with zmq.Context() as context:
        names = ("boris", "alma", "deputy")
        address = house._bus.getsockopt(zmq.LAST_ENDPOINT).decode().rstrip("\0")  # type: ignore[union-attr]
        socks = [house.ring.subscriber(context, address, name) for name in names]
        with contextlib.ExitStack() as stack:
            for sock in socks:
                stack.enter_context(sock)
            with house.peer("boris") as peer:
                attempt_everything(house.tenant, peer, BORIS, ("in its namespace",))
            wait_until(lambda: bool(house.bus()), "the operator hears something", 15.0)
            assert [sock.poll(100) for sock in socks] == [0, 0, 0]


def test_no_secret_is_in_a_log_or_on_the_bus(house: House) -> None:
    """Contents, names and keys; ids may be in logs, and what a stranger asked for is told by its id."""
    house.bus()
    own = Tenant(OLIVE)  # what its own key and an administrator may do is done to it
    with house.peer("boris") as boris, house.peer("olive") as olive, house.peer("adam") as adam:
        fill(own, olive)
        told = attempt_everything(own, boris, BORIS)
        told += attempt_everything(own, olive, OLIVE, ("in its namespace, in its name",))
        told += attempt_everything(own, adam, OLIVE, ("in its namespace",))
    tenants = (house.tenant, own)
    words = {word.encode() for each in tenants for kind, word in each.words.items() if kind != "request"}
    keys = {secret.encode() for secret in house.ring.secrets()}
    logs, bus = house.logs(), b"".join(house.bus())
    assert b"request_refused" in logs
    assert b"access_denied" in logs
    assert [word for word in words | keys if word in logs] == []
    assert [word for word in words | keys if word in bus] == []
    replies = json.dumps([each.reply for each in told], default=str)
    assert [key for key in keys if key.decode() in replies] == []
    assert not re.search(r"Traceback|File \\?\"|\.py\b|sqlite3\.", replies)


def test_the_audit_log_tells_of_denials_and_of_administration(house: House) -> None:
    with house.peer("dora") as dora, house.peer("adam") as adam:
        dora.ask("export_memories", {"namespace": ALMA, "request_id": "the-request-to-look-for-1"})
        dora.ask("get_memory", {"namespace": ALMA, "on_behalf_of": "alma"}, memory_id="mem-1")
        adam.ask("run_checkpoint", {"request_id": "the-request-to-look-for-2"})
        adam.ask("undo_consolidation", {"request_id": "the-request-to-look-for-3"}, memory_id="mem-of-nobody")
    path = house.folder / "logs" / "audit.log"
    assert path.stat().st_mode & 0o777 == 0o600
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    allowed = {"time", "event", "name", "address", "action", "namespace", "request_id", "on_behalf_of", "outcome"}
    assert {name for line in lines for name in line} <= allowed | {"left_out_before"}

    def found(number: int) -> list[tuple[Any, ...]]:
        wanted = [line for line in lines if line.get("request_id") == f"the-request-to-look-for-{number}"]
        return [(line["event"], line["name"], line["action"], line["outcome"]) for line in wanted]

    assert found(1) == [("denied", "dora", "export_memories", "access_denied")]
    assert found(2) == [("admin", "adam", "run_checkpoint", outcome) for outcome in ("admitted", "success")]
    assert found(3)[0] == ("admin", "adam", "undo_consolidation", "admitted")
    assert found(3)[1][3] in ("memory_not_found", "invalid_field")
    (denied,) = [line for line in lines if line["name"] == "dora" and line.get("on_behalf_of") == "alma"]
    assert (denied["address"], denied["namespace"], denied["outcome"]) == ("127.0.0.1", ALMA, "access_denied")


# -- whether the test above would notice ------------------------------------------------------------------------------


@contextlib.contextmanager
def filled(folder: Path, ring: KeyRing, tenant: Tenant | None, **overrides: Any) -> Iterator[Orchestrator]:
    folder.mkdir()
    with running_orchestrator(folder, start=False, **ring.settings(), **overrides) as orchestrator:
        if overrides.pop("log__level", "") == "error":
            orchestrator.command = [sys.executable, str(PROJECT / "tests" / "programs" / "open_orchestrator.py")]
        ring.start(orchestrator)
        if tenant is not None:
            with ring.peer(orchestrator, "alma") as peer:
                fill(tenant, peer)
        yield orchestrator


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    ring = KeyRing(tmp_path / "keys")
    add_keys(ring)
    return ring


def test_the_tenant_itself_is_told_all_of_it(tmp_path: Path, ring: KeyRing) -> None:
    """Each attempt would reach the data if it were allowed: the same ones, by the tenant's own key."""
    tenant = Tenant(ALMA)
    with filled(tmp_path / "store", ring, tenant) as orchestrator, ring.peer(orchestrator, "alma") as peer:
        told = [
            ask(tenant, peer, action, "", {"namespace": ALMA, "agent_id": tenant.words["agent"]}, make(tenant))
            for action in sorted(TELLS | {"get_request_status"})
            for make in ATTEMPTS[action]
        ]
    assert {each.action for each in told if each.leaked} == TELLS
    (status,) = [each.reply for each in told if each.action == "get_request_status"]
    assert status["state"] == "committed"


def test_without_the_checks_a_stranger_gets_everything(tmp_path: Path, ring: KeyRing) -> None:
    """The negative control: the orchestrator with its checks switched off."""
    tenant = Tenant(ALMA)
    with filled(tmp_path / "store", ring, tenant, log__level="error") as orchestrator:
        before = state_of(tenant, orchestrator.database)
        with ring.peer(orchestrator, "boris") as peer:
            told = [
                ask(tenant, peer, action, "", {"namespace": ALMA}, make(tenant))
                for action in sorted(TELLS | {"export_memories"})
                for make in ATTEMPTS[action]
            ]
            assert peer.ask("forget", {"namespace": ALMA}, user_id=tenant.words["user"])["deleted"] > 0
        assert {each.action for each in told if each.leaked} == TELLS | {"export_memories"}
        assert state_of(tenant, orchestrator.database) != before


# -- whether what a stranger is told depends on the tenant at all -----------------------------------------------------

_ID = re.compile(r"mem-[0-9a-f]{28}")
# Clocks, what is random, and the number of a group: one count for the whole store, as docs/security.md says.
_VARIES = {
    *("created_at", "updated_at", "last_active_at", "ended_at", "as_of", "committed_at", "importance", "uptime_s"),
    *("pid", "next_cursor", "request_id", "group_id", "replaced_at", "last_accessed_at", "access_count"),
}


def plain(value: Any, names: dict[str, str]) -> Any:
    """A reply without what differs between two runs of the same requests."""
    if isinstance(value, dict):
        return {name: plain(each, names) for name, each in value.items() if name not in _VARIES}
    if isinstance(value, list):
        return [plain(each, names) for each in value]
    if isinstance(value, str):
        return _ID.sub(lambda found: names.setdefault(found[0], f"memory {len(names)}"), value)
    return round(value, 6) if isinstance(value, float) else value


def test_what_a_stranger_is_told_is_the_same_whether_the_tenant_is_there_or_not(tmp_path: Path, ring: KeyRing) -> None:
    """No count, no number of a change, no order of results and no message depends on what others keep."""
    tenant, heard = Tenant(ALMA), []
    for folder, kept in (("with", tenant), ("without", None)):
        with (
            filled(tmp_path / folder, ring, kept, embedding__provider="off") as orchestrator,
            ring.peer(orchestrator, "boris") as peer,
        ):
            ring.wait_for(orchestrator, "healthy")
            if kept is None:  # the number of the tenant's group must be none of the stranger's own
                with ring.peer(orchestrator, "adam") as adam:
                    assert adam.ask("create_context_group", name="x")["group_id"] == tenant.ids["group"]
            for number in range(3):
                peer.ask("add_memory", {"namespace": BORIS}, content=f"the harbour of boris {number}")
            names: dict[str, str] = {}
            told = attempt_everything(tenant, peer, BORIS)
            heard.append([(each.action, each.way, each.data, plain(each.reply, names)) for each in told])
    different = [(one, other) for one, other in zip(*heard, strict=True) if one != other]
    assert different == []
