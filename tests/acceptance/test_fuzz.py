"""Mutated requests against a running orchestrator: each gets one reply, and the service is unharmed.

FUZZ_REQUESTS says how many, FUZZ_SEED which (printed at the start; the same seed sends the same bytes).
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from memory_client import MemoryClient
from memory_system import protocol
from tests.support.process import Orchestrator, running_orchestrator

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "100000"))
SEED = int(os.environ.get("FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 2**32)
WINDOW = 48
REPLY_WITHIN_S = 30.0
GROWTH_MB = 400.0

pytestmark = [pytest.mark.acceptance, pytest.mark.slow, pytest.mark.timeout(3600)]

Frames = list[bytes]


def valid_requests(memory_id: str, session_id: str, group_id: int) -> list[dict[str, Any]]:
    """One or more well-formed requests of each action."""
    one, filters = {"memory_id": memory_id}, {"tags": {"any": ["t"]}, "or": [{"importance": {"gte": 0.1}}, {"not": {}}]}
    datas: list[tuple[str, dict[str, Any]]] = [
        ("create_session", {"user_id": "ada", "session_type": "call", "session_metadata": {"a": [1, {"b": None}]}}),
        ("end_session", {"session_id": session_id, "summary": "done"}),
        ("resume_session", {"session_id": session_id}),
        ("get_session", {"session_id": session_id}),
        ("list_sessions", {"user_id": "ada", "session_state": "open", "limit": 3}),
        ("add_memory", {"content": "a fuzzy memory", "metadata": {"k": 1.5, "l": ["x"]}, "tags": ["t"]}),
        ("add_memory", {"content": "b", "parent_id": memory_id, "occurred_at": 1e9, "expires_at": 4e9}),
        ("get_memory", {**one, "touch": False}),
        ("update_memory", {**one, "update_payload": {"content": "n", "metadata": {}}, "metadata_mode": "replace"}),
        ("update_memory", {**one, "update_data": {"parent_id": memory_id, "tags": None}, "expected_version": 3}),
        ("delete_memory", {"memory_id": "mem-none", "cascade": False}),
        ("get_children", {"parent_id": session_id, "sort_field": "importance", "sort_order": "asc", "limit": 2}),
        ("search_memory", {"query": "fuzzy memory", "limit": 3, "filters": filters, "explain": True}),
        ("semantic_search", {"query": "what is below", "k": 3, "mode": "dense", "filters": {"metadata.k": {"gt": 1}}}),
        ("search_similar", {**one, "k": 2, "min_score": -0.5}),
        ("batch_search", {"queries": [{"query": "one"}, {"query": "two", "mode": "keyword"}]}),
        ("add_relationship", {"source_id": memory_id, "target_id": session_id, "relationship_type": "r"}),
        ("remove_relationship", {"source_id": memory_id, "target_id": session_id, "relationship_type": "r"}),
        ("get_related", {**one, "direction": "both", "limit": 5}),
        ("reinforce_memory", {**one, "reinforcement_factor": 1.1}),
        ("batch_add_memories", {"memories": [{"content": "one"}, {"content": "two", "tags": ["t", "u"]}]}),
        ("batch_get_memories", {"memory_ids": [memory_id, "mem-none", session_id]}),
        ("create_context_group", {"name": "group", "description": "of the fuzz"}),
        ("list_context_groups", {"limit": 2}),
        ("add_to_group", {**one, "group_id": group_id}),
        ("remove_from_group", {**one, "group_id": group_id}),
        ("get_memories_by_group", {"group_id": group_id, "include_archived": True}),
        ("list_memories", {"filters": filters, "sort_field": "version", "cursor": "WyJhYiIsMS4wLFsxLDJdXQ"}),
        ("get_memory_history", {**one, "limit": 2}),
        ("forget", {"user_id": "nobody"}),
        ("stats", {}),
        ("get_commit_seq", {}),
        ("health_check", {}),
        ("get_request_status", {"request_id": "0123456789abcdef"}),
        ("run_decay", {"namespaces": ["default"], "dry_run": True, "limit": 2}),
        ("run_consolidation", {"as_of": 1.7e9}),
        ("undo_consolidation", {"memory_id": memory_id, "dry_run": True}),
        ("run_cleanup", {"namespaces": ["nobody", "default"], "as_of": 1.7e9}),
        ("run_snapshot", {}),
        ("run_checkpoint", {}),
        ("run_integrity_check", {"full": False, "limit": 1}),
        ("list_runs", {"job": "decay", "run_state": "done", "limit": 2}),
        ("export_memories", {"limit": 2, "vectors": True}),
        ("import_memories", {"records": lines_of_every_kind(), "on_conflict": "overwrite"}),
    ]  # fmt: skip
    around = {"v": 1, "request_id": "0123456789abcdef", "agent_id": "fuzz", "namespace": "default", "deadline_ms": 5000}
    requests = [{**around, "action": action, "data": data} for action, data in datas]
    return requests + [{"action": action, "data": data, "session_id": session_id} for action, data in datas]


# The one that writes files, and the one that takes words out of the index for a while: the polite caller misses them.
NOT_SENT = {"backup", "reindex"}


def lines_of_every_kind() -> list[dict[str, Any]]:
    first = {"kind": "memory", "memory_id": "mem-in-1", "content": "from an export", "created_at": 1.7e9}
    record = {"memory_id": "mem-in-1", "content": "as it was", "metadata": {"a": [1]}}
    ends = {"source_id": "mem-in-1", "target_id": "mem-in-2"}
    return [
        {"kind": "group", "group_id": 4711, "name": "from an export", "created_at": 1.7e9},
        {**first, "metadata": {"a": {"b": 1.5}}, "tags": ["x"], "version": 2, "state": "archived"},
        {**first, "memory_id": "mem-in-2", "parent_id": "mem-in-1", "vector": {"model_id": "m", "data": "AACAPw=="}},
        {**first, "memory_id": "mem-in-3", "memory_type": "session", "session": {"session_type": "call"}},
        {"kind": "parent", "memory_id": "mem-in-1", "parent_id": "mem-in-3"},
        {"kind": "history", "memory_id": "mem-in-1", "version": 1, "record": record, "replaced_at": 1.7e9},
        {"kind": "relationship", **ends, "relationship_type": "follows", "strength": 0.5, "created_at": 1.7e9},
        {"kind": "member", "group": "from an export", "memory_id": "mem-in-1", "added_at": 1.7e9},
        {
            **{"kind": "consolidation", "memory_id": "mem-in-2", "consolidation_kind": "summary", "created_at": 1.7e9},
            **{"pieces": [["mem-in-1", "text"]], "members": [{"memory_id": "mem-in-1", "before": {"due_at": None}}]},
        },
    ]  # fmt: skip


# -- mutations --------------------------------------------------------------------------------------------------

ODD_VALUES: list[Any] = [
    None, True, -1, 0, 2**63, 2**64 - 1, -(2**63), 1.5, float("nan"), float("inf"), "", "x", "\0", "x" * 200, "🗝",
    [], {}, [[]], [None], {"": {}}, {"a": [1]}, b"\xff", "mem-none", "session", "0" * 4000,
]  # fmt: skip
ODD_BYTES = [
    b"",
    b"{",
    b"\xc1",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\\ud800",
    b"\xed\xa0\x80",
    b"\0",
    b'"',
    b"}",
]


def deep(rng: random.Random, as_json: bool) -> bytes:
    levels = rng.choice([10, 17, 100, 2000])
    if as_json:
        return b"[" * levels + b"]" * levels if rng.random() < 0.5 else b'{"a":' * levels + b"1" + b"}" * levels
    return (b"\x91" if rng.random() < 0.5 else b"\x81\xa1a") * levels + b"\xc0"


def swap_value(rng: random.Random, request: dict[str, Any]) -> None:
    """Give one field, at any depth, a value that it does not expect; or rename, drop or add one."""
    node: Any = request
    while True:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        child = node[key]
        if isinstance(child, dict | list) and child and rng.random() < 0.8:
            node = child
            continue
        break
    kind = rng.randrange(4)
    if kind == 0 and isinstance(node, dict):
        node[rng.choice(["unknown", "", "contents", "a\nb", key + "x"])] = node.pop(key)
    elif kind == 1:
        del node[key]
    else:
        node[key] = copy.deepcopy(rng.choice(ODD_VALUES))  # a later mutation may reach into it


def encoded(request: dict[str, Any], as_json: bool) -> bytes:
    if as_json:
        return json.dumps(request, default=lambda value: value.decode("latin-1")).encode()
    return bytes(msgpack.packb(request))


def flip(rng: random.Random, body: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 2, 8])):
        body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, body: bytearray) -> None:
    del body[rng.randrange(len(body)) :]


def remove(rng: random.Random, body: bytearray) -> None:
    start = rng.randrange(len(body))
    del body[start : start + rng.randrange(1, 20)]


def insert(rng: random.Random, body: bytearray) -> None:
    start = rng.randrange(len(body))
    body[start:start] = rng.choice(ODD_BYTES) if rng.random() < 0.5 else rng.randbytes(rng.randrange(1, 20))


BYTE_MUTATIONS: list[Callable[[random.Random, bytearray], None]] = [flip, flip, cut, remove, insert]


class Mutations:
    """An endless seeded stream of messages: frames after the identity."""

    def __init__(self, seed: int, corpus: list[dict[str, Any]]) -> None:
        self._rng = random.Random(seed)
        self._corpus = [json.dumps(request) for request in corpus]
        self._bodies = [encoded(request, as_json) for request in corpus for as_json in (False, True)]

    def __iter__(self) -> Iterator[Frames]:
        while True:
            yield self._frames(self._body())

    def _body(self) -> bytes:
        rng = self._rng
        kind = rng.random()
        if kind < 0.02:
            return rng.randbytes(rng.randrange(0, 200))
        if kind < 0.45:
            return self._structured()
        body = bytearray(rng.choice(self._bodies))
        if kind < 0.60:  # splice: the head of one, the tail of another
            other = rng.choice(self._bodies)
            return bytes(body[: rng.randrange(len(body))] + other[rng.randrange(len(other)) :])
        if kind < 0.63:
            at = rng.randrange(len(body))
            return bytes(body[:at]) + deep(rng, body[:1] == b"{") + bytes(body[at:])
        if kind < 0.95:
            rng.choice(BYTE_MUTATIONS)(rng, body)
        return bytes(body)

    def _structured(self) -> bytes:
        rng = self._rng
        request = json.loads(rng.choice(self._corpus))
        if "request_id" in request and rng.random() < 0.9:
            request["request_id"] = f"{rng.getrandbits(64):016x}"
        for _ in range(rng.choice([0, 1, 1, 2])):
            if request:
                swap_value(rng, request)
        return encoded(request, rng.random() < 0.5)

    def _frames(self, body: bytes) -> Frames:
        kind = self._rng.random()
        if kind < 0.97:
            return [b"", body]
        return [[body], [b"", body, body], [b"", b"", body], [body, b"", body], [b"", b""], [b"x", body]][
            int(kind * 1e6) % 6
        ]


def test_the_same_seed_sends_the_same_bytes() -> None:
    corpus = valid_requests("m", "s", 1)
    first, second = iter(Mutations(7, corpus)), iter(Mutations(7, corpus))
    assert [next(first) for _ in range(2000)] == [next(second) for _ in range(2000)]
    actions = {protocol.ACTION_ALIASES.get(request["action"], request["action"]) for request in corpus}
    assert actions == protocol.ACTIONS - NOT_SENT


# -- the run ----------------------------------------------------------------------------------------------------


class PoliteCaller:
    """A MemoryClient in a thread that adds, reads back and searches, and keeps what went wrong."""

    def __init__(self, address: str) -> None:
        self._client = MemoryClient(
            address, agent_id="polite", namespace="polite", timeout_ms=20_000, raise_on_error=True
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.rounds = 0
        self.failure: BaseException | None = None

    def __enter__(self) -> PoliteCaller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        self._client.close()

    def round(self) -> None:
        text = f"polite memory number {self.rounds}"
        memory_id = self._client.add_memory(text)["memory_id"]
        assert self._client.get_memory(memory_id)["memory"]["content"] == text
        found = self._client.search_memory(f"number {self.rounds}", limit=1)["results"]
        assert found
        assert found[0]["memory_id"] == memory_id
        self.rounds += 1

    def _run(self) -> None:
        try:
            while not self._stop.wait(0.05):
                self.round()
        except BaseException as error:  # noqa: BLE001  shown by the test's own thread
            self.failure = error


def send_all(socket: zmq.Socket[bytes], messages: Iterator[Frames], count: int) -> Counter[str]:
    """Send `count` messages with at most WINDOW unanswered; what the replies say, by status or error code."""
    outcomes: Counter[str] = Counter()
    sent = received = 0
    while received < count:
        while sent < count and sent - received < WINDOW:
            socket.send_multipart(next(messages))
            sent += 1
        assert socket.poll(int(REPLY_WITHIN_S * 1000)), f"seed {SEED}: {sent - received} of {sent} requests unanswered"
        with contextlib.suppress(zmq.Again):
            while True:
                outcomes[outcome(socket.recv_multipart(zmq.NOBLOCK)[-1])] += 1
                received += 1
    assert not socket.poll(300), f"seed {SEED}: more replies than requests"
    return outcomes


def outcome(body: bytes) -> str:
    reply = protocol.decode_reply(body)
    if reply["status"] == "success":
        return "success"
    assert reply["error_code"] in protocol.ERROR_CODES, reply
    return str(reply["error_code"])


def log_text(folder: Path) -> str:
    lines = [
        line for file in sorted(folder.glob("logs/*")) for line in file.read_text().splitlines() if "error" in line
    ]
    return "\n".join(lines[:5])


def check_database(path: Path, copy: Path) -> None:
    shutil.copy(path, copy)
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []
        assert db.execute("SELECT count(*) FROM memories").fetchone()[0] > 0
        bad = "SELECT count(*) FROM memories WHERE not json_valid(metadata) OR not json_valid(tags) OR content = ''"
        assert db.execute(bad).fetchone() == (0,)


def corpus_of(orchestrator: Orchestrator) -> list[dict[str, Any]]:
    session_id = orchestrator.ask("create_session", user_id="ada")["session_id"]
    memory_id = orchestrator.ask("add_memory", content="the first memory", tags=["t"], parent_id=session_id)[
        "memory_id"
    ]
    group_id = orchestrator.ask("create_context_group", name="group")["group_id"]
    return valid_requests(memory_id, session_id, group_id)


def test_mutated_requests_are_each_answered_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\nfuzz: FUZZ_SEED={SEED} FUZZ_REQUESTS={REQUESTS}\n")
    with running_orchestrator(tmp_path) as orchestrator:
        pid = orchestrator.pid
        messages = iter(Mutations(SEED, corpus_of(orchestrator)))
        polite = PoliteCaller(orchestrator.address)
        polite.round()
        with orchestrator.peer(dealer=True) as peer, polite:
            warm = min(REQUESTS, 2000)
            outcomes = send_all(peer.socket, messages, warm)
            resident_mb = orchestrator.resident_mb()
            began_s = time.monotonic()
            outcomes += send_all(peer.socket, messages, REQUESTS - warm)
            took_s = time.monotonic() - began_s
        polite.failure is None or pytest.fail(f"seed {SEED}: the polite caller failed: {polite.failure!r}")
        grown_mb = orchestrator.resident_mb() - resident_mb
        health = orchestrator.ask("health_check")
        with capsys.disabled():
            sys.stdout.write(f"fuzz: {took_s:.1f} s, +{grown_mb:.0f} MiB, polite rounds {polite.rounds}, {outcomes}\n")
        assert (orchestrator.alive, health["pid"], health["state"]) == (True, pid, "healthy")
        assert sum(outcomes.values()) == REQUESTS
        assert outcomes["internal_error"] == 0, f"seed {SEED}: {log_text(tmp_path)}"
        assert outcomes["success"] > REQUESTS // 20
        assert grown_mb < GROWTH_MB
        assert polite.rounds > 1
        assert orchestrator.terminate() == 0
        check_database(orchestrator.database, tmp_path / "copy.db")
