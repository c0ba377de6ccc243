"""Metrics as Prometheus reads them, over HTTP, from the families that a program has."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memory_system import metrics
from memory_system.errors import CannotStart
from memory_system.events import make_event
from memory_system.metrics_server import MetricsServer
from memory_system.security import PeerPolicy
from memory_system.settings import SecuritySettings
from memory_system.traffic import BOUNDS_S, SUCCESS, Traffic
from tests.support.process import free_port, wait_until

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@contextlib.contextmanager
def serving(source: metrics.Source, policy: PeerPolicy | None = None, bind: str = "127.0.0.1") -> Iterator[str]:
    server = MetricsServer(bind, free_port(), source, policy)
    server.start()
    try:
        yield f"http://{'[::1]' if ':' in bind else '127.0.0.1'}:{server.port}/metrics"
    finally:
        server.close()


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=30) as reply:
        text = reply.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sample(name: str, **labels: str) -> tuple[str, frozenset[tuple[str, str]]]:
    return f"memory_system_{name}", frozenset(labels.items())


def test_every_kind_of_family_arrives_with_its_values() -> None:
    traffic = Traffic()
    for elapsed_s in (0.0001, 0.0004, 99.0):
        traffic.record("get_memory", SUCCESS, elapsed_s)
    traffic.record("get_memory", "memory_not_found", 0.003)

    def source() -> list[metrics.Family]:
        return [
            *metrics.traffic_families(traffic),
            metrics.gauge("depth", "Depth.", ("queue",), {("writes",): 3, ("unknown",): None}),
            metrics.states("breaker", "State.", "of", {"redis": "odd"}, ("closed", "open")),
            metrics.single("absent", "Nothing.", None),
        ]

    with serving(source) as url:
        first = scrape(url)
        traffic.record("get_memory", SUCCESS, 0.0001)
        second = scrape(url)
    assert first[sample("requests_total", action="get_memory", outcome=SUCCESS)] == 3
    assert second[sample("requests_total", action="get_memory", outcome=SUCCESS)] == 4
    assert first[sample("requests_total", action="get_memory", outcome="memory_not_found")] == 1
    buckets = [first[sample("request_seconds_bucket", action="get_memory", le=str(bound))] for bound in BOUNDS_S]
    assert buckets == [1, 2, 2, 2, *[3] * 11]
    assert first[sample("request_seconds_bucket", action="get_memory", le="+Inf")] == 4
    assert first[sample("request_seconds_count", action="get_memory")] == 4
    assert first[sample("request_seconds_sum", action="get_memory")] == pytest.approx(99.0035)
    assert first[sample("depth", queue="writes")] == 3
    assert sample("depth", queue="unknown") not in first
    assert [first[sample("breaker", of="redis", state=state)] for state in ("closed", "open", "odd")] == [0, 0, 1]
    assert not [name for name, _ in first if "absent" in name]
    assert [name for name, _ in first if name == "process_open_fds"]


def test_label_values_of_others_cannot_break_the_format() -> None:
    counts = metrics.EventCounts()
    counts.note(make_event('a"\n} 1\nx{', "back\\slash", "m", "error"))
    with serving(counts.families) as url:
        found = scrape(url)
    assert found[sample("events_total", agent='a"\n} 1\nx{', error_type="back\\slash", severity="error")] == 1


def test_events_are_counted_and_breakers_follow_them() -> None:
    counts = metrics.EventCounts()
    counts.note(make_event("planner", "circuit_opened", "m"))
    counts.note(make_event("planner", "tool_failed", "m", "warning", count=40))
    counts.note(make_event("planner", "tool_failed", "m", "warning", count=2))
    with serving(counts.families) as url:
        opened = scrape(url)
        counts.note(make_event("planner", "circuit_closed", "m", "info"))
        closed = scrape(url)
    assert opened[sample("events_total", agent="planner", error_type="tool_failed", severity="warning")] == 42
    assert opened[sample("client_breaker_state", agent="planner", state="open")] == 1
    assert closed[sample("client_breaker_state", agent="planner", state="open")] == 0
    assert closed[sample("client_breaker_state", agent="planner", state="closed")] == 1


def test_agents_that_invent_names_do_not_fill_the_memory() -> None:
    counts = metrics.EventCounts()
    for number in range(3 * metrics.MAX_SERIES):
        counts.note(make_event(f"agent{number}", "circuit_opened", "m"))
    events, breakers = counts.families()
    assert len(events.values) == metrics.MAX_SERIES + 1
    assert events.values["(various)", "(various)", "error"] == 2 * metrics.MAX_SERIES
    assert len(breakers.values) == 2 * metrics.MAX_SERIES


def test_components_have_one_state_each() -> None:
    components: list[dict[str, Any]] = [
        {"component": "orchestrator", "state": "down", "deaths": 2, "kills": 1, "latency_ms": None},
        {"component": "planner", "state": "healthy"},
    ]
    with serving(lambda: metrics.component_families(components)) as url:
        found = scrape(url)
    for component, state in (("orchestrator", "down"), ("planner", "healthy")):
        of_it = {
            known: found[sample("component_state", component=component, state=known)]
            for known in metrics.COMPONENT_STATES
        }
        assert of_it == {known: float(known == state) for known in metrics.COMPONENT_STATES}
    assert found[sample("component_deaths_total", component="orchestrator")] == 2
    assert sample("component_latency_ms", component="orchestrator") not in found


def test_ipv6() -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6")
    with serving(lambda: [metrics.single("depth", "Depth.", 1)], bind="::1") as url:
        assert scrape(url)[sample("depth")] == 1


def test_a_taken_port_is_named() -> None:
    with serving(list) as url:
        port = int(url.split(":")[2].split("/")[0])
        with pytest.raises(CannotStart, match=f"127.0.0.1:{port}"):
            MetricsServer("127.0.0.1", port, list).start()


def test_who_may_not_ask_gets_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = PeerPolicy(SecuritySettings(allow_insecure=True, insecure_peers=("10.9.8.0/24",)))
    with serving(list, policy) as url:
        assert scrape(url)
        monkeypatch.setattr(policy, "_allows", lambda _address: False)
        policy._known.clear()
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            scrape(url)


def test_connections_that_say_nothing_use_up_no_threads() -> None:
    with serving(list) as url:
        address = ("127.0.0.1", int(url.split(":")[2].split("/")[0]))
        before = threading.active_count()
        with contextlib.ExitStack() as stack:
            idle = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(50)]
            wait_until(lambda: len(select.select(idle, [], [], 0)[0]) >= 42, "all but eight are cut off")
            assert threading.active_count() <= before + 8
        wait_until(lambda: _is_served(url), "room again")


def _is_served(url: str) -> bool:
    try:
        return bool(scrape(url))
    except OSError:
        return False


def test_closing_frees_the_port_and_may_be_done_twice() -> None:
    port = free_port()
    for _ in range(2):
        server = MetricsServer("localhost", port, list)
        server.start()
        server.close()
        server.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
