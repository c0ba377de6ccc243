"""Hostile input, floods, silence, and Redis that fails: the long versions of tests/acceptance/test_trust_*.py."""

from __future__ import annotations

import contextlib
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator

from memory_client import MemoryClient
from tests.support import hostile
from tests.support.agents import Agent, running_agent
from tests.support.bulk import bulk_clients
from tests.support.flood import flood
from tests.support.mutations import Mutations, PoliteCaller, corpus_of, described_requests, send_all
from tests.support.poison import POISONS
from tests.support.polite import Polite
from tests.support.process import Orchestrator, running_orchestrator, wait_until
from tests.support.valkey import ValkeyServer, running_valkey
from tests.support.watchers import watching
from tests.torture import Run, torture

FRAMES = int(os.environ.get("TORTURE_FRAMES", "1000000"))
BATCH = 5_000
AGENTS = ("knowledge_base", "session_memory", "context_manager")
# Of the mutated frames, how many the agents get each for one that the memory service gets.
AGENT_SHARE = 0.05
# A store that has taken in hundreds of thousands of frames is checked for minutes (run_integrity_check), and the check
# may be the last to be answered.
RUN_WITHIN_S = 900.0
SERVICE_GROWTH_MB = 400.0
AGENT_GROWTH_MB = 200.0
POLITE_FACTOR = 10.0
# limits.connection_memory_mb, and what may come on top of it while the guard is kept from looking.
BOUND_MB = 512.0
OVER_MB = 256.0
BULK_CLIENTS = 4
BULK_MIB = 6.0


# -- frames -----------------------------------------------------------------------------------------------------------


def agents_corpus(agent: Agent, orchestrator: Orchestrator) -> list[dict[str, object]]:
    session_id = orchestrator.ask("create_session", user_id="ada")["session_id"]
    memory_id = orchestrator.ask("add_memory", content="of the store")["memory_id"]
    ids = {"session_id": session_id, "memory_id": memory_id, "fact_id": memory_id, "related_id": memory_id}
    return described_requests(agent.ask("describe")["actions"], **ids)


def resident_mb(pid: int) -> float:
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@torture("hostile", "mutated frames", share=4.0)
def mutated_frames(run: Run) -> str:
    """At least FRAMES of them, to the memory service and to the agents; each is answered once."""
    outcomes: Counter[str] = Counter()
    with contextlib.ExitStack() as stack:
        orchestrator = stack.enter_context(running_orchestrator(run.folder))
        agents = [stack.enter_context(running_agent(run.folder, name, orchestrator.address)) for name in AGENTS]
        streams = [(orchestrator.peer(dealer=True), iter(Mutations(run.seed, corpus_of(orchestrator))), BATCH)]
        few = int(BATCH * AGENT_SHARE)
        for number, agent in enumerate(agents):
            corpus = agents_corpus(agent, orchestrator)
            streams.append((agent.peer(dealer=True), iter(Mutations(run.seed + number, corpus)), few))
        for peer, _, _ in streams:
            stack.callback(peer.socket.close, 0)
        pids = [orchestrator.pid, *(agent.pid for agent in agents)]
        polite = PoliteCaller(orchestrator.address)
        polite.round()
        with polite:
            for round_number in range(10**9):
                if round_number == 1:
                    before_mb = [resident_mb(pid) for pid in pids]
                if not run.goes_on(outcomes.total(), FRAMES):
                    break
                for peer, messages, count in streams:
                    outcomes += send_all(peer.socket, messages, count, run.seed, RUN_WITHIN_S)
                if round_number % 20 == 0:
                    run.say(f"{outcomes.total()} frames, {polite.rounds} rounds of a polite client")
        grown_mb = [resident_mb(pid) - before for pid, before in zip(pids, before_mb, strict=True)]
        assert polite.failure is None, repr(polite.failure)
        assert outcomes["internal_error"] == 0, outcomes
        assert [orchestrator.ask("health_check")["pid"], *(each.ask("health_check")["pid"] for each in agents)] == pids
        assert grown_mb[0] < SERVICE_GROWTH_MB and max(grown_mb[1:]) < AGENT_GROWTH_MB, grown_mb
    good = 100 * outcomes["success"] / outcomes.total()
    grown = ", ".join(f"{each:+.0f}" for each in grown_mb)
    return f"{outcomes.total():,} frames, each answered once ({good:.0f} % success); RSS {grown} MiB; polite: 0 failed"


