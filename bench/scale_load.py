"""What the clients of the scale benchmark do: wait for a service, search in a closed loop, add, have snapshots made."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any, Final

from servers import Asker, Server, ServerFailure

READY_S: Final = 900.0


def ready(server: Server, question: str | None) -> dict[str, Any]:
    """Wait until every search is answered in full; the health then."""
    end_s = time.monotonic() + READY_S
    with Asker(server.endpoint) as asker:
        while time.monotonic() < end_s:
            health = asker.ask("health_check", {})
            if {health["readiness"][part] for part in ("search_index", "embedding")} == {"ready"}:
                if question is None:
                    return health
                reply = asker.ask("semantic_search", {"query": question, "touch": False})
                if not reply["degraded"] and reply["count"]:
                    return health
            server.check_alive()
            time.sleep(0.01)
    raise ServerFailure(f"{server.name} is not ready after {READY_S:.0f} s")


def wait_quiet(server: Server) -> None:
    """Until the service does nothing by itself any more: its processor time stands still."""
    before = server.cpu_s()
    while True:
        time.sleep(1.0)
        now = server.cpu_s()
        if before is None or now is None or now - before < 0.1:
            return
        before = now


def closed_loop(server: Server, clients: int, requests: list[Any], ends_s: float | None = None) -> list[float]:
    """Each client asks when it has been answered; the times in ms."""
    numbers = count()
    lock = threading.Lock()

    def client(_: int) -> list[float]:
        times = []
        with Asker(server.endpoint) as asker:
            asker.ask("health_check", {})
            while ends_s is None or time.monotonic() < ends_s:
                with lock:
                    number = next(numbers)
                if number >= len(requests):
                    break
                began_s = time.perf_counter()
                reply = asker.ask("semantic_search", requests[number])
                times.append(1000.0 * (time.perf_counter() - began_s))
                if reply["degraded"]:
                    raise ServerFailure(f"a search is degraded: {reply['degraded_reason']}")
        return times

    with ThreadPoolExecutor(clients) as pool:
        return [one for times in pool.map(client, range(clients)) for one in times]


def add_until(server: Server, ends_s: float, name: str) -> None:
    with Asker(server.endpoint) as asker:
        for number in count():
            if time.monotonic() >= ends_s:
                return
            texts = [f"Added beside the searches, {name} {number} {place}." for place in range(20)]
            asker.ask("batch_add_memories", {"memories": [{"content": text} for text in texts]})
            time.sleep(0.05)


def snapshots_until(server: Server, ends_s: float) -> int:
    """Have snapshots made, one after the other; how many."""
    with Asker(server.endpoint) as asker:
        for number in count():
            if time.monotonic() >= ends_s:
                return number
            asker.ask("run_snapshot", {})
    return 0
