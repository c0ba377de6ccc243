"""Folding: nothing is lost, the first of a kind goes out at once, and the stream shows its own gaps."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.events import SEVERITIES, Event, make_event
from memory_system.health.folding import ROW_KEYS, VARIOUS, Broadcast, BroadcastFolder, RowBudget

# Seconds to the next event, who, what, how bad, for how many it stands, and whether its row is a new one.
STEPS = st.tuples(
    st.sampled_from([0.0, 0.01, 0.3, 0.99, 1.0, 2.5, 11.0]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.sampled_from(SEVERITIES),
    st.integers(1, 5),
    st.booleans(),
)


def event(agent: str = "a", error_type: str = "t", severity: str = "error", count: int = 1, at: float = 0.0) -> Event:
    return Event("id", at, agent, error_type, "message", severity, count=count)


def ranks(severity: str) -> int:
    return SEVERITIES.index(severity)


class Run:
    """A folder with what went in and what came out, by the time at which it did."""

    def __init__(self, fold_s: float, per_s: int, last_seq: int = 0) -> None:
        self.folder = BroadcastFolder(fold_s, per_s, last_seq)
        self.now_s = 100.0
        self.seq = last_seq
        self.went_in: list[tuple[int, Event]] = []
        self.came_out: list[tuple[float, Broadcast]] = []

    def wait(self, seconds: float) -> None:
        """Let time pass, and wake the folder when it asked to be."""
        end_s = self.now_s + seconds
        while (due_s := self.folder.next_due) is not None and due_s <= end_s:
            self.now_s = max(self.now_s, due_s)
            self.came_out += [(self.now_s, message) for message in self.folder.due(self.now_s)]
            assert self.folder.next_due is None or self.folder.next_due > self.now_s
        self.now_s = end_s

    def admit(self, each: Event, *, new_row: bool = True) -> list[Broadcast]:
        self.seq += new_row or not self.went_in
        self.went_in.append((self.seq, each))
        out = self.folder.admit(self.seq, each, self.now_s)
        self.came_out += [(self.now_s, message) for message in out]
        return out

    @property
    def messages(self) -> list[Broadcast]:
        return [message for _, message in self.came_out]


def run(steps: list[tuple[float, int, int, str, int, bool]], fold_s: float, per_s: int) -> Run:
    done = Run(fold_s, per_s, last_seq=7)
    for pause_s, agent, error_type, severity, count, new_row in steps:
        done.wait(pause_s)
        done.admit(event(f"a{agent}", f"t{error_type}", severity, count, at=done.now_s), new_row=new_row)
    return done


@given(st.lists(STEPS, max_size=60), st.sampled_from([0.0, 1.0, 10.0]), st.integers(1, 4), st.booleans())
def test_what_goes_out_counts_what_came_in(
    steps: list[tuple[float, int, int, str, int, bool]], fold_s: float, per_s: int, flushed: bool
) -> None:
    done = run(steps, fold_s, per_s)
    if flushed:
        done.came_out += [(done.now_s, message) for message in done.folder.flush(done.now_s)]
    else:
        done.wait(100.0)
    went_in = [each for _, each in done.went_in]
    assert sum(message.event.count for message in done.messages) == sum(each.count for each in went_in)
    assert done.folder.next_due is None
    if went_in:
        worst = max(ranks(each.severity) for each in went_in)
        assert max(ranks(message.event.severity) for message in done.messages) == worst
        assert done.messages[-1].told_seq == done.messages[-1].seq == done.seq
        assert min(message.first_at for message in done.messages) == went_in[0].timestamp
        assert max(message.last_at for message in done.messages) == went_in[-1].timestamp


@given(st.lists(STEPS, max_size=60), st.sampled_from([0.0, 1.0, 10.0]), st.integers(1, 4))
def test_each_message_follows_the_one_before(
    steps: list[tuple[float, int, int, str, int, bool]], fold_s: float, per_s: int
) -> None:
    done = run(steps, fold_s, per_s)
    before, told = 7, 7
    for message in done.messages:
        assert message.prev_seq == before <= message.seq
        assert message.first_seq <= message.seq
        assert told <= message.told_seq <= message.seq
        before, told = message.seq, message.told_seq
    assert done.folder.sent_seq == before


@given(st.lists(STEPS, max_size=60), st.sampled_from([0.0, 1.0, 10.0]), st.integers(1, 4))
def test_rows_up_to_told_seq_have_gone_out(
    steps: list[tuple[float, int, int, str, int, bool]], fold_s: float, per_s: int
) -> None:
    """Each row is a kind of its own, so that a message shows which rows it stands for."""
    done = Run(fold_s, per_s)
    told: set[str] = set()
    for pause_s, _, _, severity, _, _ in steps:
        done.wait(pause_s)
        done.admit(event("a", str(done.seq + 1), severity))
    for message in done.messages:
        told.add(message.event.error_type)
        if message.event.error_type == VARIOUS:
            told |= {str(seq) for seq in range(message.first_seq, message.seq + 1)}
        assert {str(seq) for seq in range(1, message.told_seq + 1)} <= told


@given(st.lists(STEPS, max_size=80), st.sampled_from([0.0, 1.0, 10.0]), st.integers(1, 3))
def test_a_second_has_no_more_messages_than_allowed(
    steps: list[tuple[float, int, int, str, int, bool]], fold_s: float, per_s: int
) -> None:
    done = run(steps, fold_s, per_s)
    done.wait(100.0)
    # A second of the clock may touch two of the folder's; in each, one more is for agents that had none.
    times = [at_s for at_s, _ in done.came_out]
    for first in times:
        assert sum(first <= at_s < first + 1.0 for at_s in times) <= 2 * (per_s + 1)


@given(st.lists(STEPS, max_size=60))
def test_the_first_of_a_kind_and_what_is_worse_go_out_at_once(
    steps: list[tuple[float, int, int, str, int, bool]],
) -> None:
    done = Run(10.0, 1000)
    told: dict[tuple[str, str], str] = {}
    for pause_s, agent, error_type, severity, count, _ in steps:
        seen = len(done.came_out)
        done.wait(pause_s)
        each = event(f"a{agent}", f"t{error_type}", severity, count)
        out = done.admit(each)
        for message in done.messages[seen:]:
            if message.repeats:
                told[message.event.agent, message.event.error_type] = message.event.severity
        kind = (each.agent, each.error_type)
        single = [message for message in out if not message.repeats]
        if kind not in told or ranks(severity) > ranks(told[kind]):
            assert [message.event for message in single] == [each]
        if single:
            told[kind] = severity


def test_repeats_are_one_message_at_the_end_of_their_time() -> None:
    done = Run(10.0, 200)
    assert [message.seq for message in done.admit(event(at=1.0))] == [1]
    for number in range(2, 102):
        assert done.admit(event(at=float(number), severity="warning")) == []
    done.wait(9.9)
    assert len(done.came_out) == 1
    done.wait(0.1)
    message = done.messages[-1]
    assert (message.repeats, message.event.count) == (100, 100)
    assert (message.first_at, message.last_at) == (2.0, 101.0)
    assert (message.seq, message.prev_seq, message.first_seq, message.told_seq) == (101, 1, 2, 101)
    assert message.event.severity == "warning"


def test_a_kind_that_was_quiet_is_told_at_once_again() -> None:
    done = Run(10.0, 200)
    done.admit(event())
    done.wait(10.0)
    assert len(done.admit(event())) == 1


def test_told_seq_stays_before_what_is_held_back() -> None:
    done = Run(10.0, 200)
    for error_type in ("x", "y", "x", "x", "z"):
        done.admit(event("a", error_type))
    assert [(message.seq, message.told_seq) for message in done.messages] == [(1, 1), (2, 2), (5, 2)]
    done.wait(10.0)
    assert (done.messages[-1].first_seq, done.messages[-1].seq, done.messages[-1].told_seq) == (3, 5, 5)


def test_beyond_the_limit_everything_is_summed_up() -> None:
    done = Run(10.0, 5)
    for number in range(1000):
        done.admit(event("a", f"t{number}", "critical" if number == 777 else "info"))
    assert len(done.messages) == 5
    done.wait(1.0)
    rest = done.messages[-1]
    assert (rest.event.agent, rest.event.error_type, rest.event.severity) == (VARIOUS, VARIOUS, "critical")
    assert (rest.event.count, rest.repeats, rest.event.details["kinds"]) == (995, 995, 995)
    assert (rest.first_seq, rest.seq, rest.told_seq) == (6, 1000, 1000)


def test_a_storm_of_one_agent_does_not_hide_the_others() -> None:
    """Also while the sums of the storm's repeats go out."""
    done = Run(10.0, 200)
    for step in range(300):
        done.wait(0.1)
        if step < 100:
            for number in range(400):
                done.admit(event("storm", f"t{number + 400 * (step % 10)}"))
        out = done.admit(event("bystander", f"b{step}"))
        assert [message.event.error_type for message in out if message.event.agent == "bystander"] == [f"b{step}"]
    done.wait(100.0)
    assert sum(message.event.count for message in done.messages) == 100 * 400 + 300
    by_second: dict[int, int] = {}
    for at_s, _ in done.came_out:
        by_second[int(at_s)] = by_second.get(int(at_s), 0) + 1
    assert max(by_second.values()) <= 2 * 250


