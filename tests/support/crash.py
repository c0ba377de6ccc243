"""Clients whose service is killed under them, and a checker of what is left.

Each worker writes to its own memories, one call after another, and notes each call's outcome in a journal: ok (it was
acknowledged), failed (the service refused it) or unknown (no answer came in time). In between it reads what it wrote,
which has to be what was acknowledged. The checker knows the service's
schema and nothing else of it: it opens the database by itself and compares it with the journals.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from memory_client import MemoryClient

Outcome = str  # ok | failed | unknown

NAMESPACE = "crash"
KINDS = ("add", "add", "child", "update", "batch", "delete", "relate", "reinforce")
READS = 0.2  # before how many of the writes there is a read
BATCH = 3


@dataclass
class Entry:
    """One call: which texts it writes, which memories it touches, and what the client was told."""

    kind: str
    outcome: Outcome
    texts: list[str] = field(default_factory=list)
    memory_ids: list[str] = field(default_factory=list)
    commit_seq: int | None = None
    code: str | None = None
    at_s: float = 0.0  # of the monotonic clock, when the client was told


class Journal:
    """The entries of one worker, in order; each stands in the file before the next call begins."""

    def __init__(self, path: Path) -> None:
        self.entries: list[Entry] = []
        self._file = path.open("w")

    def note(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._file.write(json.dumps(asdict(entry)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class Worker(threading.Thread):
    """A client that writes until told to stop. Memories of a call without an answer are not touched again. `reading`:
    it also reads what it wrote; where calls are done twice on purpose, that is not what it was told."""

    def __init__(
        self, number: int, endpoint: str, folder: Path, seed: int, stop: threading.Event, *, reading: bool = True
    ) -> None:
        super().__init__(name=f"client-{number}")
        self.journal = Journal(folder / f"journal-{number}.jsonl")
        self.error: BaseException | None = None
        self._number = number
        self._endpoint = endpoint
        self._random = random.Random(f"{seed}-{number}")
        self._stop_event = stop
        self._reading = reading
        self._made = 0
        self._versions: dict[str, int] = {}
        self._texts: dict[str, str] = {}

    def run(self) -> None:
        agent_id = f"client-{self._number}"
        try:
            with MemoryClient(
                self._endpoint, agent_id=agent_id, namespace=NAMESPACE, timeout_ms=90_000, attempt_timeout_ms=2_000
            ) as client:
                while not self._stop_event.is_set():
                    self._step(client)
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.journal.close()

    def _step(self, client: MemoryClient) -> None:
        kind = self._random.choice(KINDS)
        if len(self._versions) < 2:
            kind = "add"
        elif self._reading and self._random.random() < READS:
            self._read(client)
        getattr(self, f"_do_{kind}")(client)

    def _read(self, client: MemoryClient) -> None:
        """What was acknowledged is what is read, at any time; no answer is no answer."""
        memory_id = self._own()
        reply = client.get_memory(memory_id, touch=False)
        if reply["status"] == "error":
            assert reply["error_code"] != "memory_not_found", f"{memory_id} was acknowledged and is not there"
        else:
            memory = reply["memory"]
            assert memory["version"] == self._versions[memory_id], memory
            assert memory["content"] == self._texts[memory_id], memory
        client.search_memory(self._texts[memory_id].split()[1])

    def _note(self, reply: dict[str, Any], kind: str, texts: list[str], memory_ids: list[str]) -> bool:
        ok = reply["status"] == "success"
        outcome = "ok" if ok else str(reply["outcome"]).replace("not_sent", "failed")
        told = (reply.get("commit_seq"), reply.get("error_code"), time.monotonic())
        self.journal.note(Entry(kind, outcome, texts, memory_ids, *told))
        if outcome == "unknown":
            for memory_id in memory_ids:
                self._versions.pop(memory_id, None)
        return ok

    def _text(self) -> str:
        self._made += 1
        return f"memory w{self._number}n{self._made} of a client that goes on writing"

    def _own(self) -> str:
        return self._random.choice(list(self._versions))

    def _do_add(self, client: MemoryClient) -> None:
        text = self._text()
        reply = client.add_memory(text, tags=["crash"])
        memory_ids = [reply["memory_id"]] if reply["status"] == "success" else []
        if self._note(reply, "add", [text], memory_ids):
            self._keep(memory_ids, [text])

    def _do_child(self, client: MemoryClient) -> None:
        text = self._text()
        reply = client.add_memory(text, parent_id=self._own())
        memory_ids = [reply["memory_id"]] if reply["status"] == "success" else []
        if self._note(reply, "child", [text], memory_ids):
            self._keep(memory_ids, [text])

    def _keep(self, memory_ids: list[str], texts: list[str]) -> None:
        self._versions |= dict.fromkeys(memory_ids, 1)
        self._texts |= dict(zip(memory_ids, texts, strict=True))

    def _do_batch(self, client: MemoryClient) -> None:
        texts = [self._text() for _ in range(BATCH)]
        reply = client.batch_add_memories([{"content": text} for text in texts])
        memory_ids = reply.get("memory_ids", [])
        if self._note(reply, "batch", texts, memory_ids):
            self._keep(memory_ids, texts)

    def _do_update(self, client: MemoryClient) -> None:
        memory_id, text = self._own(), self._text()
        reply = client.update_memory(memory_id, {"content": text}, expected_version=self._versions[memory_id])
        if self._note(reply, "update", [text], [memory_id]):
            self._versions[memory_id] += 1
            self._texts[memory_id] = text

    def _do_delete(self, client: MemoryClient) -> None:
        memory_id = self._own()
        if self._note(client.delete_memory(memory_id, cascade=False), "delete", [], [memory_id]):
            del self._versions[memory_id]

    def _do_relate(self, client: MemoryClient) -> None:
        source, target = self._random.sample(list(self._versions), 2)
        self._note(client.add_relationship(source, target, "follows"), "relate", [], [source, target])

    def _do_reinforce(self, client: MemoryClient) -> None:
        memory_id = self._own()
        self._note(client.reinforce_memory(memory_id, 1.01), "reinforce", [], [memory_id])


@contextlib.contextmanager
def writing_clients(
    endpoint: str, folder: Path, seed: int, count: int = 8, *, first: int = 0, reading: bool = True
) -> Iterator[list[Worker]]:
    """Clients, numbered from `first`, that write while the block runs; at its end each finishes the call it is in."""
    stop = threading.Event()
    numbers = range(first, first + count)
    workers = [Worker(number, endpoint, folder, seed, stop, reading=reading) for number in numbers]
    for worker in workers:
        worker.start()
    try:
        yield workers
    finally:
        stop.set()
        for worker in workers:
            worker.join(60)
    assert [worker.error for worker in workers if worker.error is not None or worker.is_alive()] == []


def written_more(workers: list[Worker], calls: int, timeout_s: float = 30.0) -> None:
    """Wait until each client got so many answers more."""
    targets = [len(worker.journal.entries) + calls for worker in workers]
    deadline_s = time.monotonic() + timeout_s
    while any(len(worker.journal.entries) < target for worker, target in zip(workers, targets, strict=True)):
        assert time.monotonic() < deadline_s, "the clients do not get on"
        time.sleep(0.01)


# -- the checker ----------------------------------------------------------------------------------------------------


@dataclass
class Findings:
    """What differs between the journals and the database; all empty when every promise was kept."""

    missing: list[str] = field(default_factory=list)  # acknowledged, and not there
    twice: list[str] = field(default_factory=list)  # done more often than asked for
    refused: list[str] = field(default_factory=list)  # refused though nothing stood in the way
    undone: list[str] = field(default_factory=list)  # refused or deleted, and there all the same
    damage: list[str] = field(default_factory=list)  # the database contradicts itself


def check(database: Path, journals: list[list[Entry]]) -> Findings:
    """Compare a database that no process has open with the journals of its writers."""
    findings = Findings()
    with contextlib.closing(sqlite3.connect(database)) as db:
        findings.damage = damage(db)
        state = _Stored(db)
        for entries in journals:
            _check_texts(findings, state, entries)
            _check_counts(findings, state, entries)
        _check_sequence(findings, state, [entry for entries in journals for entry in entries])
    return findings


def until(entries: list[Entry], at_s: float) -> list[Entry]:
    """A journal as it would be had everything ended at that time: the call then under way has no answer."""
    told = [entry for entry in entries if entry.at_s < at_s]
    return told + [replace(entry, outcome="unknown") for entry in entries[len(told) : len(told) + 1]]


def damage(db: sqlite3.Connection) -> list[str]:
    """What the database's own checks find: pages, foreign keys, vectors, log."""
    found = [text for (text,) in db.execute("PRAGMA integrity_check") if text != "ok"]
    found += [f"foreign key: {row}" for row in db.execute("PRAGMA foreign_key_check")]
    for row_id, content, digest, vector_digest, vector in db.execute(
        "SELECT m.row_id, m.content, m.content_digest, e.digest, e.vector FROM memories m "
        "LEFT JOIN embeddings e ON e.row_id = m.row_id"
    ):
        if digest != content_digest(content):
            found.append(f"row {row_id}: the digest is not the content's")
        if vector is not None and (len(vector_digest) != 16 or len(vector) % 4 or not vector):
            found.append(f"row {row_id}: not a vector")
    return found + _log_damage(db)


