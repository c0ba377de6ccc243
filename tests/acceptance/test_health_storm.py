"""100,000 errors in a few seconds: the bus stays usable and the history says how many there were."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
import zmq

from memory_system.error_bus import ErrorReporter
from memory_system.events import ERROR_TOPIC, HEARTBEAT_TOPIC
from memory_system.health.folding import VARIOUS
from tests.support.bus import Subscriber
from tests.support.mesh import PROGRAMS, Mesh, running_mesh, tell
from tests.support.process import PROJECT, wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(300)]

ERRORS = 100_000
MESSAGES_PER_S = 200  # error_bus.broadcasts_per_s
HEARTBEAT_S = 1.0

# Each runs in a process of its own, as an agent does, and says on stdout what became of its events.
REPORTER = """
import sys
from memory_system.error_bus import ErrorReporter
endpoint, agent, errors, kinds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
reporter = ErrorReporter(endpoint, agent, queue_events=errors)
for number in range(errors):
    reporter.report(f"storm_{number % kinds}", f"error {number}", details={"number": number})
reporter.close(60.0)
"""
PUBLISHER = """
import json, sys, time, zmq
endpoint, agent, errors = sys.argv[1], sys.argv[2], int(sys.argv[3])
with zmq.Context() as context, context.socket(zmq.PUB) as sock:
    sock.sndhwm = 0
    sock.linger = 30000
    sock.connect(endpoint)
    time.sleep(1.0)
    for number in range(errors):
        event = {"agent": agent, "error_type": "storm_0", "message": f"error {number}", "timestamp": time.time()}
        sock.send_string("ERROR:" + json.dumps(event))
"""


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    # However long a storm takes here, most of it has no row of its own.
    settings = {"health__heartbeat_s": HEARTBEAT_S, "error_bus__rows_per_s": 300}
    with running_mesh(tmp_path_factory.mktemp("mesh"), **settings) as running:
        yield running


def total(mesh: Mesh, agent: str) -> int:
    """How many events of this agent the history knows of."""
    return int(mesh.succeed("health_manager", "get_errors", agent=agent, limit=1)["total"])


def launch(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=PROJECT)


class Watch:
    """Uses the bus while a storm lasts, and keeps the longest times that it had to wait."""

    def __init__(self, mesh: Mesh, bus: Subscriber, agent: str) -> None:
        self.mesh, self.bus, self.agent = mesh, bus, agent
        self.answer_s = self.event_s = self.began_s = self.ended_s = 0.0

    def until_over(self, storm: subprocess.Popen[bytes]) -> None:
        """Return when the storm's process has ended and the history grows no more."""
        bystander = self.mesh.reporter("bystander")
        self.began_s = time.monotonic()
        for number in itertools.count():
            self._report(bystander, f"{self.agent}_{number}")
            asked_s = time.monotonic()
            counted = total(self.mesh, self.agent)
            self.answer_s = max(self.answer_s, time.monotonic() - asked_s)
            time.sleep(0.3)
            if storm.poll() is not None and counted == total(self.mesh, self.agent):
                break
        self.ended_s = time.monotonic()
        assert storm.returncode == 0

    def _report(self, bystander: ErrorReporter, kind: str) -> None:
        reported_s = time.monotonic()
        bystander.report(kind, "something else", "warning")
        came = self.bus.wait(ERROR_TOPIC, 30.0, agent="bystander", error_type=kind)
        self.event_s = max(self.event_s, came.at_s - reported_s)

    def check(self) -> None:
        """Everything that is not the storm got through meanwhile, and not after it."""
        tell(
            f"{self.agent}: {self.ended_s - self.began_s:.1f} s; "
            f"slowest get_errors {self.answer_s:.2f} s, slowest other event {self.event_s:.2f} s"
        )
        assert self.answer_s < 4.0
        assert self.event_s < 6.0
        for program in PROGRAMS:
            beats = [beat.at_s for beat in self.bus.messages(HEARTBEAT_TOPIC, component=program)]
            during = [self.began_s, *(at_s for at_s in beats if self.began_s <= at_s <= self.ended_s), self.ended_s]
            pause_s = max(after - before for before, after in itertools.pairwise(during))
            assert pause_s < 5.0 * HEARTBEAT_S, f"no heartbeat of {program} for {pause_s:.1f} s"

    def most_messages(self) -> float:
        """What error_bus.broadcasts_per_s lets through, a quarter more of it for agents that said little."""
        return (self.ended_s - self.began_s + 3.0) * 1.25 * MESSAGES_PER_S


@pytest.mark.parametrize("kinds", [1, 5000])
def test_a_storm_with_acknowledgement_is_counted_to_the_last_one(mesh: Mesh, kinds: int) -> None:
    """One kind of event over and over, or thousands of kinds: who is not in it is heard all the same."""
    agent, pid, since_seq = f"stormy-{kinds}", mesh.pid("health_manager"), mesh.last_seq()
    various = total(mesh, VARIOUS)
    with mesh.subscriber() as bus, launch(REPORTER, mesh.endpoints["report"], agent, ERRORS, kinds) as storm:
        watch = Watch(mesh, bus, agent)
        try:
            watch.until_over(storm)
        finally:
            storm.kill()
        messages = bus.messages(ERROR_TOPIC)
    rows = [row for row in mesh.history(since_seq) if row["agent"] in (agent, VARIOUS)]
    tell(f"{len(rows)} rows, {len(messages)} messages")
    watch.check()
    assert total(mesh, agent) + total(mesh, VARIOUS) - various == ERRORS
    assert len(rows) < ERRORS / 2
    assert len(messages) < watch.most_messages()
    assert mesh.pid("health_manager") == pid
    mesh.wait_state("health_manager", "healthy")


def test_a_storm_of_a_publisher_leaves_the_bus_usable(mesh: Mesh) -> None:
    """PUB promises nothing, so how many arrive is a figure and no guarantee."""
    pid = mesh.pid("health_manager")
    with mesh.subscriber() as bus, launch(PUBLISHER, mesh.endpoints["mesh"], "publisher", ERRORS) as storm:
        watch = Watch(mesh, bus, "publisher")
        try:
            watch.until_over(storm)
        finally:
            storm.kill()
        messages = bus.messages(ERROR_TOPIC, agent="publisher")
    arrived = total(mesh, "publisher")
    tell(f"{arrived} of {ERRORS} of a publisher arrived, {len(messages)} messages")
    watch.check()
    assert 1000 <= arrived <= ERRORS
    assert len(messages) < watch.most_messages()
    assert mesh.pid("health_manager") == pid


def test_a_publisher_is_heard_after_the_storm(mesh: Mesh) -> None:
    bus = mesh.subscriber()
    publisher = mesh.socket(zmq.PUB, "mesh")
    event = {"agent": "late", "error_type": "after_the_storm", "message": "as the mesh sends it"}

    def heard() -> bool:
        publisher.send_string("ERROR:" + json.dumps(event))
        return bool(bus.messages(ERROR_TOPIC, error_type="after_the_storm"))

    wait_until(heard, "the event of a publisher is on the bus")
