"""A tenant whose every trace is a word of its own, and a list of everything that somebody else can ask about it.

`ATTEMPTS` has for each action of the protocol what a stranger would send: a function of all ids and names of the
tenant, so that only rights stand between the stranger and the data.
"""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory_system import protocol
from tests.support.process import Peer
from tests.support.wire import Reply, decode_reply, encode, envelope, request_id

Data = dict[str, Any]


def mark(kind: str) -> str:
    """A word that nothing else has."""
    return f"{kind}{secrets.token_hex(8)}"


@dataclass
class Tenant:
    """What one tenant keeps; `words` must be seen by nobody else. `planted`: those that strangers have written into
    namespaces of their own, where they may read them."""

    namespace: str
    words: dict[str, str] = field(default_factory=dict)
    ids: dict[str, Any] = field(default_factory=dict)
    planted: set[bytes] = field(default_factory=set)

    def word(self, kind: str) -> str:
        return self.words.setdefault(kind, mark(kind))

    def secrets(self) -> list[bytes]:
        """Words and ids that are unique to the tenant, as they stand in a reply of either encoding."""
        named = [value for value in self.ids.values() if isinstance(value, str)]
        return [value.encode() for value in [*self.words.values(), *named]]


def fill(tenant: Tenant, peer: Peer) -> None:
    """Have the tenant keep one of everything, by its own key."""
    w, around = tenant.word, {"namespace": tenant.namespace, "agent_id": tenant.word("agent")}

    def do(action: str, more: dict[str, Any] | None = None, /, **data: Any) -> Reply:
        reply = peer.ask(action, {**around, **(more or {})}, **data)
        assert reply["status"] == "success", reply
        return reply

    ids = tenant.ids
    ids["session"] = do(
        "create_session", user_id=w("user"), session_type=w("talk"), session_metadata={w("key"): w("value")}
    )["session_id"]
    described = {
        "memory_type": w("type"), "tags": [w("tag")], "metadata": {w("key"): w("value")}, "user_id": w("user"),
    }  # fmt: skip
    inside = {"session_id": ids["session"]}
    ids["memory"] = do("add_memory", inside, content=f"the harbour is {w('text')}", **described)["memory_id"]
    ids["child"] = do("add_memory", content=f"a {w('below')} boat", parent_id=ids["memory"], **described)["memory_id"]
    ids["other"], ids["third"] = do(
        "batch_add_memories",
        memories=[{"content": f"the harbour sleeps {w('text')}", **described}, {"content": w("lone"), **described}],
    )["memory_ids"]
    do("update_memory", memory_id=ids["memory"], update_payload={"content": f"the harbour was {w('later')}"})
    do("add_relationship", source_id=ids["memory"], target_id=ids["other"], relationship_type=w("tie"))
    ids["group"] = do("create_context_group", name=w("group"), description=w("about"))["group_id"]
    do("add_to_group", group_id=ids["group"], memory_id=ids["memory"])
    ids["request"] = request_id() + w("request")
    do("add_memory", {"request_id": ids["request"]}, content=w("once"), **described)
    page = do("list_memories", limit=1)
    ids["cursor"] = page["next_cursor"]
    ids["children_cursor"] = do("get_children", parent_id=ids["session"], limit=1).get("next_cursor", ids["cursor"])
    do("end_session", session_id=ids["session"], summary=w("summary"))


def _text(tenant: Tenant) -> str:
    return f"harbour {tenant.word('text')} {tenant.word('later')} {tenant.word('lone')}"


def _line(tenant: Tenant) -> Data:
    return {"kind": "memory", "memory_id": tenant.ids["memory"], "content": "planted", "created_at": 1.0}


