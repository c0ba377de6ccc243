"""No error that was reported is lost, and none comes twice, whoever is killed or stalls meanwhile."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from memory_system.error_bus import ErrorReporter
from memory_system.events import ERROR_TOPIC, HEARTBEAT_TOPIC
from memory_system.outbox import Outbox
from tests.support.bus import Message, Row, Subscriber, check_each_once, close_gaps
from tests.support.mesh import Mesh, running_mesh, tell
from tests.support.process import wait_until

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]

ERRORS = 1000


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """Each event is a row and a message of its own, so that each can be counted."""
    separate = {"fold_s": 0, "broadcasts_per_s": 100_000, "rows_per_s": 1_000_000}
    overrides: dict[str, Any] = {f"error_bus__{name}": value for name, value in separate.items()}
    with running_mesh(
        tmp_path_factory.mktemp("mesh"), health__heartbeat_s=1, health__flap_deaths=100, **overrides
    ) as running:
        yield running


def heard(mesh: Mesh, bus: Subscriber, since_seq: int, error_type: str) -> list[Row]:
    """The events of this type that a subscriber has after it closed its gaps; heartbeats show one at the end."""
    last_seq = mesh.last_seq()
    bus.wait(HEARTBEAT_TOPIC, 30.0, where=lambda fields: fields.get("last_error_seq", 0) >= last_seq)
    rows = close_gaps(bus.messages(), mesh.history, since_seq)
    return [row for row in rows if row["error_type"] == error_type]


def live(bus: Subscriber, error_type: str) -> list[Message]:
    return bus.messages(ERROR_TOPIC, error_type=error_type)


# -- a killed manager -------------------------------------------------------------------------------------------


def report_through_a_kill(mesh: Mesh, reporter: ErrorReporter, error_type: str) -> None:
    """1,000 errors around a kill -9 of the manager, which was too busy to read what was sent to it last."""

    def report(numbers: range) -> None:
        for number in numbers:
            reporter.report(error_type, f"error {number}", details={"number": number})

    pid = mesh.pid("health_manager")
    report(range(ERRORS * 2 // 5))
    wait_until(lambda: len(mesh.history(error_type=error_type)) >= 100, "the first are written")
    mesh.sigstop("health_manager")
    report(range(ERRORS * 2 // 5, ERRORS * 3 // 5))
    time.sleep(0.3)
    mesh.send_signal("health_manager", signal.SIGKILL)
    report(range(ERRORS * 3 // 5, ERRORS))
    mesh.wait_answer("health_manager", besides=pid)


def test_a_killed_manager_loses_no_error_and_doubles_none(mesh: Mesh) -> None:
    since_seq = mesh.last_seq()
    bus = mesh.subscriber()
    reporter = mesh.reporter("probe")
    report_through_a_kill(mesh, reporter, "acknowledged")
    wait_until(lambda: len(mesh.history(error_type="acknowledged")) >= ERRORS, "all arrive")
    check_each_once(mesh.history(error_type="acknowledged"), range(ERRORS))
    check_each_once(heard(mesh, bus, since_seq, "acknowledged"), range(ERRORS))
    tell(f"{len(live(bus, 'acknowledged'))} of {ERRORS} errors came live, the rest was fetched")


class _SentIsDone(Outbox):
    def batch_sent(self, now_s: float) -> None:
        super().batch_sent(now_s)
        self._finish({})


class Forgetful(ErrorReporter):
    """A reporter that takes what it has sent for received."""

    def _begin(self) -> None:
        super()._begin()
        self._outbox = _SentIsDone(self.agent, self._queue_events, self._resend_s)


def test_without_acknowledgement_errors_are_lost(mesh: Mesh) -> None:
    """What the test above would say of a reporter that does not wait for the commit."""
    reporter = mesh.reporter("probe", Forgetful)
    report_through_a_kill(mesh, reporter, "unacknowledged")
    mesh.reporter("witness").report("unacknowledged_end", "all is reported")
    wait_until(lambda: bool(mesh.history(error_type="unacknowledged_end")), "the last is written")
    with pytest.raises(AssertionError, match="lost "):
        check_each_once(mesh.history(error_type="unacknowledged"), range(ERRORS))


def test_several_reporters_and_a_manager_killed_while_it_writes(mesh: Mesh) -> None:
    since_seq, pid = mesh.last_seq(), mesh.pid("health_manager")
    bus = mesh.subscriber()
    half = threading.Event()

    def report(reporter: ErrorReporter, numbers: range) -> None:
        for number in numbers:
            reporter.report("busy", f"error {number}", details={"number": number})
            time.sleep(0.001)
            if number == numbers[len(numbers) // 2]:
                half.set()

    share = ERRORS // 4
    shares = [range(first, first + share) for first in range(0, ERRORS, share)]
    threads = [threading.Thread(target=report, args=(mesh.reporter(f"probe-{each}"), each)) for each in shares]
    for thread in threads:
        thread.start()
    assert half.wait(45)
    mesh.kill9("health_manager")
    for thread in threads:
        thread.join(45)
    mesh.wait_answer("health_manager", besides=pid)
    wait_until(lambda: len(mesh.history(error_type="busy")) >= ERRORS, "all arrive")
    check_each_once(mesh.history(error_type="busy"), range(ERRORS))
    check_each_once(heard(mesh, bus, since_seq, "busy"), range(ERRORS))


# -- a stalled subscriber ---------------------------------------------------------------------------------------


def test_a_stalled_subscriber_loses_only_its_own_messages_and_closes_the_gap(mesh: Mesh) -> None:
    errors, batch = 8000, 200
    since_seq = mesh.last_seq()
    stalled, reading = mesh.subscriber(RCVHWM=10, RCVBUF=4096), mesh.subscriber()
    reporter = mesh.reporter("probe")
    reporter.report("stall_begins", "both are connected")
    for bus in (stalled, reading):
        bus.wait(ERROR_TOPIC, 30.0, error_type="stall_begins")
    stalled.pause()
    for first in range(0, errors, batch):
        for number in range(first, first + batch):
            reporter.report("stall", "x" * 1500, details={"number": number})
        reading.wait(ERROR_TOPIC, 45.0, error_type="stall", details={"number": first + batch - 1})
    check_each_once([message.fields for message in live(reading, "stall")], range(errors))

    stalled.resume()
    rows = heard(mesh, stalled, since_seq, "stall")
    tell(f"the stalled subscriber received {len(live(stalled, 'stall'))} of {errors}, and fetched the rest")
    assert len(live(stalled, "stall")) < errors
    check_each_once(rows, range(errors))
