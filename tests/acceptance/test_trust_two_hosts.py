"""Two hosts and a cable that is pulled: noticed within the heartbeat budget, and afterwards nothing is lost or left."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.netns import why_not
from tests.support.two_hosts import DETECTED_S, HEARTBEAT_S, cable_pulled

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(120)]

CLIENTS = 8


@pytest.fixture(scope="module", autouse=True)
def _two_hosts() -> None:
    if reason := why_not():
        pytest.skip(reason)


def test_a_pulled_cable_is_noticed_and_costs_nothing_but_time(tmp_path: Path) -> None:
    seen = cable_pulled(tmp_path, clients=CLIENTS, away_s=6.0, watched_s=5.0, embedding__provider="off")
    print(seen)  # noqa: T201  pytest shows it when the test fails
    # A look at the timers may be late on a busy machine.
    assert HEARTBEAT_S <= seen.noticed_s < DETECTED_S + 15.0
    assert len(seen.back_s) == CLIENTS
    assert max(seen.back_s) < 10.0
    assert seen.wrong == {}
    assert seen.errors  # or else the cable was never out
    assert seen.after.sockets <= seen.before.sockets + 4
    for before, after in zip(seen.clients_before, seen.clients_after, strict=True):
        assert after.files <= before.files + 8