def _log_damage(db: sqlite3.Connection) -> list[str]:
    """The log names each row that is there, and ends with its deletion for each that is gone."""
    last = dict(db.execute("SELECT row_id, op FROM index_log WHERE op <> 'vector' ORDER BY seq"))
    after = db.execute(
        "SELECT l.row_id FROM index_log l JOIN index_log d ON d.row_id = l.row_id AND d.op = 'delete' AND l.seq > d.seq"
    ).fetchall()
    here = {row_id for (row_id,) in db.execute("SELECT row_id FROM memories WHERE memory_type <> 'session'")}
    found = [f"row {row_id}: the log goes on after its deletion" for (row_id,) in after]
    found += [
        f"row {row_id}: there, but the log says {last.get(row_id)}" for row_id in here if last.get(row_id) != "put"
    ]
    return found + [f"row {r}: gone, and not logged" for r, op in last.items() if r not in here and op != "delete"]


def content_digest(content: str) -> bytes:
    return hashlib.blake2b(content.encode(), digest_size=16).digest()


class _Stored:
    """What the checker asks of the database, read once."""

    def __init__(self, db: sqlite3.Connection) -> None:
        sql = "SELECT memory_id, row_id, content, version, access_count FROM memories WHERE namespace = ?"
        rows = db.execute(sql, (NAMESPACE,)).fetchall()
        self.content = {memory_id: content for memory_id, _, content, _, _ in rows}
        self.version = {memory_id: version for memory_id, _, _, version, _ in rows}
        self.accesses = {memory_id: accesses for memory_id, _, _, _, accesses in rows}
        self.times = Counter(content for _, _, content, _, _ in rows)
        ids = {row_id: memory_id for memory_id, row_id, _, _, _ in rows}
        self.history = Counter(ids.get(row_id) for (row_id,) in db.execute("SELECT row_id FROM memory_history"))
        self.relations = {
            (ids.get(source), ids.get(target))
            for source, target in db.execute("SELECT source_row_id, target_row_id FROM relationships")
        }
        row = db.execute("SELECT commit_seq FROM namespaces WHERE namespace = ?", (NAMESPACE,)).fetchone()
        self.commit_seq: int = row[0] if row else 0


