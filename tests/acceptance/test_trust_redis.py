"""Redis that gives what was never stored there: no answer is wrong and none fails, and what is bad is thrown away."""

from __future__ import annotations

import contextlib
import random
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.mesh import tell
from tests.support.poison import POISONS, forge, forged_vectors
from tests.support.process import Orchestrator, running_orchestrator, wait_until
from tests.support.valkey import ValkeyServer, running_valkey, settled
from tests.support.watchers import watching

SEED = random.SystemRandom().randrange(1, 2**32)
DIMENSION = 64  # of the stub
MODEL = "stub-64"
CONTENTS = [
    f"what was learned on day {day}, {word}" for day, word in enumerate(("rain", "sun", "snow", "fog", "hail", "ice"))
]
QUERIES = ("rain and snow", "what about the sun", "hail in spring", "fog")

pytestmark = [pytest.mark.acceptance, pytest.mark.timeout(240)]


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[ValkeyServer]:
    with running_valkey(tmp_path / "valkey") as server:
        yield server


@pytest.fixture
def service(tmp_path: Path, redis: ValkeyServer) -> Iterator[Orchestrator]:
    patient = {"redis__reset_timeout_s": 0.2, "redis__timeout_ms": 5000}  # a busy machine costs it no answer of Redis
    with running_orchestrator(tmp_path, redis__url=redis.url, **patient) as orchestrator:
        orchestrator.ask("batch_add_memories", memories=[{"content": content} for content in CONTENTS])
        settled(orchestrator)
        yield orchestrator


def answers(service: Orchestrator) -> list[list[tuple[str, float]]]:
    found = []
    for query in QUERIES:
        reply = service.ask("semantic_search", query=query, k=5, touch=False)
        assert (reply["status"], reply["degraded"]) == ("success", False), reply
        found.append([(each["content"], each["similarity"]) for each in reply["results"]])
    return found


def begin_anew(service: Orchestrator) -> None:
    """Without what was cached in the process or kept as vectors, so that all is looked for in Redis."""
    service.kill()
    with contextlib.closing(sqlite3.connect(service.database)) as db:
        db.execute("DELETE FROM embeddings")
        db.commit()
    service.start()
    settled(service)


def check_vectors(service: Orchestrator) -> None:
    with contextlib.closing(sqlite3.connect(f"file:{service.database}?mode=ro", uri=True)) as db:
        vectors = [np.frombuffer(vector, dtype="<f4") for (vector,) in db.execute("SELECT vector FROM embeddings")]
    assert len(vectors) == len(CONTENTS)
    assert all(abs(float(vector @ vector) - 1.0) < 0.01 for vector in vectors)


def keys_of(redis: ValkeyServer, part: str) -> list[str]:
    return [key for key in redis.keys() if f":{part}:" in key]  # noqa: SIM118  not a dict


def test_what_was_never_stored_is_no_answer(service: Orchestrator, redis: ValkeyServer) -> None:
    tell(f"seed {SEED}")
    rng = random.Random(SEED)
    before = answers(service)
    settled(service)
    keys = keys_of(redis, "vec") + keys_of(redis, "res")
    assert len(keys) > len(POISONS)
    for number, key in enumerate(keys):
        POISONS[list(POISONS)[number % len(POISONS)]](redis, key, rng)
    begin_anew(service)
    assert answers(service) == before
    check_vectors(service)
    assert service.ask("health_check")["state"] == "healthy"
    assert service.ask("health_check")["caches"]["vectors"]["poisoned"] > 0


def test_vectors_that_no_model_makes_are_made_anew(service: Orchestrator, redis: ValkeyServer) -> None:
    before = answers(service)
    settled(service)
    payloads = list(forged_vectors(DIMENSION).values())
    assert len(keys_of(redis, "vec")) > len(payloads)
    forge_all(redis, payloads)
    begin_anew(service)
    assert answers(service) == before
    check_vectors(service)


def test_a_forger_who_knows_the_format_is_believed(service: Orchestrator, redis: ValkeyServer) -> None:
    """The control: what is put into Redis is what the service reads."""
    before = answers(service)
    settled(service)
    forge_all(redis, [np.eye(1, DIMENSION, dtype="<f4").tobytes()])
    begin_anew(service)
    assert answers(service) != before


def forge_all(redis: ValkeyServer, payloads: list[bytes]) -> None:
    """Put these payloads in the place of all vectors, in turn; no result is kept."""
    for number, key in enumerate(keys_of(redis, "vec")):
        forge(redis, key, MODEL, payloads[number % len(payloads)])
    for key in keys_of(redis, "res"):
        redis.command("DEL", key)


def test_poison_at_work_fails_no_request_and_shows_nothing_that_is_past(
    service: Orchestrator, redis: ValkeyServer
) -> None:
    tell(f"seed {SEED}")
    rng = random.Random(SEED)
    with watching(service) as watchers:
        wait_until(lambda: all(watcher.rounds > 2 or watcher.problems for watcher in watchers), "work with Redis")
        for _ in range(100):
            keys = redis.keys()
            if keys:
                POISONS[rng.choice(list(POISONS))](redis, rng.choice(keys), rng)
    assert [watcher.problems for watcher in watchers] == [[], []], SEED
    assert service.ask("health_check")["state"] == "healthy"
