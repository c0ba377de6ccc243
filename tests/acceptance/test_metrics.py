"""The orchestrator's metrics, scraped from a real process and compared with what was done."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.process import PROJECT, Orchestrator, free_port, running_orchestrator, wait_until
from tests.support.wire import encode

pytestmark = pytest.mark.acceptance

ADDS, READS, MISSED = 23, 5, 7


class Scrape:
    """The samples of one answer, by name (without the prefix) and labels."""

    def __init__(self, port: int) -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=90) as reply:
            self.content_type = reply.headers["Content-Type"]
            self.families = list(text_string_to_metric_families(reply.read().decode()))
        self.samples = {
            (sample.name.removeprefix("memory_system_"), frozenset(sample.labels.items())): sample.value
            for family in self.families
            for sample in family.samples
        }

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[name, frozenset(labels.items())]

    def of(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        return {labels: value for (each, labels), value in self.samples.items() if each == name}


def settled(orchestrator: Orchestrator) -> bool:
    health = orchestrator.ask("health_check")
    return bool(health["state"] == "healthy" and health["index_lag"] == 0 and orchestrator.ask("stats")["pending"] == 0)


def test_the_values_are_what_was_done(tmp_path: Path) -> None:
    port = free_port()
    with running_orchestrator(tmp_path, metrics__orchestrator_port=port) as orchestrator:
        started_s = time.time()
        with orchestrator.peer() as peer:
            ids = [peer.ask("add_memory", content=f"memory {number}")["memory_id"] for number in range(ADDS)]
            for number in range(READS):
                assert peer.ask("get_memory", memory_id=ids[number])["status"] == "success"
            for number in range(MISSED):
                assert peer.ask("get_memory", memory_id=f"mem-{number}")["error_code"] == "memory_not_found"
            assert peer.ask("no_such_action")["error_code"] == "unknown_action"
            peer.send(encode([1, 2], "msgpack"))
            peer.receive()
        wait_until(lambda: settled(orchestrator), "vectors are there")
        health = orchestrator.ask("health_check")
        file_bytes = {orchestrator.database.stat().st_size}
        scrape = Scrape(port)
        file_bytes.add(orchestrator.database.stat().st_size)  # a checkpoint may come in between

        requests = {labels: value for labels, value in scrape.of("requests_total").items() if value}
        assert scrape("requests_total", action="add_memory", outcome="success") == ADDS
        assert scrape("requests_total", action="get_memory", outcome="success") == READS
        assert scrape("requests_total", action="get_memory", outcome="memory_not_found") == MISSED
        assert scrape("requests_total", action="invalid", outcome="unknown_action") == 1
        assert scrape("requests_total", action="invalid", outcome="invalid_request") == 1
        assert sum(requests.values()) == sum(health["requests"].values()) + 1  # that very health_check
        assert scrape("request_seconds_count", action="get_memory") == READS + MISSED
        assert scrape("request_seconds_bucket", action="add_memory", le="+Inf") == ADDS
        assert 0 < scrape("request_seconds_sum", action="add_memory") < time.time() - started_s
        assert scrape("cache_hits_total", cache="records", where="process") == health["caches"]["records"]["hits"]
        assert scrape("cache_misses_total", cache="records") >= MISSED
        assert scrape("queue_depth", queue="writes") == scrape("queue_depth", queue="requests") == 0
        assert scrape("index_lag") == 0
        assert scrape("state", component="orchestrator", state="healthy") == 1
        assert scrape("readiness", part="redis", state="off") == 1
        assert scrape.of("breaker_state") == {}
        assert scrape("database_bytes", part="file") in file_bytes
        assert abs(scrape("disk_free_bytes") - shutil.disk_usage(tmp_path).free) < 1024**3
        assert scrape("last_commit_timestamp_seconds") == pytest.approx(time.time(), abs=30)
        assert scrape("process_resident_memory_bytes") == pytest.approx(orchestrator.resident_mb() * 2**20, rel=0.2)


def test_it_is_prometheus_text_with_help_and_one_prefix(tmp_path: Path) -> None:
    port = free_port()
    with running_orchestrator(tmp_path, metrics__orchestrator_port=port) as orchestrator:
        orchestrator.ask("stats")
        scrape = Scrape(port)
    assert scrape.content_type.startswith("text/plain")
    for family in scrape.families:
        assert family.documentation, family.name
        assert re.match(r"(memory_system|process)_[a-z_]+$", family.name), family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name


def test_a_scrape_holds_up_no_request(tmp_path: Path) -> None:
    port = free_port()
    with running_orchestrator(tmp_path, metrics__orchestrator_port=port) as orchestrator, orchestrator.peer() as peer:
        for _ in range(20):
            assert peer.ask("get_commit_seq")["status"] == "success"
            Scrape(port)
        orchestrator.terminate()
    with pytest.raises(OSError):
        Scrape(port)


def test_no_port_is_open_unless_asked_for(tmp_path: Path) -> None:
    if not Path("/proc/net/tcp").exists():
        pytest.skip("looks at /proc")
    with running_orchestrator(tmp_path) as orchestrator:
        assert listening_ports(orchestrator.pid) == {orchestrator.port}
    port = free_port()
    with running_orchestrator(tmp_path, metrics__orchestrator_port=port) as orchestrator:
        assert listening_ports(orchestrator.pid) == {orchestrator.port, port}


def test_a_program_without_metrics_does_not_load_them() -> None:
    code = "import sys, orchestrator; sys.exit('prometheus_client' in sys.modules or 'http.server' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=90).returncode == 0


def listening_ports(pid: int) -> set[int]:
    """The TCP ports that a process listens on, as the kernel knows them."""
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed since it was listed
            links.append(os.readlink(entry))
    inodes = {match[1] for link in links if (match := re.match(r"socket:\[(\d+)\]", link))}
    ports = set()
    for table in (Path(f"/proc/{pid}/net/tcp"), Path(f"/proc/{pid}/net/tcp6")):
        for line in table.read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in inodes:
                ports.add(int(columns[1].split(":")[1], 16))
    return ports


def test_a_taken_port_stops_the_start_with_its_reason(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with (
        running_orchestrator(tmp_path / "a", metrics__orchestrator_port=port),
        running_orchestrator(tmp_path / "b", start=False, metrics__orchestrator_port=port) as other,
    ):
        with other.launch() as process:
            assert process.wait(45) == 1
            assert process.stderr is not None
            assert f"127.0.0.1:{port}" in process.stderr.read()
        other.environ["MEMORY__METRICS__ORCHESTRATOR_PORT"] = "0"
        other.start()
        assert other.ask("stats")["status"] == "success"
