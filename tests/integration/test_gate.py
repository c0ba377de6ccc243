"""Who gets in, over real sockets: each arrangement of CURVE and ZAP that lets strangers in (as bare sockets, so that
the tests are seen to tell the difference), and the gate, which lets in none."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth
from zmq.auth.thread import ThreadAuthenticator

from memory_system import keys
from memory_system.errors import AccessDenied, CannotStart, ConfigError
from memory_system.keys import apply_server, new_key
from memory_system.router import Router, bind_socket, sender_of
from memory_system.security import Gate, authorise, self_test
from memory_system.security.authenticator import Authenticator
from memory_system.security.registry import Registry
from memory_system.settings import NetworkSettings, SecuritySettings, Settings
from tests.support.handshakes import CLOSED, IN, OTHER_MECHANISM, REFUSED, knock
from tests.support.keyring import KeyRing
from tests.support.process import free_port, wait_until

SERVICE = new_key("service")
KNOWN = new_key("planner", SERVICE.public)
STRANGER = new_key("stranger", SERVICE.public)
ANY_PORT = "tcp://127.0.0.1:*"
# Which of the two a peer of another mechanism sees is a race: whether it reads the greeting before the end.
KEYLESS = (OTHER_MECHANISM, CLOSED)

Prepare = Callable[[zmq.Socket[Any]], None]
LetsIn = Callable[[str, str], bool]


@contextlib.contextmanager
def bare(
    context: zmq.Context[Any], prepare: Callable[[zmq.Socket[Any]], None], kind: int = zmq.ROUTER
) -> Iterator[str]:
    """The endpoint of a bound socket that `prepare` has set options of."""
    with context.socket(kind) as socket:
        socket.linger = 0
        prepare(socket)
        socket.bind(ANY_PORT)
        yield socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()  # type: ignore[union-attr]


def curve(domain: str | None, enforce: bool) -> Prepare:
    def prepare(socket: zmq.Socket[Any]) -> None:
        socket.curve_server = True
        socket.curve_secretkey = SERVICE.secret
        if domain is not None:
            socket.zap_domain = domain.encode()
        if enforce:
            socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)

    return prepare


@pytest.fixture
def context() -> Iterator[zmq.Context[Any]]:
    with zmq.Context() as made:
        yield made


class Provider:
    """pyzmq's way to ask who is let in; counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def callback(self, domain: str, key: bytes) -> bool:
        self.asked += 1
        return key == KNOWN.public


@contextlib.contextmanager
def pyzmq_authenticator(context: zmq.Context[Any], domain: str, location: Any = None) -> Iterator[Provider]:
    provider = Provider()
    authenticator = ThreadAuthenticator(context)
    authenticator.start()
    try:
        if location is None:
            authenticator.configure_curve_callback(domain, provider)
        else:
            authenticator.configure_curve(domain, location)
        yield provider
    finally:
        authenticator.stop()


# -- what lets strangers in, on bare sockets: were one of these to change, the rules of the gate may be looser --------


@pytest.mark.parametrize("domain", [None, "memory"])
def test_without_authenticator_and_enforcement_strangers_get_in(context: zmq.Context[Any], domain: str | None) -> None:
    with bare(context, curve(domain, False)) as endpoint:
        assert knock(endpoint, STRANGER) == IN


def test_an_empty_domain_lets_strangers_in_past_the_authenticator(context: zmq.Context[Any]) -> None:
    with pyzmq_authenticator(context, "") as provider, bare(context, curve(None, True)) as endpoint:
        assert knock(endpoint, STRANGER) == IN
        assert provider.asked == 0


def test_allow_any_lets_strangers_in(context: zmq.Context[Any]) -> None:
    with (
        pyzmq_authenticator(context, "memory", zmq.auth.CURVE_ALLOW_ANY),
        bare(context, curve("memory", True)) as endpoint,
    ):
        assert knock(endpoint, STRANGER) == IN


def test_a_plaintext_socket_lets_everybody_in_past_the_authenticator(context: zmq.Context[Any]) -> None:
    def prepare(socket: zmq.Socket[Any]) -> None:
        socket.zap_domain = b"memory"

    with pyzmq_authenticator(context, "memory"), bare(context, prepare) as endpoint:
        assert knock(endpoint, None) == IN