def test_a_storm_of_kinds_is_bounded() -> None:
    done = Run(3600.0, 100_000)
    for number in range(20_000):
        done.admit(event("a", f"t{number}"))
    assert len(done.messages) == 10_000
    done.wait(1.0)
    assert done.messages[-1].event.count == 10_000
    assert done.messages[-1].event.details == {"kinds": 1000}


def test_components_of_one_agent_do_not_hide_each_other() -> None:
    done = Run(10.0, 200)
    down = [
        make_event("m", "component_down", "it ended", details={"component": name}) for name in ("one", "two", "one")
    ]
    assert [len(done.admit(each)) for each in down] == [1, 1, 0]
    budget = RowBudget(1).begin(0.0)
    keys = [budget.place(each) for each in [*down, *down]]
    assert len(set(keys[1:])) == 2


def test_without_folding_each_goes_out() -> None:
    done = Run(0.0, 1000)
    for _ in range(10):
        assert len(done.admit(event())) == 1
    assert done.folder.next_due is None


def test_the_fields_can_be_sent() -> None:
    done = Run(10.0, 200)
    done.admit(event(count=3))
    done.admit(event())
    done.wait(10.0)
    single, summed = (json.loads(json.dumps(message.fields())) for message in done.messages)
    assert "repeats" not in single
    assert {name: single[name] for name in ("seq", "prev_seq", "first_seq", "told_seq", "count")} == {
        "seq": 1,
        "prev_seq": 0,
        "first_seq": 1,
        "told_seq": 1,
        "count": 3,
    }
    assert (summed["repeats"], summed["first_at"], summed["last_at"]) == (1, 0.0, 0.0)