def _check_texts(findings: Findings, state: _Stored, entries: list[Entry]) -> None:
    """Each text stands where the last acknowledged call put it, once; what was deleted or refused stands nowhere."""
    text_of: dict[str, str | None] = {}  # None: deleted
    uncertain: set[str] = set()
    for entry in entries:
        if entry.outcome == "unknown":
            uncertain.update(entry.memory_ids)
        elif entry.outcome == "failed":
            findings.refused.append(f"{entry.kind} {entry.memory_ids} {entry.code}")
            findings.undone += [text for text in entry.texts if state.times[text]]
        elif entry.kind in ("add", "child", "batch", "update"):
            text_of |= dict(zip(entry.memory_ids, entry.texts, strict=True))
        elif entry.kind == "delete":
            text_of[entry.memory_ids[0]] = None
        findings.twice += [text for text in entry.texts if state.times[text] > 1]
    for memory_id in text_of.keys() - uncertain:
        text, stored = text_of[memory_id], state.content.get(memory_id)
        if text is None and stored is not None:
            findings.undone.append(memory_id)
        elif text != stored:
            findings.missing.append(f"{memory_id}: {text!r}, found {stored!r}")


def _check_counts(findings: Findings, state: _Stored, entries: list[Entry]) -> None:
    """Updates, reinforcements and relationships of each memory: all acknowledged ones, and none twice."""
    asked: dict[str, Counter[tuple[str, Outcome]]] = {}
    for entry in entries:
        for memory_id in entry.memory_ids[:1] if entry.kind in ("update", "reinforce") else ():
            asked.setdefault(memory_id, Counter())[entry.kind, entry.outcome] += 1
    for memory_id in asked.keys() & state.content.keys():
        counts = asked[memory_id]
        for kind, done in (
            ("update", state.version[memory_id] - 1),
            ("update", state.history[memory_id]),
            ("reinforce", state.accesses[memory_id]),
        ):
            acknowledged = counts[kind, "ok"]
            if done < acknowledged:
                findings.missing.append(f"{memory_id}: {done} of {acknowledged} times {kind}")
            elif done > acknowledged + counts[kind, "unknown"]:
                findings.twice.append(f"{memory_id}: {done} times {kind}, not {acknowledged}")
    related = [tuple(entry.memory_ids) for entry in entries if entry.kind == "relate" and entry.outcome == "ok"]
    findings.missing += [
        f"relationship {pair}" for pair in related if state.content.keys() >= set(pair) and pair not in state.relations
    ]


def _check_sequence(findings: Findings, state: _Stored, entries: list[Entry]) -> None:
    """commit_seq counts what was done: each acknowledged call once, with a number of its own."""
    acknowledged = [entry.commit_seq for entry in entries if entry.outcome == "ok"]
    unknown = sum(entry.outcome == "unknown" for entry in entries)
    repeated = [number for number, times in Counter(acknowledged).items() if times > 1]
    findings.twice += [f"commit_seq {number} was given to several calls" for number in repeated]
    if state.commit_seq > len(acknowledged) + unknown:
        findings.twice.append(f"commit_seq {state.commit_seq} after {len(acknowledged)} calls, {unknown} unknown")
    if state.commit_seq < len(acknowledged):
        findings.missing.append(f"commit_seq {state.commit_seq} after {len(acknowledged)} acknowledged calls")


def ready_within(ask: Any, limit_s: float, began_s: float) -> float:
    """Seconds since `began_s` at which the service answered; fails beyond the limit."""
    while True:
        with contextlib.suppress(TimeoutError):
            if ask("health_check", timeout_s=0.2)["readiness"]["store"] == "ready":
                return time.monotonic() - began_s
        assert time.monotonic() - began_s < limit_s, f"not ready within {limit_s} s"