# -- what does not, on bare sockets -----------------------------------------------------------------------------------


def test_without_authenticator_an_enforced_domain_lets_nobody_in(context: zmq.Context[Any]) -> None:
    with bare(context, lambda socket: apply_server(socket, SERVICE, "memory")) as endpoint:
        assert knock(endpoint, STRANGER) == CLOSED
        assert knock(endpoint, KNOWN) == CLOSED


def test_the_domain_has_to_be_the_authenticators(context: zmq.Context[Any]) -> None:
    with (
        pyzmq_authenticator(context, "*") as provider,
        bare(context, lambda socket: apply_server(socket, SERVICE, "memory")) as endpoint,
    ):
        assert knock(endpoint, KNOWN) == REFUSED
        assert provider.asked == 0


def test_two_authenticators_do_not_share_a_context(context: zmq.Context[Any]) -> None:
    with authenticator(context), pytest.raises(CannotStart, match="authenticator cannot start: Address already in use"):
        Authenticator(context, lambda *_: True, look=lambda: None, on_refused=lambda *_: None).start()


# -- the authenticator ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def authenticator(
    context: zmq.Context[Any], lets_in: Callable[[str, str], bool] | None = None
) -> Iterator[Authenticator]:
    def known(domain: str, public: str) -> bool:
        return domain == "memory" and public == KNOWN.public.decode()

    made = Authenticator(context, lets_in or known, look=lambda: None, on_refused=lambda *_: None)
    made.start()
    try:
        yield made
    finally:
        context.term()
        made.join()
    assert not made.is_alive()


def test_only_known_keys_of_the_right_service_get_in(context: zmq.Context[Any]) -> None:
    with (
        authenticator(context) as answering,
        bare(context, lambda socket: apply_server(socket, SERVICE, "memory")) as endpoint,
        bare(context, lambda socket: apply_server(socket, SERVICE, "bus")) as bus,
    ):
        assert knock(endpoint, KNOWN) == IN
        assert (answering.accepted, answering.refused) == (1, 0)
        assert knock(endpoint, STRANGER) == REFUSED
        assert knock(bus, KNOWN) == REFUSED
        assert knock(endpoint, None) in KEYLESS
        assert knock(endpoint, replace(KNOWN, server=STRANGER.public)) == CLOSED
        assert (answering.accepted, answering.refused) == (1, 2)


def test_a_question_that_fails_refuses_one_and_the_next_is_answered(context: zmq.Context[Any]) -> None:
    asked: list[str] = []

    def fails_first(domain: str, public: str) -> bool:
        asked.append(domain)
        if len(asked) == 1:
            raise RuntimeError("the first fails")
        return True

    with (
        authenticator(context, fails_first) as answering,
        bare(context, lambda socket: apply_server(socket, SERVICE, "memory")) as endpoint,
    ):
        assert knock(endpoint, KNOWN) == REFUSED
        assert knock(endpoint, KNOWN) == IN
        assert answering.failures == 1
        assert answering.is_alive()


# -- the gate ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(ring: KeyRing) -> Iterator[Gate]:
    gate = Gate.of(Settings(security=SecuritySettings(keys_dir=str(ring.folder))))
    assert gate is not None
    gate.open()
    try:
        yield gate
    finally:
        gate.close()


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    made = KeyRing(tmp_path / "keys")
    made.add("planner", roles=["writer"], namespaces=["home"])
    return made


@contextlib.contextmanager
def listening(gate: Gate, domain: str = "memory", kind: int = zmq.ROUTER) -> Iterator[tuple[zmq.Socket[bytes], str]]:
    with gate.context.socket(kind) as socket:
        socket.linger = 0
        bind_socket(socket, ANY_PORT, program="x", port_key="x", gate=gate, domain=domain)
        yield socket, self_test.endpoint(socket)


def test_there_is_no_gate_without_keys(tmp_path: Path) -> None:
    assert Gate.of(Settings(security=SecuritySettings(keys_dir=str(tmp_path)))) is None


