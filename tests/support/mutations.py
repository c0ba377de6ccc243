"""Requests that are nearly right: a seeded stream of mutations, who sends it, and a polite caller beside it."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Final

import msgpack
import zmq

from memory_client import MemoryClient
from memory_system import protocol
from tests.support.process import Orchestrator

WINDOW: Final = 48  # requests unanswered at a time
REPLY_WITHIN_S: Final = 30.0

Frames = list[bytes]
Request = dict[str, Any]


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


# What the fields of the agents take, by their names.
_SAMPLES: Final[dict[str, Any]] = {
    **{"topic": "trains", "content": "they run on rails", "source": "a book", "target": "rails", "prefix": "tr"},
    **{"query": "what runs on rails", "text": "the tea is hot", "user_id": "ada", "role": "user", "speaker": "Ada"},
    **{"limit": 3, "keep": 5, "token_budget": 200, "max_items": 4, "relevant_limit": 2, "expected_version": 1},
    **{"confidence": 0.5, "strength": 0.5, "importance": 0.4, "min_similarity": 0.1, "min_score": -0.5, "as_of": 1.7e9},
    **{"occurred_at": 1.7e9, "max_age_days": 9, "idle_timeout_s": 60, "min_importance": 0.0, "tags": ["t"]},
    **{"metadata": {"k": [1, {"a": None}]}, "supersedes": ["mem-none"], "columns": {"content": "text"}},
    **{"records": [{"topic": "a", "content": "b"}, {"topic": "c", "content": "d", "confidence": 0.2}]},
    **{"interactions": [{"role": "user", "content": "hello", "metadata": {"a": 1}}, {"role": "ada", "content": "x"}]},
    **{"conversations": [{"session_id": "s-1", "user_id": "ada", "turns": [{"role": "user", "content": "hi"}]}]},
    **{"relation": "follows", "session_type": "call", "session_state": "open", "mode": "keyword", "summary": "done"},
    **{"scope": "session", "method": "dense", "dry_run": True, "everything": False},
}


def described_requests(actions: list[dict[str, Any]], **ids: str) -> list[Request]:
    """Well-formed requests of each action that a program describes: with all its fields, and with those it needs.

    `ids` are values of fields that name something of the store, which an agent's own corpus has to make first.
    """
    values = {**_SAMPLES, **ids}
    around = {"v": 1, "request_id": "0123456789abcdef", "agent_id": "fuzz", "namespace": "default", "deadline_ms": 5000}
    requests: list[Request] = []
    for each in actions:
        fields = [field for field in each["fields"] if field["name"] in values or field["required"]]
        needed = {field["name"]: values.get(field["name"], "x") for field in fields if field["required"]}
        data = {field["name"]: values.get(field["name"], "x") for field in fields}
        requests += [{**around, "action": each["action"], "data": data}, {"action": each["action"], **needed}]
    return requests


# -- mutations --------------------------------------------------------------------------------------------------------

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


# -- the run ----------------------------------------------------------------------------------------------------------


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


def send_all(
    socket: zmq.Socket[bytes], messages: Iterator[Frames], count: int, seed: int, within_s: float = REPLY_WITHIN_S
) -> Counter[str]:
    """Send `count` messages with at most WINDOW unanswered, and never none answered for `within_s`; what the replies
    say, by status or error code."""
    outcomes: Counter[str] = Counter()
    sent = received = 0
    while received < count:
        while sent < count and sent - received < WINDOW:
            socket.send_multipart(next(messages))
            sent += 1
        assert socket.poll(int(within_s * 1000)), f"seed {seed}: {sent - received} of {sent} requests unanswered"
        with contextlib.suppress(zmq.Again):
            while True:
                outcomes[outcome(socket.recv_multipart(zmq.NOBLOCK)[-1])] += 1
                received += 1
    assert not socket.poll(300), f"seed {seed}: more replies than requests"
    return outcomes


def outcome(body: bytes) -> str:
    reply = protocol.decode_reply(body)
    if reply["status"] == "success":
        return "success"
    assert reply["error_code"] in protocol.ERROR_CODES, reply
    return str(reply["error_code"])


def corpus_of(orchestrator: Orchestrator) -> list[dict[str, Any]]:
    session_id = orchestrator.ask("create_session", user_id="ada")["session_id"]
    memory_id = orchestrator.ask("add_memory", content="the first memory", tags=["t"], parent_id=session_id)[
        "memory_id"
    ]
    group_id = orchestrator.ask("create_context_group", name="group")["group_id"]
    return valid_requests(memory_id, session_id, group_id)
