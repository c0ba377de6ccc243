"""Router, ActionServer and run_program over real sockets and processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq
import zmq.asyncio

from memory_system.actions import ActionServer
from memory_system.errors import AccessDenied, CannotStart
from memory_system.limits_settings import LimitsSettings
from memory_system.program import connect_address, listen_address, run_program
from memory_system.request_server import RequestServer
from memory_system.router import Router, Sender, split
from memory_system.security import PeerPolicy, policy_for
from memory_system.settings import NetworkSettings, SecuritySettings, Settings
from tests.support.process import PROJECT, Peer, free_port, wait_until
from tests.support.wire import Reply, environment

NETWORK = NetworkSettings()
Scenario = Callable[[], Awaitable[None]]


def run(scenario: Scenario, timeout_s: float = 120.0) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(scenario(), timeout_s)

    asyncio.run(bounded())


def address() -> str:
    return listen_address("127.0.0.1", free_port())


@contextlib.asynccontextmanager
async def dealer(where: str, **options: int) -> AsyncIterator[zmq.asyncio.Socket]:
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.DEALER)
    for name, value in {"LINGER": 0, **options}.items():
        socket.setsockopt(getattr(zmq, name), value)
    socket.connect(where)
    try:
        yield socket
    finally:
        socket.close()
        context.term()


@contextlib.contextmanager
def serving(**arguments: Any) -> Iterator[Router]:
    """A router that echoes unless told otherwise."""
    made: list[Router] = []

    def echo(peer: bytes, route: list[bytes], body: bytes, where: Sender) -> None:
        made[0].send(route, body)

    arguments = {"network": NETWORK, "on_message": echo, "program": "planner", "port_key": "planner.port", **arguments}
    router = Router(arguments.pop("address", address()), **arguments)
    made.append(router)
    try:
        router.bind()
        router.start()
        yield router
    finally:
        router.close()


async def eventually(condition: Callable[[], bool], what: str) -> None:
    await asyncio.to_thread(wait_until, condition, what)


# -- the router -------------------------------------------------------------------------------------------------


def test_bodies_come_back_along_their_route() -> None:
    async def scenario() -> None:
        with serving() as router:
            async with dealer(router.address) as peer:
                for frames in ([b"", b"body"], [b"hop one", b"hop two", b"", b"body"], [b"", b""]):
                    await peer.send_multipart(frames)
                    assert await peer.recv_multipart() == frames
            assert (router.dropped, router.malformed) == (0, 0)
            assert "serving" in repr(router)

    run(scenario)


def test_split_finds_the_one_body() -> None:
    assert split([b"p", b"", b"body"]) == ([b"p", b""], b"body")
    assert split([b"p", b"a", b"", b""]) == ([b"p", b"a", b""], b"")
    for frames in ([b"p"], [b"p", b"body"], [b"p", b""], [b"p", b"", b"a", b"b"], [b"", b"x", b"y"]):
        assert split(frames)[1] is None, frames


def test_every_message_of_many_peers_is_answered() -> None:
    """Small batches and replies in between: what one look leaves behind is seen by the next."""

    async def scenario() -> None:
        with serving(batch=3) as router:
            async with contextlib.AsyncExitStack() as stack:
                peers = [await stack.enter_async_context(dealer(router.address)) for _ in range(5)]
                for number in range(100):
                    for peer in peers:
                        await peer.send_multipart([b"", b"%d" % number])
                for peer in peers:
                    assert [(await peer.recv_multipart())[1] for _ in range(100)] == [b"%d" % n for n in range(100)]

    run(scenario)


def test_what_a_batch_leaves_is_read_without_any_answer() -> None:
    async def scenario() -> None:
        got: list[bytes] = []
        held = True
        with serving(batch=2, is_full=lambda: held, on_message=lambda *message: got.append(message[2])) as router:
            async with dealer(router.address) as peer:
                for number in range(20):
                    await peer.send_multipart([b"", b"%d" % number])
                await asyncio.sleep(0.3)  # all of them wait in the socket, and its descriptor has told so
                held = False
                router.schedule()
                await eventually(lambda: len(got) == 20, "all of them")

    run(scenario)


def test_while_it_is_full_nothing_is_read_and_nothing_is_lost() -> None:
    async def scenario() -> None:
        got: list[bytes] = []
        full = False

        def keep(peer: bytes, route: list[bytes], body: bytes, where: Sender) -> None:
            nonlocal full
            got.append(body)
            full = len(got) == 2

        with serving(on_message=keep, is_full=lambda: full) as router:
            async with dealer(router.address) as peer:
                for number in range(5):
                    await peer.send_multipart([b"", b"%d" % number])
                await eventually(lambda: len(got) == 2, "two messages")
                await asyncio.sleep(0.2)
                assert got == [b"0", b"1"]
                full = False
                router.schedule()
                await eventually(lambda: len(got) == 5, "the rest")

    run(scenario)


def test_a_receiver_that_fails_keeps_none_of_the_others_waiting() -> None:
    async def scenario() -> None:
        got: list[bytes] = []
        failures: list[BaseException] = []

        def fail(peer: bytes, route: list[bytes], body: bytes, where: Sender) -> None:
            got.append(body)
            raise ZeroDivisionError if body != b"again" else zmq.Again

        asyncio.get_running_loop().set_exception_handler(lambda _loop, found: failures.append(found["exception"]))
        with serving(on_message=fail) as router:
            async with dealer(router.address) as peer:
                for body in (b"1", b"again", b"3"):
                    await peer.send_multipart([b"", body])
                await eventually(lambda: len(got) == 3, "all messages")
        assert [type(each) for each in failures] == [ZeroDivisionError, zmq.Again, ZeroDivisionError]

    run(scenario)


def test_other_shapes_are_told_apart() -> None:
    async def scenario() -> None:
        told: list[tuple[list[bytes], Sender]] = []
        nowhere = Sender("", None)
        with serving(on_malformed=lambda route, _peer, where: told.append((route[1:], where))) as router:
            async with dealer(router.address) as peer:
                for frames in ([b"body"], [b"", b"a", b"b"], [b""]):
                    await peer.send_multipart(frames)
                await peer.send_multipart([b"", b"fine"])
                assert await peer.recv_multipart() == [b"", b"fine"]
            assert told == [([], nowhere), ([b""], nowhere), ([b""], nowhere)]
            assert router.malformed == 3

    run(scenario)


def test_who_is_not_let_in_is_never_heard() -> None:
    class Nobody(PeerPolicy):
        def check(self, where: str) -> None:
            raise AccessDenied(f"{where} may not")

    async def scenario() -> None:
        denied: list[tuple[bytes, Sender, str]] = []
        heard: list[bytes] = []

        def note(route: list[bytes], body: bytes, where: Sender, error: AccessDenied) -> None:
            denied.append((body, where, error.message))

        for on_denied in (note, None):
            with serving(
                policy=Nobody(SecuritySettings()),
                on_denied=on_denied,
                on_message=lambda *message: heard.append(message[2]),
            ) as router:
                async with dealer(router.address) as peer:
                    await peer.send_multipart([b"", b"let me in"])
                    await eventually(lambda router=router: router.denied == 1, "a refusal")  # type: ignore[misc]
        assert denied == [(b"let me in", Sender("127.0.0.1", None), "127.0.0.1 may not")]
        assert heard == []

    run(scenario)


def test_where_peers_are_checked_their_address_is_known() -> None:
    async def scenario() -> None:
        heard: list[Sender] = []
        for policy in (None, PeerPolicy(SecuritySettings())):
            with serving(policy=policy, on_message=lambda *message: heard.append(message[3])) as router:
                async with dealer(router.address) as peer:
                    await peer.send_multipart([b"", b"x"])
                    await eventually(lambda want=1 + (policy is not None): len(heard) == want, "it")  # type: ignore[misc]
        assert heard == [Sender("", None), Sender("127.0.0.1", None)]

    run(scenario)
    assert policy_for(NETWORK, SecuritySettings()) is None
    assert policy_for(replace(NETWORK, bind="0.0.0.0"), SecuritySettings()) is not None


def test_sends_to_who_is_gone_or_does_not_read_are_dropped_and_counted() -> None:
    async def scenario() -> None:
        routes: list[list[bytes]] = []
        network = replace(NETWORK, queue_per_client=4)
        with serving(network=network, on_message=lambda *message: routes.append(message[1])) as router:
            assert router.send([b"nobody", b""], b"x") is False
            assert router.dropped == 1
            async with dealer(router.address, RCVHWM=1, RCVBUF=4096) as deaf:
                await deaf.send_multipart([b"", b"x"])
                await eventually(lambda: bool(routes), "the peer")
                outcomes = [router.send(routes[0], b"x" * 200_000) for _ in range(200)]
                assert outcomes[0] is True
                assert False in outcomes  # not always the last one: the transport takes some in between
                assert router.dropped == 1 + outcomes.count(False)

    run(scenario)


def test_a_taken_port_is_named_with_its_setting() -> None:
    async def scenario() -> None:
        with serving() as router, pytest.raises(CannotStart) as taken, serving(address=router.address):
            raise AssertionError
        assert router.address in taken.value.message
        assert "another planner" in taken.value.message and "planner.port" in taken.value.message
        with pytest.raises(CannotStart) as foreign, serving(address="tcp://192.0.2.1:1"):
            raise AssertionError
        assert "network.bind" in foreign.value.message and "planner.port" in foreign.value.message

    run(scenario)


def test_closing_twice_and_before_the_start_does_no_harm_and_a_given_context_stays() -> None:
    async def scenario() -> None:
        context: zmq.Context[Any] = zmq.Context()
        with serving(context=context) as router:
            router.close()
            router.close()
            assert "closed" in repr(router)
        assert not context.closed
        with context.socket(zmq.REQ):
            pass
        context.term()

    run(scenario)


def test_options_are_laid_over_those_of_every_server() -> None:
    async def scenario() -> None:
        with serving(options={zmq.RCVHWM: 7}, network=replace(NETWORK, heartbeat_s=3600.0)) as router:
            assert router._socket.getsockopt(zmq.RCVHWM) == 7
            assert router._socket.getsockopt(zmq.SNDHWM) == NETWORK.queue_per_client
            assert router._socket.getsockopt(zmq.HEARTBEAT_TTL) == 6_553_500

    run(scenario)


# -- a server of actions ----------------------------------------------------------------------------------------


def call(action: str, request_id: str | None = None, **data: Any) -> list[bytes]:
    request = {"v": 1, "action": action, "data": data, "request_id": request_id}
    return [b"", msgpack.packb({name: value for name, value in request.items() if value is not None})]


async def reply_of(peer: zmq.asyncio.Socket) -> Reply:
    empty, body = await peer.recv_multipart()
    assert empty == b""
    reply: Reply = msgpack.unpackb(body)
    return reply


def planner(settings: Settings | None = None, where: str | None = None, **handlers: Any) -> ActionServer:
    def health() -> dict[str, Any]:
        return {"state": "degraded", "plans": 3}

    server = settings or Settings()
    return ActionServer("planner", where or address(), handlers, server, health=health, port_key="planner.port")


def test_actions_over_the_wire() -> None:
    async def add(*, a: int, b: int = 1) -> dict[str, Any]:
        return {"sum": a + b}

    async def scenario() -> None:
        async with planner(add=add) as server, dealer(server.address) as peer:
            await peer.send_multipart(call("add", "r" * 16, a=2))
            assert await reply_of(peer) == {"status": "success", "request_id": "r" * 16, "sum": 3}
            await peer.send_multipart([b"", b'{"action": "add", "data": {"a": "2"}}'])
            assert b'"error_code":"invalid_field"' in (await peer.recv_multipart())[1]
            await peer.send_multipart([b"no body"])
            assert msgpack.unpackb((await peer.recv_multipart())[-1])["error_code"] == "invalid_request"
            await peer.send_multipart(call("health_check"))
            health = await reply_of(peer)
            assert (health["state"], health["plans"], health["pid"]) == ("degraded", 3, os.getpid())
            assert health["requests"] == {"add": 1, "invalid_field": 1, "invalid_request": 1}
            assert (health["in_flight"], health["busy_replies"], health["draining"]) == (0, 0, False)
            assert health["uptime_s"] > 0

    run(scenario)


def test_health_without_figures_of_its_own_and_health_that_fails() -> None:
    async def failing() -> dict[str, Any]:
        raise ZeroDivisionError

    async def late() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"state": "starting"}

    async def scenario() -> None:
        for health, state in ((None, "healthy"), (late, "starting"), (failing, None)):
            server = ActionServer("x", address(), {}, Settings(), health=health)
            async with server, dealer(server.address) as peer:
                await peer.send_multipart(call("health_check"))
                reply = await reply_of(peer)
                assert reply.get("state") == state
                assert reply.get("error_code") == (None if state else "internal_error")

    run(scenario)


def test_one_peer_with_too_much_in_flight_is_told_to_wait_and_others_are_served() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def slow() -> None:
            await gate.wait()

        limits = replace(LimitsSettings(), max_in_flight_per_client=3, busy_retry_after_ms=25)
        server = planner(replace(Settings(), limits=limits), slow=slow, quick=lambda: {})
        async with server, dealer(server.address) as greedy, dealer(server.address) as polite:
            for _ in range(10):
                await greedy.send_multipart(call("slow"))
            refused = [await reply_of(greedy) for _ in range(7)]
            assert {(reply["error_code"], reply["details"]["retry_after_ms"]) for reply in refused} == {("busy", 25)}
            await polite.send_multipart(call("quick"))
            assert (await reply_of(polite))["status"] == "success"
            gate.set()
            assert [(await reply_of(greedy))["status"] for _ in range(3)] == ["success"] * 3
            figures = server.figures()
            assert (figures["in_flight"], figures["busy_replies"]) == (0, 7)
            await greedy.send_multipart(call("slow"))
            assert (await reply_of(greedy))["status"] == "success"

    run(scenario)


def test_a_full_server_reads_on_when_it_has_answered() -> None:
    async def scenario() -> None:
        running = most = 0

        async def work() -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1

        limits = replace(LimitsSettings(), max_in_flight=4, max_in_flight_per_client=4)
        server = planner(replace(Settings(), limits=limits), work=work)
        async with server, contextlib.AsyncExitStack() as stack:
            # One call each: who has more under way than an equal share of half the room gets busy.
            peers = [await stack.enter_async_context(dealer(server.address)) for _ in range(36)]
            for peer in peers:
                await peer.send_multipart(call("work"))
            replies = [await reply_of(peer) for peer in peers]
        assert {reply["status"] for reply in replies} == {"success"}
        assert 1 < most <= 4

    run(scenario)


def test_draining_answers_what_was_accepted_and_refuses_the_rest() -> None:
    async def scenario() -> None:
        gate, started = asyncio.Event(), asyncio.Event()

        async def slow() -> dict[str, Any]:
            started.set()
            await gate.wait()
            return {"done": True}

        limits = replace(LimitsSettings(), shutdown_s=60.0)
        server = planner(replace(Settings(), limits=limits), slow=slow)
        async with dealer(server.address) as peer, server:
            await peer.send_multipart(call("slow", "a" * 16))
            await started.wait()
            draining = asyncio.create_task(server.drain())
            await asyncio.sleep(0)
            await peer.send_multipart(call("slow", "b" * 16))
            refused = await reply_of(peer)
            assert (refused["error_code"], refused["request_id"]) == ("shutting_down", "b" * 16)
            assert refused["retryable"] is True
            assert not draining.done()
            gate.set()
            await draining  # well before shutdown_s
            assert (await reply_of(peer))["done"] is True

    run(scenario)


def test_what_does_not_end_in_time_is_cancelled_and_answered() -> None:
    async def scenario() -> None:
        ended: list[bool] = []

        async def forever() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        limits = replace(LimitsSettings(), shutdown_s=0.1)
        server = planner(replace(Settings(), limits=limits), forever=forever)
        async with dealer(server.address) as peer:
            async with server:
                await peer.send_multipart(call("forever"))
                await eventually(lambda: server.figures()["in_flight"] == 1, "the request")
            assert (await reply_of(peer))["error_code"] == "shutting_down"
            assert ended == [True]

    run(scenario)


def test_a_server_whose_port_is_taken_says_so_and_leaves_nothing() -> None:
    async def scenario() -> None:
        async with planner() as server:
            other = planner(where=server.address)
            with pytest.raises(CannotStart, match=r"another planner.*planner\.port"):
                async with other:
                    raise AssertionError
            assert "closed" in repr(other)

    run(scenario)


def test_requests_wait_from_bind_to_start() -> None:
    async def scenario() -> None:
        class Echo:
            def handle(self, body: bytes, reply: Callable[[bytes], None], peer: bytes, sender: Sender) -> None:
                reply(body)

            def refuse(self, body: bytes, error: Exception) -> bytes:
                raise AssertionError

        server = RequestServer(address(), Settings(), program="x", port_key="x.port")
        try:
            server.bind()
            async with dealer(server.router.address) as peer:
                await peer.send_multipart([b"", b"early"])
                assert not await peer.poll(100)
                server.start(Echo())
                assert await peer.recv_multipart() == [b"", b"early"]
        finally:
            server.close()

    run(scenario)


# -- a program --------------------------------------------------------------------------------------------------

PROGRAM = """
    import asyncio, sys
    from memory_system.actions import ActionServer
    from memory_system.errors import CannotStart
    from memory_system.program import ends, listen_address, run_program

    async def double(*, number: int) -> dict:
        return {"number": 2 * number}

    async def serve(settings):
        end = ends(asyncio.get_running_loop())
        address = listen_address(settings.network.bind, settings.network.port)
        async with ActionServer("doubler", address, {"double": double}, settings, port_key="network.port"):
            await end.wait()
        return 0

    sys.exit(run_program("doubler", "Doubles numbers.", serve))