def test_the_gate_lets_in_who_is_granted(ring: KeyRing) -> None:
    with opened(ring) as gate, listening(gate) as (_, endpoint):
        planner = ring.keys["planner"]
        assert knock(endpoint, planner) == IN
        assert knock(endpoint, new_key("planner", ring.server)) == REFUSED
        assert knock(endpoint, None) in KEYLESS
        assert knock(endpoint, replace(planner, server=STRANGER.public)) == CLOSED
        assert gate.figures() == {
            "state": "ready",
            "keys": 8,
            "accepted": 1,
            "refused": 2,  # one of them by the test at the start
            "failures": 0,
            "restarts": 0,
            "grants_problem": "",
        }


@pytest.mark.parametrize("name", ["planner", "operator", "reader", "admin"])
@pytest.mark.parametrize("kind", [zmq.XPUB, zmq.PUB])
def test_only_operators_connect_to_what_publishes(ring: KeyRing, name: str, kind: int) -> None:
    for role in ("operator", "reader", "admin"):
        ring.add(role, roles=[role], namespaces=["*"])
    with opened(ring) as gate, listening(gate, "bus", kind) as (_, endpoint):
        assert knock(endpoint, ring.keys[name], zmq.SUB) == (IN if name in ("operator", "admin") else REFUSED)


def test_the_sender_of_a_message_is_its_key(ring: KeyRing) -> None:
    with opened(ring) as gate, listening(gate) as (socket, endpoint), zmq.Context() as context:
        with context.socket(zmq.REQ) as peer:
            peer.linger = 0
            keys.apply_client(peer, ring.keys["planner"])
            peer.connect(endpoint)
            peer.send(b"x")
            assert socket.poll(5000)
            last = socket.recv_multipart(copy=False)[-1]
        sender = sender_of(last)
        assert sender == ("127.0.0.1", ring.keys["planner"].public.decode())
        identity = gate.identity(sender.user_id)
        assert (identity.name, identity.roles) == ("planner", {"writer", "reader"})
    assert sender_of(zmq.Frame(b"of nobody")) == ("unknown", None)


def test_who_has_no_user_id_is_nobody(ring: KeyRing) -> None:
    with opened(ring) as gate:
        for user_id in (None, "", "planner", "anonymous"):
            with pytest.raises(AccessDenied):
                gate.identity(user_id)


def test_a_key_is_added_and_revoked_while_the_gate_is_open(ring: KeyRing) -> None:
    with opened(ring) as gate, listening(gate) as (_, endpoint):
        ring.add("late", roles=["reader"], namespaces=["home"])
        assert knock(endpoint, ring.keys["late"]) == IN, "an unknown key has the file looked at"
        late = ring.keys["late"].public.decode()
        assert gate.identity(late).name == "late"
        ring.revoke("late")
        started_s = time.monotonic()
        wait_until(lambda: denied(gate, late), "it is refused")
        assert time.monotonic() - started_s < 15.0
        assert knock(endpoint, ring.keys["late"]) == REFUSED


