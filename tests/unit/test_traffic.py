"""Counting of requests: nothing is lost, and every latency stands in the right bucket."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory_system.traffic import BOUNDS_S, SUCCESS, Latency, Traffic, by_action

RECORDS = st.lists(
    st.tuples(
        st.sampled_from(["get_memory", "add_memory", "invalid"]),
        st.sampled_from([SUCCESS, "busy", "memory_not_found"]),
        st.floats(0.0, 20.0),
    )
)


@given(RECORDS)
def test_each_request_counts_once(records: list[tuple[str, str, float]]) -> None:
    traffic = Traffic()
    for record in records:
        traffic.record(*record)
    assert traffic.counts() == dict(Counter((action, outcome) for action, outcome, _ in records))
    requests = Counter(action if outcome == SUCCESS else outcome for action, outcome, _ in records)
    assert traffic.requests() == dict(requests)
    for labels, latency in traffic.latencies().items():
        mine = [elapsed_s for *of, elapsed_s in records if tuple(of) == labels]
        assert latency.total_s == pytest.approx(sum(mine))
        for bound, cumulative in zip(BOUNDS_S, _cumulative(latency), strict=False):
            assert cumulative == sum(elapsed_s <= bound for elapsed_s in mine), bound
    merged = by_action(traffic.latencies())
    assert {action: latency.count for action, latency in merged.items()} == Counter(each[0] for each in records)


def _cumulative(latency: Latency) -> list[int]:
    return [sum(latency.counts[: end + 1]) for end in range(len(latency.counts))]


@pytest.mark.parametrize(("elapsed_s", "bucket"), [(0.0, 0), (BOUNDS_S[0], 0), (0.0003, 1), (10.0, 14), (10.1, 15)])
def test_a_bound_belongs_to_the_bucket_below_it(elapsed_s: float, bucket: int) -> None:
    traffic = Traffic()
    traffic.record("stats", SUCCESS, elapsed_s)
    (latency,) = traffic.latencies().values()
    assert latency.counts.index(1) == bucket
    assert latency.count == 1


def test_what_was_read_does_not_change_any_more() -> None:
    traffic = Traffic()
    traffic.record("stats", SUCCESS, 0.001)
    before = traffic.latencies()
    traffic.record("stats", SUCCESS, 0.001)
    assert before["stats", SUCCESS].count == 1


def test_it_may_be_read_while_requests_are_recorded() -> None:
    traffic = Traffic()
    failures: list[BaseException] = []
    ended = threading.Event()

    def read() -> None:
        try:
            while not ended.is_set():
                traffic.requests()
        except RuntimeError as error:  # a dict that changed size
            failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20_000):
        traffic.record("stats", f"code{number % 5000}", 0.001)
    ended.set()
    reader.join(10)
    assert not failures
    assert sum(traffic.requests().values()) == 20_000