# -- rows -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 300), st.sampled_from(SEVERITIES)), max_size=400), st.integers(1, 50))
def test_a_second_has_a_bounded_number_of_rows(events: list[tuple[int, str]], rows_per_s: int) -> None:
    budget = RowBudget(rows_per_s).begin(5.0)
    keys = [budget.place(event("a", str(number), severity)) for number, severity in events]
    assert sum(key is None for key in keys) == min(rows_per_s, len(events))  # all of one agent
    assert keys[:rows_per_s] == [None] * min(rows_per_s, len(events))
    shared = {key for key in keys if key is not None}
    assert len(shared) <= ROW_KEYS + len(SEVERITIES)
    for key, (number, severity) in zip(keys, events, strict=True):
        assert key in (None, ("a", str(number), "", severity), (VARIOUS, VARIOUS, "", severity))


def test_rows_of_one_agent_do_not_hide_the_others() -> None:
    budget = RowBudget(1000).begin(5.0)
    for number in range(20_000):
        budget.place(event("storm", str(number)))
    assert [budget.place(event("bystander", str(number))) for number in range(20)] == [None] * 20
    assert budget.place(event("bystander", "20")) == (VARIOUS, VARIOUS, "", "error")
    own = sum(budget.place(event(f"a{number}")) is None for number in range(10_000))
    assert own == 1000 // 10 - 20


@pytest.mark.parametrize(("later_s", "used"), [(0.0, 3), (0.999, 3), (1.0, 0), (-0.1, 0), (1000.0, 0)])
def test_the_budget_begins_anew_with_each_second(later_s: float, used: int) -> None:
    budget = RowBudget(3).begin(50.0)
    for _ in range(5):
        budget.place(event())
    assert budget.begin(50.0 + later_s).used == used


def test_a_group_that_is_not_committed_costs_nothing() -> None:
    budget = RowBudget(3).begin(50.0)
    before = copy.deepcopy(budget)
    planned = budget.begin(50.5)
    for _ in range(5):
        planned.rows[planned.place(event()) or ("a", "b", "", "c")] = 1
    assert budget == before
