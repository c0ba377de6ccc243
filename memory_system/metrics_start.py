"""Starts the metrics server of a program, where one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from memory_system.security import policy_for
from memory_system.settings import Settings

if TYPE_CHECKING:
    from memory_system.metrics import Family


def start_metrics(settings: Settings, port: int, families: Callable[[], list[Family]]) -> Callable[[], None]:
    """Serve the families on `network.bind`; returns what ends it. Port 0: nothing is served. Raises CannotStart."""
    if not port:
        return lambda: None
    # Not above: it brings an HTTP server and prometheus_client, which nobody needs who has no metrics.
    from memory_system.metrics_server import MetricsServer

    network = settings.network
    server = MetricsServer(network.bind, port, families, policy_for(network, settings.security))
    server.start()
    return server.close
