"""What is measured: each workload names its server and makes its requests."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from corpus import Corpus

from memory_system.protocol import VERSION, new_request_id

Request = dict[str, Any]
Server = Literal["echo", "reference", "reads", "writes", "model"]

NAMESPACE: Final = "bench"
BATCH: Final = 1000
# Requests are made ahead of the measurement and used in turn: the load generator shares the cores with the service.
_READY_TEXTS: Final = 500
_READY_BATCHES: Final = 4


@dataclass(frozen=True, slots=True)
class Job:
    """One process's part in a measurement. Times are monotonic seconds, the same clock in every process here."""

    workload: str
    endpoint: str
    clients: int
    start_s: float
    seconds: float
    seed: int
    memory_ids: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Workload:
    """`items`: memories that one call stores, 1 for anything else. `only_clients`: run with this many, no others."""

    name: str
    server: Server
    requests: Callable[[Job], Iterator[Request]]
    items: int = 1
    only_clients: int | None = None


def request(action: str, data: Request) -> Request:
    return {
        "v": VERSION,
        "action": action,
        "data": data,
        "request_id": new_request_id(),
        "namespace": NAMESPACE,
        "agent_id": "bench",
        "deadline_ms": 120_000.0,
    }


def _echo(job: Job) -> Iterator[Request]:
    """Looks like a reply, so that the load generator treats both alike."""
    while True:
        yield request("echo", {"pad": "x" * 158}) | {"status": "success"}


def _get(job: Job) -> Iterator[Request]:
    start = job.seed * 37 % len(job.memory_ids)
    for memory_id in itertools.cycle(job.memory_ids[start:] + job.memory_ids[:start]):
        yield request("get_memory", {"memory_id": memory_id})


def _add(job: Job) -> Iterator[Request]:
    corpus = Corpus(job.seed)
    ready = [corpus.memory() for _ in range(_READY_TEXTS)]
    for number, memory in enumerate(itertools.cycle(ready)):
        yield request("add_memory", memory | {"content": f"{memory['content']} {number}"})


def _batch(job: Job) -> Iterator[Request]:
    corpus = Corpus(job.seed)
    ready = [[corpus.memory() for _ in range(BATCH)] for _ in range(_READY_BATCHES)]
    for memories in itertools.cycle(ready):
        yield request("batch_add_memories", {"memories": memories})


def _search(job: Job) -> Iterator[Request]:
    corpus = Corpus(job.seed)
    while True:
        yield request("search_memory", {"query": corpus.query()})


def _semantic(job: Job) -> Iterator[Request]:
    corpus = Corpus(job.seed)
    while True:
        yield request("semantic_search", {"query": corpus.query()})


def _semantic_again(job: Job) -> Iterator[Request]:
    query = Corpus(1).query()
    while True:
        yield request("semantic_search", {"query": query})


WORKLOADS: Final = (
    Workload("echo", "echo", _echo),
    Workload("get_memory", "reads", _get),
    Workload("search_memory", "reads", _search),
    Workload("semantic_search", "reads", _semantic),
    Workload("semantic_search again", "reads", _semantic_again),
    Workload("reference add", "reference", _add),
    Workload("add_memory", "writes", _add),
    Workload("batch_add_memories", "writes", _batch, items=BATCH),
    Workload("semantic_search (model)", "model", _semantic, only_clients=1),
    Workload("add_memory (model)", "model", _add),
)
BY_NAME: Final = {workload.name: workload for workload in WORKLOADS}
