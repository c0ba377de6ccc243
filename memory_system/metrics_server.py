"""Metrics shown to Prometheus at http://<bind>:<port>/metrics, by prometheus_client."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from itertools import accumulate
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from memory_system.errors import AccessDenied, CannotStart
from memory_system.log import get_logger
from memory_system.metrics import Family, Source
from memory_system.security import PeerPolicy
from memory_system.traffic import BOUNDS_S, Latency

# A scrape is one short request; who sends nothing, or opens many connections, must not use up threads.
_REQUEST_S: Final = 5.0
_CONNECTIONS: Final = 8
_POLL_S: Final = 0.2

log = get_logger("metrics")


class MetricsServer:
    """Answers scrapes in threads of its own; `source` is called there, for each scrape."""

    def __init__(self, bind: str, port: int, source: Source, policy: PeerPolicy | None = None) -> None:
        """`policy`: who may ask, where `bind` can be reached by other hosts."""
        self.host = "127.0.0.1" if bind == "localhost" else bind.strip("[]")
        self.port = port
        self._source = source
        self._policy = policy
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __repr__(self) -> str:
        return f"<MetricsServer {self.host}:{self.port} {'closed' if self._server is None else 'open'}>"

    def start(self) -> None:
        """Listen. Raises CannotStart when the port is taken."""
        try:
            self._server = _Server((self.host, self.port), _application(self._source), self._policy)
        except OSError as error:
            raise CannotStart(
                f"cannot listen on {self.host}:{self.port} for metrics: {error.strerror}; "
                "set another port under metrics, or 0 for none"
            ) from error
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), name="metrics", daemon=True)
        self._thread.start()
        log.info("metrics_listening", address=f"{self.host}:{self.port}")

    def close(self) -> None:
        """Stop listening. May be called twice."""
        server, self._server = self._server, None
        if server is None or self._thread is None:
            return
        server.shutdown()
        server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_S

    def log_message(self, format: str, *args: Any) -> None:
        """A scrape every few seconds is no news."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], application: Any, policy: PeerPolicy | None) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._policy = policy
        self._free = threading.BoundedSemaphore(_CONNECTIONS)
        super().__init__(address, _Handler)
        self.set_app(application)

    def server_bind(self) -> None:
        """Without the parent's question to DNS, which may take seconds and is nobody's business."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def verify_request(self, request: Any, client_address: Any) -> bool:
        if self._policy is None:
            return True
        try:
            self._policy.check(str(client_address[0]))
        except AccessDenied:
            return False
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A peer that went away or sent no HTTP; nothing is written to stderr for it."""
        log.debug("metrics_request_failed", address=str(client_address[0]))


def _application(source: Source) -> Any:
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(_Collector(source))
    return make_wsgi_app(registry)


class _Collector:
    """What prometheus_client calls at each scrape."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        for family in self._source():
            yield _metric(family)


def _metric(family: Family) -> Metric:
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
        for labels, value in family.values.items():
            assert isinstance(value, Latency)
            histogram.add_metric(labels, _buckets(value), value.total_s)
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(family.name, family.help, labels=family.labels)
    for labels, value in family.values.items():
        assert not isinstance(value, Latency)
        metric.add_metric(labels, value)
    return metric


def _buckets(latency: Latency) -> list[tuple[str, float]]:
    bounds = [*(repr(bound) for bound in BOUNDS_S), "+Inf"]
    return list(zip(bounds, accumulate(latency.counts), strict=True))