def test_a_key_that_another_thread_has_read_of_meanwhile_gets_in(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(ring.folder / keys.GRANTS_FILE)
    ring.add("late", roles=["reader"])
    look = registry.look

    def read_by_another() -> bool:
        look()
        return look()  # nothing has changed since

    monkeypatch.setattr(registry, "look", read_by_another)
    assert registry.lets_in("memory", ring.keys["late"].public.decode())


def test_what_was_granted_to_act_for_ends_with_the_one_it_is_for(ring: KeyRing) -> None:
    agent = ring.keys["knowledge_base_agent"].public.decode()
    with opened(ring) as gate:
        assert gate.identity(agent, "planner").scope == "knowledge_base_agent>planner"
        ring.revoke("planner")
        wait_until(lambda: denied(gate, agent, "planner"), "it is refused", 5.0)
        assert gate.identity(agent).name == "knowledge_base_agent"


def denied(gate: Gate, public: str, on_behalf_of: str | None = None) -> bool:
    try:
        gate.identity(public, on_behalf_of)
    except AccessDenied:
        return True
    return False


@pytest.mark.parametrize("break_it", [b"- name: [", b"", None], ids=["no YAML", "emptied", "removed"])
def test_grants_that_are_not_usable_change_nothing(
    ring: KeyRing, break_it: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = ring.folder / keys.GRANTS_FILE
    before = path.read_bytes()
    with opened(ring) as gate, listening(gate) as (_, endpoint):
        if break_it is None:
            path.unlink()
        else:
            path.write_bytes(break_it + b"\n")
            path.chmod(0o600)
        wait_until(lambda: bool(gate.figures()["grants_problem"]), "it is noticed", 5.0)
        assert knock(endpoint, ring.keys["planner"]) == IN
        assert str(path) in gate.figures()["grants_problem"]
        path.write_bytes(before)
        path.chmod(0o600)
        wait_until(lambda: not gate.figures()["grants_problem"] and bool(gate.grants.by_key), "the next is read", 5.0)


def test_grants_that_could_not_be_read_for_a_moment_are_read_again(
    ring: KeyRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody touches the file again after a key was revoked while no file was left to open it."""
    registry = Registry(ring.folder / keys.GRANTS_FILE)
    ring.revoke("planner")

    def none_left(*_: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Path, "open", none_left)
        assert not registry.look() and not registry.look()
    assert "Too many open files" in registry.problem
    assert registry.look() and not registry.problem
    with pytest.raises(AccessDenied, match="revoked"):
        registry.identity(ring.keys["planner"].public.decode())


@pytest.mark.parametrize("text", ["", "# nobody yet\n", "[]\n"])
def test_there_is_no_gate_with_grants_that_have_none(ring: KeyRing, text: str) -> None:
    path = ring.folder / keys.GRANTS_FILE
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="has no grant in it"), opened(ring):
        pass


def test_what_was_allowed_before_ends_with_the_grants(ring: KeyRing) -> None:
    registry = Registry(ring.folder / keys.GRANTS_FILE)
    ada = ring.add("ada", roles=["writer"], namespaces=["home"])
    public = keys.load_key_file(ada).public.decode()
    authorise(registry.identity(public), "get_memory", "home")
    registry.path.write_text(registry.path.read_text().replace("- home\n", "- work\n"))
    assert registry.look()
    with pytest.raises(AccessDenied, match="'home' is not granted"):
        authorise(registry.identity(public), "get_memory", "home")
    authorise(registry.identity(public), "get_memory", "work")


def test_the_gate_says_who_was_refused(ring: KeyRing) -> None:
    ring.add("gone", roles=["reader"])
    ring.revoke("gone")
    told: list[tuple[str, str, str]] = []
    with opened(ring) as gate:
        gate.on_refused = lambda *what: told.append(what)
        with listening(gate) as (_, endpoint):
            assert knock(endpoint, ring.keys["gone"]) == REFUSED
            assert knock(endpoint, new_key("x", ring.server)) == REFUSED
    assert told == [("memory", "127.0.0.1", "gone"), ("memory", "127.0.0.1", "")], "not of the test at the start"


# -- the test at the start --------------------------------------------------------------------------------------------


def test_a_socket_that_lets_strangers_in_is_found_out(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "apply_server", lambda socket, key, domain: curve(None, True)(socket))
    service = keys.load_key_file(ring.folder / keys.SERVICE_KEY_FILE)
    monkeypatch.setitem(globals(), "SERVICE", service)
    with (
        opened(ring) as gate,
        pytest.raises(CannotStart, match="lets in a caller with an unknown key"),
        listening(gate),
    ):
        pass


def test_a_plaintext_socket_is_found_out(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "apply_server", lambda socket, key, domain: None)
    with opened(ring) as gate, pytest.raises(CannotStart, match="lets in a caller without a key"), listening(gate):
        pass


def test_an_authenticator_that_was_not_asked_is_found_out(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(ring) as gate:
        monkeypatch.setattr(gate._authenticator, "_lets_in", lambda domain, public: False)
        with pytest.raises(CannotStart, match="without asking the authenticator"), listening(gate):
            pass


def test_an_authenticator_that_does_not_run_is_found_out(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_test, "_TIMEOUT_S", 0.5)
    gate = Gate(ring.folder)
    try:
        with pytest.raises(CannotStart, match="is the authenticator running"), listening(gate):
            pass
    finally:
        gate.close()


def test_a_socket_of_another_context_has_no_authenticator(ring: KeyRing, context: zmq.Context[Any]) -> None:
    with (
        opened(ring) as gate,
        context.socket(zmq.ROUTER) as socket,
        pytest.raises(CannotStart, match="another context"),
    ):
        gate.protect(socket, "memory")
    with opened(ring) as gate, gate.context.socket(zmq.ROUTER) as socket, pytest.raises(ConfigError, match="'x'"):
        gate.protect(socket, "x")


# -- an authenticator that ends ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_authenticator_that_ends_is_noticed_and_replaced(ring: KeyRing, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(frames: list[bytes]) -> list[bytes]:
        raise SystemExit

    with opened(ring) as gate, listening(gate) as (_, endpoint):
        monkeypatch.setattr(gate._authenticator, "_answer", end)
        assert knock(endpoint, ring.keys["planner"], timeout_s=0.3) != IN
        wait_until(lambda: gate.figures()["state"] == "unavailable", "it is noticed")
        monkeypatch.undo()
        assert knock(endpoint, ring.keys["planner"], timeout_s=0.3) != IN, "nobody gets in without it"
        gate.look()
        assert gate.figures()["state"] == "ready"
        assert gate.figures()["restarts"] == 1
        assert knock(endpoint, ring.keys["planner"]) == IN
        assert knock(endpoint, new_key("x", ring.server)) == REFUSED


def test_handshakes_go_on_while_the_event_loop_is_busy(ring: KeyRing) -> None:
    """The main thread, where a program's loop runs, sleeps here."""
    results: list[str] = []
    with opened(ring) as gate, listening(gate) as (_, endpoint):
        caller = threading.Thread(target=lambda: results.append(knock(endpoint, ring.keys["planner"])))
        caller.start()
        caller.join(10.0)
    assert results == [IN]


# -- the gate's files -------------------------------------------------------------------------------------------------


def test_loose_files_are_refused(ring: KeyRing) -> None:
    for name, told in ((keys.SERVICE_KEY_FILE, "chmod 600"), (keys.GRANTS_FILE, "chmod go-w")):
        path = ring.folder / name
        path.chmod(0o666)
        with pytest.raises(ConfigError, match=f"{name}.*{told}"):
            Gate(ring.folder)
        path.chmod(0o600)
    ring.folder.chmod(0o777)
    with pytest.raises(ConfigError, match=r"keys can be changed by others.*chmod go-w"):
        Gate(ring.folder)
    ring.folder.chmod(0o755)
    Gate(ring.folder).close()


def test_strangers_cannot_fill_the_log(ring: KeyRing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with opened(ring) as gate:
        told: list[str] = []
        gate.on_refused = lambda domain, address, name: told.append(address)
        for _ in range(300):
            gate._refused("memory", "10.0.0.7", STRANGER.public.decode())
        assert len(told) == 300, "the audit log counts for itself"
    assert 1 <= caplog.text.count("connection_refused") <= 110


def test_the_key_of_an_agent_is_not_the_services(ring: KeyRing) -> None:
    os.replace(ring.folder / "planner.key", ring.folder / keys.SERVICE_KEY_FILE)
    with pytest.raises(ConfigError, match="not the key of the service itself"):
        Gate(ring.folder)


def test_no_secret_is_logged(ring: KeyRing, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with opened(ring) as gate, listening(gate) as (_, endpoint):
        assert knock(endpoint, ring.keys["planner"]) == IN
        assert knock(endpoint, new_key("x", ring.server)) == REFUSED
        shown = repr(gate)
    for secret in ring.secrets():
        assert secret not in caplog.text + shown


def test_a_router_serves_ipv6(ring: KeyRing) -> None:
    with opened(ring) as gate:
        address = f"tcp://[::1]:{free_port()}"
        router = Router(
            address, network=NetworkSettings(), on_message=lambda *_: None, program="x", port_key="x", gate=gate
        )
        try:
            router.bind()
            assert knock(address, ring.keys["planner"]) == IN
        finally:
            router.close()
