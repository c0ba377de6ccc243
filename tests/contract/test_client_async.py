"""AsyncMemoryClient: many calls on one connection, on asyncio and on uvloop."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
import uvloop

from memory_client import AsyncMemoryClient
from tests.contract.fake_orchestrator import FakeOrchestrator, busy, drop, ok

LOOPS = pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])


@LOOPS
def test_calls_made_together_overlap(run: Any, server: FakeOrchestrator) -> None:
    server.default = ok(delay_s=0.2)

    async def main() -> list[dict[str, Any]]:
        async with AsyncMemoryClient(server.endpoint, timeout_ms=20_000) as client:
            return list(await asyncio.gather(*(client.get_memory(f"m{number}") for number in range(100))))

    started_s = time.monotonic()
    replies = run(main())
    assert all(reply["status"] == "success" for reply in replies)
    assert time.monotonic() - started_s < 10.0  # one by one: 20 s
    assert 16 <= server.most_waiting <= 32
    assert set(server.bodies_by_id.values()) == {1}


@LOOPS
def test_replies_out_of_order_reach_their_calls(run: Any, server: FakeOrchestrator) -> None:
    def reverse(request: dict[str, Any]) -> Any:
        number = int(request["data"]["memory_id"])
        return ok(delay_s=(20 - number) * 0.01, number=number)(request)

    server.default = reverse

    async def main() -> list[int]:
        async with AsyncMemoryClient(server.endpoint) as client:
            replies = await asyncio.gather(*(client.get_memory(str(number)) for number in range(20)))
            return [reply["number"] for reply in replies]

    assert run(main()) == list(range(20))


@LOOPS
def test_cancelled_calls_disturb_nobody(run: Any, server: FakeOrchestrator) -> None:
    server.default = lambda request: ok(delay_s=0.05, echo=request["data"]["memory_id"])(request)

    async def main() -> None:
        async with AsyncMemoryClient(server.endpoint, timeout_ms=20_000) as client:
            for turn in range(20):
                tasks = [asyncio.create_task(client.get_memory(f"{turn}/{number}")) for number in range(20)]
                await asyncio.sleep(0.01 * (turn % 7))
                for task in tasks[::2]:
                    task.cancel()
                done = await asyncio.gather(*tasks, return_exceptions=True)
                for number in range(1, 20, 2):
                    reply = done[number]
                    assert isinstance(reply, dict)
                    assert reply["echo"] == f"{turn}/{number}"
            assert client.get_circuit_breaker_status()["state"] == "closed"

    run(main())
    assert set(server.bodies_by_id.values()) == {1}


@LOOPS
def test_all_calls_in_flight_survive_a_restart(run: Any, server: FakeOrchestrator) -> None:
    server.script.extend([drop] * 30)

    async def main() -> list[dict[str, Any]]:
        async with AsyncMemoryClient(server.endpoint, timeout_ms=20_000) as client:
            calls = [asyncio.create_task(client.add_memory(str(number))) for number in range(30)]
            await asyncio.to_thread(server.wait_for, 30)
            await asyncio.to_thread(server.die)
            await asyncio.sleep(0.2)
            await asyncio.to_thread(server.come_back)
            return list(await asyncio.gather(*calls))

    started_s = time.monotonic()
    assert all(reply["status"] == "success" for reply in run(main()))
    assert time.monotonic() - started_s < 8.0
    assert set(server.bodies_by_id.values()) == {2}


def test_close_ends_calls_in_flight(server: FakeOrchestrator) -> None:
    server.default = drop

    async def main() -> dict[str, Any]:
        client = AsyncMemoryClient(server.endpoint, timeout_ms=20_000)
        call = asyncio.create_task(client.add_memory("x"))
        await asyncio.to_thread(server.wait_for, 1)
        await client.close()
        return await call

    reply = asyncio.run(main())
    assert (reply["error_code"], reply["outcome"]) == ("client_closed", "unknown")


def test_close_ends_a_call_that_waits_to_be_repeated(server: FakeOrchestrator) -> None:
    server.default = busy(30_000.0)

    async def main() -> dict[str, Any]:
        client = AsyncMemoryClient(server.endpoint, timeout_ms=60_000)
        call = asyncio.create_task(client.add_memory("x"))
        await asyncio.to_thread(server.wait_for, 1)
        await asyncio.sleep(0.1)  # the answer arrives and the pause begins
        await client.close()
        return await asyncio.wait_for(call, 10.0)

    assert asyncio.run(main())["error_code"] == "client_closed"


def test_no_free_place_is_not_sent(server: FakeOrchestrator) -> None:
    server.default = drop

    async def main() -> list[dict[str, Any]]:
        async with AsyncMemoryClient(server.endpoint, timeout_ms=20_000) as client:
            others = [asyncio.create_task(client.stats()) for _ in range(32)]
            await asyncio.to_thread(server.wait_for, 32)
            reply = await client.call("stats", deadline_ms=100)
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            server.default = ok()
            return [reply, await client.stats()]

    refused, served = asyncio.run(main())
    assert (refused["error_code"], refused["outcome"]) == ("timeout", "not_sent")
    assert served["status"] == "success"


def test_one_client_on_two_loops_in_turn(server: FakeOrchestrator) -> None:
    client = AsyncMemoryClient(server.endpoint)
    assert asyncio.run(client.stats())["status"] == "success"
    assert asyncio.run(client.stats())["status"] == "success"
    asyncio.run(client.close())


def test_a_request_id_in_flight_is_not_sent_again(server: FakeOrchestrator) -> None:
    server.default = ok(delay_s=0.2)

    async def main() -> list[dict[str, Any]]:
        async with AsyncMemoryClient(server.endpoint) as client:
            return list(await asyncio.gather(*(client.add_memory(text, request_id="k" * 16) for text in ("x", "y"))))

    first, second = asyncio.run(main())
    assert first["status"] == "success"
    assert (second["error_code"], second["outcome"]) == ("invalid_request", "not_sent")
