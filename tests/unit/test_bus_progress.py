"""Progress: whatever is lost and whenever the manager restarts, a reader has every event once."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from memory_system.bus_progress import BusEvent, Message, Progress, row_event
from memory_system.events import MalformedEvent, make_event
from memory_system.health.folding import Broadcast, BroadcastFolder

KINDS = (("planner", "timeout"), ("planner", "full"), ("archiver", "timeout"))
FOLD_S = 10.0


class Bus:
    """A manager, a reader and the line between them, without sockets.

    `lost`: messages do not arrive. `slow`: they arrive with the next `deliver`.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.now_s = 0.0
        self.boots = 0
        self.lost = self.slow = False
        self.line: list[Message] = []
        self.progress = Progress()
        self.had: Counter[tuple[str, str]] = Counter()
        self.boot()
        self.read_history()

    def boot(self) -> None:
        """A new manager; what the last one held back to be summed up is gone."""
        self.boots += 1
        self.folder = BroadcastFolder(FOLD_S, 1_000_000, len(self.rows))
        self.sent_seq = len(self.rows)

    def report(self, kind: tuple[str, str], severity: str, count: int) -> None:
        event = make_event(*kind, "", severity, now_s=self.now_s, count=count)
        self.rows.append({"seq": len(self.rows) + 1, **event.fields()})
        self.send(self.folder.admit(len(self.rows), event, self.now_s))

    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.send(self.folder.due(self.now_s))

    def send(self, broadcasts: list[Broadcast]) -> None:
        for each in broadcasts:
            fields = {**each.fields(), "prev_seq": self.sent_seq, "boot_id": str(self.boots)}
            self.sent_seq = each.seq
            if not self.lost:
                self.line.append(Message.parse(json.loads(json.dumps(fields)), 0.0))
        if not self.slow:
            self.deliver()

    def deliver(self) -> None:
        while self.line:
            self.receive(self.line.pop(0))

    def receive(self, message: Message) -> None:
        if self.progress.is_behind(message.boot_id, message.prev_seq):
            self.read_history()
        self.take(self.progress.admit_message(message))

    def heartbeat(self) -> None:
        self.deliver()
        if not self.lost and self.progress.is_behind(str(self.boots), self.sent_seq):
            self.read_history()

    def read_history(self) -> None:
        for row in self.rows[self.progress.told_seq :]:
            self.take(self.progress.admit_row(row_event(row, 0.0)))
        assert self.progress.history_read(len(self.rows))

    def take(self, event: BusEvent | None) -> None:
        if event is not None:
            assert event.event.count > 0
            self.had[event.event.agent, event.event.error_type] += event.event.count

    def reported(self) -> Counter[tuple[str, str]]:
        counts: Counter[tuple[str, str]] = Counter()
        for row in self.rows:
            counts[row["agent"], row["error_type"]] += row.get("count", 1)
        return counts


REPORT = st.tuples(
    st.just("report"), st.sampled_from(KINDS), st.sampled_from(("info", "error", "critical")), st.integers(1, 3)
)
STEPS = st.one_of(
    *[REPORT] * 8,
    st.tuples(st.just("wait"), st.floats(0.1, 1.5 * FOLD_S)),
    st.tuples(st.just("boot")),
    st.tuples(st.just("read_history")),
    st.tuples(st.just("heartbeat")),
    st.tuples(st.just("deliver")),
    st.tuples(st.just("set"), st.just("lost"), st.sampled_from((False, False, True))),
    st.tuples(st.just("set"), st.just("slow"), st.booleans()),
)


# A kind was summed up while an earlier row of another is held back; then something is lost.
SUMMED_UP_ABOVE_A_HELD_ROW: list[tuple[Any, ...]] = [
    ("report", KINDS[0], "error", 1),
    ("wait", 1.0),
    ("report", KINDS[1], "error", 1),
    ("report", KINDS[1], "error", 1),
    ("report", KINDS[0], "error", 1),
    ("wait", FOLD_S - 0.5),
    ("set", "lost", True),
    ("report", KINDS[2], "error", 1),
    ("set", "lost", False),
    ("report", KINDS[2], "critical", 1),
]
# After a restart the history is read before the first message of the new manager comes.
READ_BEFORE_THE_FIRST_MESSAGE: list[tuple[Any, ...]] = [
    ("report", KINDS[0], "error", 1),
    ("boot",),
    ("set", "slow", True),
    ("report", KINDS[1], "error", 1),
    ("read_history",),
    ("deliver",),
]
# A repeat that was held back below what the reader has seen dies with the manager.
HELD_BACK_AT_A_RESTART: list[tuple[Any, ...]] = [
    ("report", KINDS[0], "error", 1),
    ("report", KINDS[0], "error", 1),
    ("report", KINDS[1], "error", 1),
    ("boot",),
]


@example(HELD_BACK_AT_A_RESTART)
@example(READ_BEFORE_THE_FIRST_MESSAGE)
@example(SUMMED_UP_ABOVE_A_HELD_ROW)
@settings(max_examples=200, deadline=None)
@given(st.lists(STEPS, min_size=5, max_size=60))
def test_every_event_is_had_once(steps: list[tuple[Any, ...]]) -> None:
    bus = Bus()
    for name, *arguments in steps:
        if name == "set":
            setattr(bus, *arguments)
        else:
            getattr(bus, name)(*arguments)
        assert all(bus.had[kind] <= count for kind, count in bus.reported().items()), "nothing is had twice"
    bus.lost = bus.slow = False
    bus.wait(2 * FOLD_S)
    bus.heartbeat()
    bus.report(KINDS[0], "info", 1)
    bus.wait(2 * FOLD_S)
    bus.heartbeat()
    assert bus.had == bus.reported()


def message(**fields: Any) -> Message:
    return Message.parse({"boot_id": "b", "agent": "planner", "message": "m", "seq": 1, "prev_seq": 0, **fields}, 0.0)


def test_a_message_without_its_range_is_taken_for_its_own_row() -> None:
    found = message(seq=7, prev_seq=3)
    assert (found.first_seq, found.told_seq, found.repeats) == (7, 3, 0)


@pytest.mark.parametrize("wrong", [{"seq": None}, {"seq": "1"}, {"prev_seq": -1}, {"repeats": True}, {"agent": ""}])
def test_a_message_without_its_place_is_none(wrong: dict[str, Any]) -> None:
    with pytest.raises(MalformedEvent):
        message(**wrong)


def test_what_is_remembered_is_bounded() -> None:
    progress = Progress()
    progress.history_read(0)
    for seq in range(1, 20_001):
        fields = {"agent": f"agent-{seq}", "repeats": 2 * (seq % 2), "told_seq": max(0, seq - 500)}
        progress.admit_message(message(seq=seq, prev_seq=seq - 1, **fields))
    for seq in range(20_001, 50_000):
        progress.admit_row(row_event({"seq": seq, "agent": "planner", "message": "m"}, 0.0))
    sizes = [len(getattr(progress, name)) for name in ("_given", "_summed", "_fetched")]
    assert max(sizes) <= 10_000
    assert sum(sizes[:2]) <= 2000