@torture("hostile", "bytes that are no protocol")
def raw_bytes(run: Run) -> str:
    connections = written = 0
    with running_orchestrator(run.folder) as orchestrator, PoliteCaller(orchestrator.address) as polite:
        before_mb = orchestrator.resident_mb()
        while run.goes_on(connections, 5_000):
            written += hostile.throw(orchestrator.port, run.chance, 200)
            connections += 200
        assert polite.failure is None, repr(polite.failure)
        wait_until(lambda: orchestrator.ask("health_check")["open_files"] < 100, "all are gone", 30)
        grown_mb = orchestrator.resident_mb() - before_mb
    assert grown_mb < 100, grown_mb
    return f"{connections:,} connections, {written / 1e6:.1f} MB; RSS {grown_mb:+.0f} MiB; polite: 0 failed"


@torture("hostile", "messages without an end")
def endless_messages(run: Run) -> str:
    told = []
    for part in (b"", b"x" * 1000, b"x" * 1_000_000):
        folder = run.folder / str(len(part))
        folder.mkdir()
        with running_orchestrator(folder) as orchestrator, Polite(orchestrator) as polite:
            before_mb = largest_mb = orchestrator.resident_mb()
            ends_s = time.monotonic() + max(10.0, run.budget_s / 3)
            with hostile.Attackers(orchestrator.port, part, 16) as attackers:
                while time.monotonic() < ends_s:
                    polite.round()
                    largest_mb = max(largest_mb, orchestrator.resident_mb())
            assert attackers.cut > 0
            assert largest_mb - before_mb < BOUND_MB + OVER_MB, largest_mb - before_mb
            told.append(f"{len(part)} B: at most {largest_mb - before_mb:+.0f} MiB, {attackers.cut} cut")
    return "; ".join(told)


@torture("hostile", "large requests beside messages without an end")
def bulk_beside_endless(run: Run) -> str:
    told = []
    for part in (b"", b"x" * 1000, b"x" * 1_000_000):
        folder = run.folder / str(len(part))
        folder.mkdir()
        with running_orchestrator(folder, embedding__provider="off") as orchestrator:
            largest_mb = before_mb = orchestrator.resident_mb()
            ends_s = time.monotonic() + max(15.0, run.budget_s / 3)
            with bulk_clients(orchestrator, BULK_CLIENTS, BULK_MIB) as clients:
                wait_until(lambda: all(each.done for each in clients), "each has sent a request that ended", 60)
                with hostile.Attackers(orchestrator.port, part, 16) as attackers:
                    while time.monotonic() < ends_s:
                        largest_mb = max(largest_mb, orchestrator.resident_mb())
                        time.sleep(0.02)
        assert attackers.cut > 0
        assert not any(each.cut for each in clients), [each.cut for each in clients]
        told.append(
            f"{len(part)} B: at most {largest_mb - before_mb:+.0f} MiB, {attackers.cut} attackers cut, 0 honest ones "
            f"in {sum(each.done for each in clients)} requests of {BULK_MIB:.0f} MiB"
        )
    return "; ".join(told)


# -- floods and silence -----------------------------------------------------------------------------------------------


def polite_ms(orchestrator: Orchestrator, seconds_s: float, least: int = 200) -> list[float]:
    """How long each call of a polite client takes: it adds, gets and searches."""
    took_ms: list[float] = []
    ends_s = time.monotonic() + seconds_s
    with MemoryClient(orchestrator.address, namespace="polite", timeout_ms=60_000, raise_on_error=True) as client:
        memory_id = client.add_memory("the first")["memory_id"]
        while time.monotonic() < ends_s or len(took_ms) < least:
            for call in (
                lambda: client.add_memory("polite words"),
                lambda: client.get_memory(memory_id, touch=False),
                lambda: client.search_memory("polite", limit=5, touch=False),
            ):
                began_s = time.monotonic()
                call()
                took_ms.append((time.monotonic() - began_s) * 1000)
            time.sleep(0.005)
    return took_ms


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


@torture("hostile", "flood by 16 clients that do not read")
def flooded(run: Run) -> str:
    with running_orchestrator(run.folder) as orchestrator:
        idle = polite_ms(orchestrator, max(5.0, run.budget_s / 3))
        before_mb = orchestrator.resident_mb()
        with flood(orchestrator.address):
            wait_until(lambda: orchestrator.ask("health_check", timeout_s=30)["busy_replies"] > 0, "busy is said", 30)
            busy = polite_ms(orchestrator, max(10.0, run.budget_s * 2 / 3))
            replies = orchestrator.ask("health_check", timeout_s=30)
        grown_mb = orchestrator.resident_mb() - before_mb
    factor = p99(busy) / p99(idle)
    told = (
        f"polite p50/p99 {statistics.median(idle):.1f}/{p99(idle):.1f} ms idle, "
        f"{statistics.median(busy):.1f}/{p99(busy):.1f} ms flooded ({factor:.1f}x); {replies['busy_replies']:,} busy, "
        f"{replies['dropped_replies']:,} replies dropped; RSS {grown_mb:+.0f} MiB"
    )
    assert factor <= POLITE_FACTOR, told
    assert grown_mb < 1024, told
    return told