"""


@contextlib.contextmanager
def doubler(tmp_path: Path, **overrides: Any) -> Iterator[subprocess.Popen[str]]:
    program = tmp_path / "doubler.py"
    program.write_text(textwrap.dedent(PROGRAM))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEMORY_")}
    environ = {**kept, "MEMORY_CONFIG": os.devnull, "PYTHONPATH": str(PROJECT), **environment(tmp_path, overrides)}
    process = subprocess.Popen([sys.executable, str(program)], env=environ, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_program_of_twenty_lines_serves_and_ends(tmp_path: Path, number: str) -> None:
    port = free_port()
    context: zmq.Context[Any] = zmq.Context()
    try:
        with doubler(tmp_path, network__port=port) as process, Peer(context, f"tcp://127.0.0.1:{port}") as peer:
            peer.send(call("double", number=21)[1])
            assert msgpack.unpackb(peer.receive(20.0))["number"] == 42
            process.send_signal(getattr(signal, number))
            assert process.wait(30) == 0
            assert process.stderr is not None and process.stderr.read() == ""
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize(
    ("overrides", "status", "part"),
    [
        ({"network__prot": 1}, 2, "NETWORK__PROT"),
        ({"network__bind": "0.0.0.0"}, 2, "security.allow_insecure"),
        ({"log__dir": "/proc/none"}, 2, "log.dir"),
        ({"network__port": "taken"}, 1, "another doubler"),
    ],
)
def test_what_a_program_cannot_start_with_is_one_line(
    tmp_path: Path, overrides: dict[str, Any], status: int, part: str
) -> None:
    with contextlib.ExitStack() as stack:
        if overrides.get("network__port") == "taken":
            taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            overrides = {"network__port": taken.getsockname()[1]}
        process = stack.enter_context(doubler(tmp_path, **{"network__port": free_port(), **overrides}))
        _, errors = process.communicate(timeout=90)
        assert process.returncode == status, errors
        (line,) = errors.splitlines()
        assert line.startswith("doubler: ") and part in line


def test_an_unknown_option_and_help_are_the_parsers_business(capsys: pytest.CaptureFixture[str]) -> None:
    async def serve(settings: Settings) -> int:
        raise AssertionError

    for arguments, status in ((["--confg", "x"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as ended:
            run_program("planner", "Plans journeys.", serve, arguments)
        assert ended.value.code == status
    assert "Plans journeys." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bind", "listen", "connect"),
    [
        ("127.0.0.1", "tcp://127.0.0.1:1", "tcp://127.0.0.1:1"),
        ("localhost", "tcp://127.0.0.1:1", "tcp://127.0.0.1:1"),
        ("0.0.0.0", "tcp://0.0.0.0:1", "tcp://127.0.0.1:1"),
        ("10.0.0.7", "tcp://10.0.0.7:1", "tcp://10.0.0.7:1"),
        ("::", "tcp://[::]:1", "tcp://[::1]:1"),
        ("[::]", "tcp://[::]:1", "tcp://[::1]:1"),
        ("::1", "tcp://[::1]:1", "tcp://[::1]:1"),
        ("fd00::7", "tcp://[fd00::7]:1", "tcp://[fd00::7]:1"),
    ],
)
def test_addresses(bind: str, listen: str, connect: str) -> None:
    assert (listen_address(bind, 1), connect_address(bind, 1)) == (listen, connect)


def test_two_threads_may_each_serve_on_their_own_loop() -> None:
    outcomes: Counter[str] = Counter()

    async def scenario() -> None:
        async with planner(quick=lambda: {}) as server, dealer(server.address) as peer:
            for _ in range(50):
                await peer.send_multipart(call("quick"))
                outcomes[(await reply_of(peer))["status"]] += 1

    threads = [threading.Thread(target=run, args=(scenario,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == {"success": 100}
