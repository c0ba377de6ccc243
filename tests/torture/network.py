"""Point 3: a network that fails, a cable that is pulled, and a service that is away from its clients."""

from __future__ import annotations

from dataclasses import replace

from tests.support import bad_network
from tests.support.bad_network import CLIENTS, SLACK, Aftermath, write_through
from tests.support.crash import Findings
from tests.support.lossy_proxy import FAULTS, schedule
from tests.support.netns import why_not
from tests.support.outage import Outage, outage
from tests.support.two_hosts import DETECTED_S, cable_pulled
from tests.torture import Run, torture

BACK_S = 10.0
MOST = 2.0
LATE_S = 3.0
KINDS = ("threads", "async", "threads", "async")


@torture("network", "drop, mute, delay, drip and reset through a proxy", share=2.0)
def every_fault(run: Run) -> str:
    rounds: list[Aftermath] = []
    while run.goes_on(len(rounds), 1):
        seed = run.chance.randrange(2**32)
        folder = run.folder / str(len(rounds))
        folder.mkdir()
        faults = schedule(bad_network.chance_of(seed), 2, after_s=(0.2, 1.0), lasts_s=(0.5, 6.0))
        left = write_through(faults, folder, seed)
        run.say(str(left))
        assert left.findings == Findings(), left.findings
        assert left.left_open == ""
        rounds.append(left)
    faults, writes = len(rounds) * 2 * len(FAULTS), sum(each.acknowledged for each in rounds)
    most = max(each.most_sockets for each in rounds)
    return (
        f"{faults} faults, {writes} writes of {CLIENTS} clients acknowledged, 0 lost, 0 twice; "
        f"sockets of the service at most {most}, afterwards as before; "
        f"files of the clients {rounds[0].own_before.files} before, {rounds[-1].own_after.files} after"
    )


@torture("network", "the same without idempotency (must find writes done twice)", share=0.5)
def negative_control(run: Run) -> str:
    faults = schedule(bad_network.chance_of(run.seed), 3, after_s=(0.2, 0.4), lasts_s=(0.3, 0.6))
    faults = [replace(fault, kind="mute") for fault in faults]
    left = write_through(faults, run.folder, run.seed, idempotency=False)
    assert left.findings.twice != []
    return f"{len(left.findings.twice)} writes done twice, found by the same check"


@torture("network", "two hosts, cable pulled for 20 s", share=0.5)
def two_hosts(run: Run) -> str:
    if reason := why_not():
        return f"skipped: {reason}"
    seen = cable_pulled(run.folder, clients=20, away_s=20.0)
    assert seen.noticed_s <= DETECTED_S + LATE_S, seen
    assert max(seen.back_s) <= BACK_S, seen
    assert seen.wrong == {}, seen.wrong
    assert seen.after.sockets <= seen.before.sockets + SLACK, seen
    return str(seen)


@torture("network", "500 clients, service away for 30 s", share=0.5)
def thundering_return(run: Run) -> str:
    return _calm(outage(run.folder, clients=500, kinds=KINDS, away_s=30.0))


@torture("network", "500 clients, service frozen for 30 s", share=0.5)
def thaw(run: Run) -> str:
    return _calm(outage(run.folder, clients=500, kinds=KINDS, away_s=30.0, frozen=True))


@torture("network", "500 clients, service away for 12 s: every client waits with a call", share=0.5)
def everybody_waits(run: Run) -> str:
    return _calm(outage(run.folder, clients=500, kinds=KINDS, away_s=12.0))


@torture("network", "200 clients without breaker and backoff (must be a storm)", share=0.5)
def naive_clients(run: Run) -> str:
    seen = outage(run.folder, clients=200, kinds=("naive",), away_s=30.0, watched_s=5.0)
    assert seen.storm > MOST, seen
    return f"{seen.storm:.1f}x the normal rate, seen by the same check"


def _calm(seen: Outage) -> str:
    assert max(seen.back_s) <= BACK_S, seen
    assert seen.storm <= MOST, seen
    assert seen.wrong == {}, seen.wrong
    assert sum(each.files for each in seen.after) <= sum(each.files for each in seen.before) + seen.clients // 10, seen
    return str(seen)