Attempt = Callable[[Tenant], Data]
# action -> what a stranger would send. A new action needs its own: the test of the matrix fails without.
ATTEMPTS: dict[str, Sequence[Attempt]] = {
    "create_session": [
        lambda t: {"user_id": t.word("user"), "session_metadata": {"from": "a stranger"}},
        lambda t: {"user_id": t.word("user"), "created_by": t.word("agent")},
    ],
    "end_session": [lambda t: {"session_id": t.ids["session"], "summary": "ended by a stranger"}],
    "resume_session": [lambda t: {"session_id": t.ids["session"]}],
    "get_session": [lambda t: {"session_id": t.ids["session"]}, lambda t: {}],
    "list_sessions": [lambda t: {}, lambda t: {"user_id": t.word("user")}, lambda t: {"session_state": "ended"}],
    "add_memory": [
        lambda t: {"content": "planted", "parent_id": t.ids["memory"]},
        lambda t: {"content": "planted", "parent_id": t.ids["session"]},
        lambda t: {"content": "planted", "user_id": t.word("user"), "created_by": t.word("agent")},
    ],
    "get_memory": [
        lambda t: {"memory_id": t.ids["memory"]},
        lambda t: {"memory_id": t.ids["session"]},
        lambda t: {"memory_id": t.ids["child"], "touch": False},
    ],
    "update_memory": [
        lambda t: {"memory_id": t.ids["memory"], "update_payload": {"content": "changed by a stranger"}},
        lambda t: {"memory_id": t.ids["memory"], "update_payload": {"importance": 0.1}, "expected_version": 99},
        lambda t: {"memory_id": t.ids["child"], "update_data": {"parent_id": None}},
    ],
    "delete_memory": [
        lambda t: {"memory_id": t.ids["memory"], "cascade": False},
        lambda t: {"memory_id": t.ids["session"], "cascade": True},
    ],
    "get_children": [
        lambda t: {"parent_id": t.ids["memory"]},
        lambda t: {"parent_id": t.ids["session"], "include_archived": True},
        lambda t: {"parent_id": t.ids["session"], "limit": 1, "cursor": t.ids["children_cursor"]},
    ],
    "search_memory": [
        lambda t: {"query": _text(t), "include_archived": True},
        lambda t: {"query": "harbour", "parent_id": t.ids["session"]},
        lambda t: {"query": "harbour", "memory_type": t.word("type"), "explain": True, "highlight": True},
    ],
    "semantic_search": [
        lambda t: {"query": _text(t), "k": 1000, "explain": True},
        lambda t: {"query": "harbour", "mode": "dense", "k": 1000, "min_score": -1.0},
        lambda t: {"query": "harbour", "expand": "parent", "filters": {"user_id": t.word("user")}},
        lambda t: {"query": "harbour", "filters": {f"metadata.{t.word('key')}": t.word("value")}},
    ],
    "search_similar": [lambda t: {"memory_id": t.ids["memory"], "k": 100, "min_score": -1.0}],
    "batch_search": [lambda t: {"queries": [{"query": _text(t), "k": 100}, {"query": "boat", "mode": "keyword"}]}],
    "add_relationship": [
        lambda t: {"source_id": t.ids["memory"], "target_id": t.ids["third"], "relationship_type": "planted"},
        lambda t: {
            "source_id": t.ids["memory"], "target_id": t.ids["other"],
            "relationship_type": t.word("tie"), "strength": 0.1,
        },
    ],
    "remove_relationship": [lambda t: {"source_id": t.ids["memory"], "target_id": t.ids["other"]}],
    "get_related_memories": [
        lambda t: {"memory_id": t.ids["memory"]},
        lambda t: {"memory_id": t.ids["other"], "relationship_type": t.word("tie"), "direction": "incoming"},
    ],
    "reinforce_memory": [lambda t: {"memory_id": t.ids["memory"]}],
    "batch_add_memories": [
        lambda t: {"memories": [{"content": "planted", "parent_id": t.ids["memory"]}, {"content": "two"}]}
    ],
    "batch_get_memories": [
        lambda t: {"memory_ids": [t.ids["memory"], t.ids["child"], t.ids["session"], "mem-of-nobody"]}
    ],
    "create_context_group": [lambda t: {"name": t.word("group"), "description": "a stranger's"}],
    "list_context_groups": [lambda t: {}],
    "add_to_group": [lambda t: {"group_id": t.ids["group"], "memory_id": t.ids["third"]}],
    "remove_from_group": [lambda t: {"group_id": t.ids["group"], "memory_id": t.ids["memory"]}],
    "get_memories_by_group": [lambda t: {"group_id": t.ids["group"], "include_archived": True}],
    "list_memories": [
        lambda t: {"include_archived": True, "include_sessions": True, "limit": 1000},
        lambda t: {"limit": 1, "cursor": t.ids["cursor"]},
        lambda t: {"filters": {"or": [{"user_id": t.word("user")}, {"tags": {"any": [t.word("tag")]}}]}},
        lambda t: {"filters": {"memory_id": {"in": [t.ids["memory"], t.ids["child"]]}}, "sort_field": "importance"},
    ],
    "get_memory_history": [lambda t: {"memory_id": t.ids["memory"]}],
    "forget": [lambda t: {"user_id": t.word("user")}, lambda t: {"session_id": t.ids["session"]}],
    "stats": [lambda t: {}],
    "get_commit_seq": [lambda t: {}],
    "health_check": [lambda t: {}],
    "get_request_status": [lambda t: {"request_id": t.ids["request"]}],
    "run_decay": [
        lambda t: {"namespaces": [t.namespace], "dry_run": True},
        lambda t: {"namespaces": [t.namespace], "as_of": 4e9, "dry_run": True},
        lambda t: {},
    ],
    "run_consolidation": [lambda t: {"namespaces": [t.namespace], "dry_run": True}, lambda t: {}],
    "undo_consolidation": [lambda t: {"memory_id": t.ids["memory"]}],
    "run_cleanup": [lambda t: {"namespaces": [t.namespace]}, lambda t: {"dry_run": True}],
    "run_snapshot": [lambda t: {}],
    "run_checkpoint": [lambda t: {}],
    "run_integrity_check": [lambda t: {"full": True}],
    "list_runs": [lambda t: {}, lambda t: {"run_id": 1}],
    "reindex": [lambda t: {}, lambda t: {"vectors": True}],
    "backup": [lambda t: {"dry_run": True}, lambda t: {}],
    "export_memories": [lambda t: {}, lambda t: {"all_namespaces": True, "vectors": True}],
    "import_memories": [
        lambda t: {"records": [_line(t)], "on_conflict": "overwrite"},
        lambda t: {"records": [{**_line(t), "namespace": t.namespace}], "dry_run": True},
    ],
}  # fmt: skip


