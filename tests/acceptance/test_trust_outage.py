"""A service that goes away and comes back: its clients do not storm it, are all back soon, and lose nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.crowd import crowd
from tests.support.footprint import footprint
from tests.support.outage import outage
from tests.support.process import running_orchestrator
from tests.support.soak import SLACK, soak

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(180)]

CLIENTS = 60
AWAY_S = 4.0
PERIOD_S = 0.5
BACK_S = 10.0
WATCHED_S = 7.0
MOST = 2.0


def test_clients_of_a_service_that_was_away_come_back_without_a_storm(tmp_path: Path) -> None:
    seen = outage(
        tmp_path, clients=CLIENTS, kinds=("threads", "async"), away_s=AWAY_S, period_s=PERIOD_S, watched_s=WATCHED_S
    )
    print(seen)  # noqa: T201  pytest shows it when the test fails
    assert len(seen.back_s) == CLIENTS
    assert max(seen.back_s) < BACK_S
    assert seen.storm <= MOST
    assert seen.wrong == {}
    assert seen.errors  # or else nobody noticed
    for before, after in zip(seen.before, seen.after, strict=True):
        assert after.files <= before.files + 8
        assert after.threads <= before.threads + 8


def test_clients_that_know_nothing_of_outages_are_a_storm(tmp_path: Path) -> None:
    """The negative control: were no storm found here, the test above would prove nothing."""
    seen = outage(tmp_path, clients=CLIENTS, kinds=("naive",), away_s=AWAY_S, period_s=PERIOD_S, watched_s=2.0)
    assert seen.storm > MOST


def test_many_connected_clients_are_all_answered(tmp_path: Path) -> None:
    """The long version has ten thousand."""
    clients = 1_000
    with running_orchestrator(tmp_path, embedding__provider="off") as orchestrator:
        before = footprint(orchestrator.pid)
        with crowd(orchestrator.address, clients=clients, kinds=("sockets", "sockets"), period_s=10.0) as members:
            among = footprint(orchestrator.pid)
            assert among.sockets >= clients
            assert orchestrator.ask("add_memory", content="among many")["status"] == "success"
        assert [len(each) for each in members.successes] == [2] * clients
    assert (among.resident_kib - before.resident_kib) / clients < 100.0


def test_what_the_service_holds_stays_as_it_is_under_a_mixed_load_with_faults(tmp_path: Path) -> None:
    """The long version lasts for minutes and looks at memory too."""
    seen = soak(tmp_path, 7, warm_up_s=5.0, lasts_s=10.0, every_s=0.2, quiet_s=3.0)
    print(seen)  # noqa: T201  pytest shows it when the test fails
    assert seen.outcomes["success"] > 200
    assert seen.faults > 0
    for held in (lambda each: each.held.files, lambda each: each.held.threads):
        assert seen.typical(held, late=True) <= seen.typical(held, late=False) + SLACK
    assert max(each.wal_kib for each in seen.samples) < 64 * 1024