@torture("hostile", "5,000 silent connections")
def silent_connections(run: Run) -> str:
    with running_orchestrator(run.folder) as orchestrator:
        idle = polite_ms(orchestrator, 3.0)
        before_mb = orchestrator.resident_mb()
        with hostile.silent(orchestrator.port, 5_000) as socks:
            count = len(socks)
            crowded = polite_ms(orchestrator, 6.0)
            grown_mb = orchestrator.resident_mb() - before_mb
        wait_until(lambda: orchestrator.ask("health_check")["open_files"] < 100, "their files are closed", 30)
    assert count == 5_000, count
    return (
        f"{count:,} connections, {grown_mb:+.0f} MiB; polite p99 {p99(idle):.1f} ms before, {p99(crowded):.1f} ms "
        "meanwhile; all closed after the handshake's time"
    )


@torture("hostile", "no files left")
def no_files_left(run: Run) -> str:
    with running_orchestrator(run.folder, start=False) as orchestrator:
        orchestrator.files = 200
        orchestrator.start()
        idle = polite_ms(orchestrator, 2.0)
        with MemoryClient(orchestrator.address, namespace="polite", timeout_ms=60_000, raise_on_error=True) as client:
            client.add_memory("inside before the crowd came")
            calls = 0
            while run.goes_on(calls, 300):
                with hostile.silent(orchestrator.port, 400):
                    for _ in range(50):
                        client.add_memory(f"number {calls}")
                        client.search_memory("number", limit=3)
                        calls += 2
            wait_until(lambda: orchestrator.ask("health_check", timeout_s=5)["open_files"] < 100, "recovery", 30)
        after = polite_ms(orchestrator, 2.0)
    return (
        f"{calls:,} calls of a client that was in, 0 failed; new ones p99 {p99(idle):.1f} ms before, "
        f"{p99(after):.1f} ms after"
    )


# -- Redis ------------------------------------------------------------------------------------------------------------


def killed(redis: ValkeyServer, rng: random.Random) -> None:
    redis.kill()
    time.sleep(rng.uniform(0.2, 2.0))
    redis.start()


def frozen(redis: ValkeyServer, rng: random.Random) -> None:
    redis.freeze()
    try:
        time.sleep(rng.uniform(0.2, 2.0))
    finally:
        redis.thaw()


def flushed(redis: ValkeyServer, rng: random.Random) -> None:
    for _ in range(rng.randrange(1, 20)):
        redis.command("FLUSHALL")
        time.sleep(0.05)


def poisoned(redis: ValkeyServer, rng: random.Random) -> None:
    for _ in range(50):
        keys = redis.keys()
        if keys:
            POISONS[rng.choice(list(POISONS))](redis, rng.choice(keys), rng)


def nothing(_redis: ValkeyServer, rng: random.Random) -> None:
    time.sleep(rng.uniform(0.5, 2.0))


FAULTS = (nothing, killed, frozen, flushed, poisoned)


@torture("redis", "killed, frozen, flushed, poisoned")
def redis_faults(run: Run) -> str:
    took_ms: dict[str, list[float]] = {fault.__name__: [] for fault in FAULTS}
    counts: Counter[str] = Counter()
    with (
        running_valkey(run.folder / "valkey") as redis,
        running_orchestrator(run.folder, redis__url=redis.url, redis__reset_timeout_s=0.5) as orchestrator,
        watching(orchestrator) as watchers,
    ):
        while run.goes_on(counts.total(), 25):
            fault = run.chance.choice(FAULTS)
            before = [len(watcher.took_s) for watcher in watchers]
            fault(redis, run.chance)
            counts[fault.__name__] += 1
            for watcher, begin in zip(watchers, before, strict=True):
                took_ms[fault.__name__] += [each * 1000 for each in watcher.took_s[begin:]]
            assert [watcher.problems for watcher in watchers] == [[], []]
        rounds = sum(watcher.rounds for watcher in watchers)
    told = ", ".join(
        f"{name} {counts[name]}x p99 {p99(values):.0f} max {max(values):.0f} ms" for name, values in timed(took_ms)
    )
    return f"{rounds:,} changes found at once, 0 wrong, 0 failed; {told}"


def timed(took_ms: dict[str, list[float]]) -> Iterator[tuple[str, list[float]]]:
    return ((name, values) for name, values in took_ms.items() if len(values) > 1)