def ways(tenant: Tenant, own: str) -> dict[str, dict[str, Any]]:
    """What may stand around an attempt: by the tenant's namespace and others like it, or from the stranger's own."""
    there, agent = tenant.namespace, tenant.words["agent"]
    return {
        "in its namespace": {"namespace": there},
        "in its namespace, in its name": {"namespace": there, "agent_id": agent},
        "in its namespace, in its session": {"namespace": there, "session_id": tenant.ids["session"]},
        "in its namespace, under its request_id": {"namespace": there, "request_id": tenant.ids["request"]},
        "in its namespace, as a legacy caller": {"namespace": there, "v": None},
        "below its namespace": {"namespace": f"{there}/below"},
        "above its namespace": {"namespace": there.rpartition("/")[0]},
        "in a namespace like it": {"namespace": f"{there}s"},
        "in all namespaces": {"namespace": "*"},
        "around its namespace": {"namespace": f"{own}/../{there}"},
        "in its namespace, in capitals": {"namespace": there.upper()},
        "without a namespace": {},
        "from the own namespace": {"namespace": own},
        "from the own namespace, in its name": {"namespace": own, "agent_id": agent},
        "from the own namespace, in its session": {"namespace": own, "session_id": tenant.ids["session"]},
        "from the own namespace, under its request_id": {"namespace": own, "request_id": tenant.ids["request"]},
        "from the own namespace, as a legacy caller": {"namespace": own, "v": None},
        "on its behalf": {"namespace": there, "on_behalf_of": "alma"},
        "on its behalf, in two steps": {"namespace": there, "on_behalf_of": "boris>alma"},
        "on behalf of an administrator": {"namespace": there, "on_behalf_of": "adam"},
    }


@dataclass(frozen=True)
class Told:
    """One attempt and what came of it. `leaked`: what of the tenant the reply had, and the stranger did not bring."""

    action: str
    way: str
    data: Data
    reply: Reply
    leaked: tuple[bytes, ...]


def attempt_everything(
    tenant: Tenant, peer: Peer, own: str, chosen: Collection[str] = (), **envelope_fields: Any
) -> list[Told]:
    """Every attempt of every action in every way (or the chosen ones), through this peer. The encodings alternate."""
    told: list[Told] = []
    for way, around in ways(tenant, own).items():
        if not chosen or way in chosen:
            for action, attempts in ATTEMPTS.items():
                for make in attempts:
                    asked = {**envelope_fields, **around}
                    told.append(ask(tenant, peer, action, way, asked, make(tenant), len(told)))
    return told


def ask(
    tenant: Tenant,
    peer: Peer,
    action: str,
    way: str,
    around: dict[str, Any],
    data: Data,
    number: int = 0,
) -> Told:
    """Make one attempt."""
    encoding = ("json", "msgpack")[number % 2]
    request = encode(envelope(action, data, **around), encoding)
    peer.send(request)
    body = peer.receive()
    reply = decode_reply(body, encoding)
    sent = {secret for secret in tenant.secrets() if secret in request}
    leaked = tuple(secret for secret in tenant.secrets() if secret in body and secret not in sent | tenant.planted)
    if action in protocol.WRITE_ACTIONS and reply["status"] == "success":
        tenant.planted |= sent
    return Told(action, way, data, reply, leaked)


# Everything of a tenant that the database has, read by a connection that knows nothing of the service.
_STATE = {
    "memories": "SELECT * FROM memories WHERE namespace = ?",
    "sessions": "SELECT s.* FROM sessions s JOIN memories m USING (row_id) WHERE m.namespace = ?",
    "history": "SELECT h.* FROM memory_history h JOIN memories m USING (row_id) WHERE m.namespace = ?",
    "relationships": "SELECT r.* FROM relationships r JOIN memories m "
    "ON m.row_id IN (r.source_row_id, r.target_row_id) "
    "WHERE m.namespace = ?",
    "groups": "SELECT * FROM context_groups WHERE namespace = ?",
    "members": "SELECT gm.* FROM group_members gm JOIN memories m USING (row_id) WHERE m.namespace = ?",
    "requests": "SELECT * FROM idempotency WHERE namespace = ?",
    "commit_seq": "SELECT * FROM namespaces WHERE namespace = ?",
}


def state_of(tenant: Tenant, database: Path) -> dict[str, list[tuple[Any, ...]]]:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        return {name: sorted(db.execute(sql, (tenant.namespace,)).fetchall(), key=repr) for name, sql in _STATE.items()}
