"""Clients that add, update and relate memories as fast as they can, and a checker of a copy of their store.

Each client notes what was acknowledged, in order. Nothing is deleted, and versions only rise: so a copy of the store
holds what was acknowledged up to some moment if it has every text, at least each version, and every relationship.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from memory_client import MemoryClient
from tests.support.crash import damage
from tests.support.service import wait_until


@dataclass(frozen=True)
class Written:
    """An acknowledged write: `added` with its text, a `version` of a memory, or a relationship to `other`."""

    memory_id: str
    text: str | None = None
    version: int | None = None
    other: str | None = None


@dataclass
class Client:
    number: int
    endpoint: str
    stop: threading.Event
    written: list[Written] = field(default_factory=list)
    error: BaseException | None = None

    def run(self) -> None:
        try:
            with MemoryClient(
                self.endpoint, agent_id=f"client-{self.number}", timeout_ms=30_000, raise_on_error=True
            ) as client:
                while not self.stop.is_set():
                    self._step(client)
        except BaseException as error:
            self.error = error
            raise

    def _step(self, client: MemoryClient) -> None:
        texts = [f"memory {len(self.written)}.{part} of client {self.number}" for part in range(2)]
        first, second = (client.add_memory(text, metadata={"filler": "x" * 200})["memory_id"] for text in texts)
        self.written += [Written(first, text=texts[0]), Written(second, text=texts[1])]
        version = client.update_memory(first, {"tags": ["updated"]})["version"]
        self.written.append(Written(first, version=version))
        client.add_relationship(first, second, "follows")
        self.written.append(Written(first, other=second))


class Clients(list[Client]):
    def written(self) -> list[Written]:
        """What was acknowledged up to now."""
        return [each for client in self for each in client.written[:]]


@contextlib.contextmanager
def clients_at_work(endpoint: str, count: int = 4) -> Iterator[Clients]:
    """Clients that write until the block ends."""
    stop = threading.Event()
    clients = Clients(Client(number, endpoint, stop) for number in range(count))
    threads = [threading.Thread(target=client.run, name=f"client-{client.number}") for client in clients]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: all(len(client.written) > 40 for client in clients), "every client has written", 30.0)
        yield clients
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert [client.error for client in clients if client.error] == []


def lacking(database: Path, written: list[Written]) -> list[str]:
    """What a copy lacks of these writes, and what is wrong with it. Knows the schema and nothing of the service."""
    try:
        with contextlib.closing(sqlite3.connect(database)) as db:
            found = damage(db)
            stored = {row[0]: row[1:] for row in db.execute("SELECT memory_id, content, version FROM memories")}
            related = set(
                db.execute(
                    "SELECT s.memory_id, t.memory_id FROM relationships r JOIN memories s ON s.row_id = source_row_id "
                    "JOIN memories t ON t.row_id = target_row_id"
                )
            )
    except sqlite3.Error as error:
        return [f"not readable: {error}"]
    for each in written:
        content, version = stored.get(each.memory_id, (None, 0))
        if each.text is not None and content != each.text:
            found.append(f"{each.memory_id}: {content!r}")
        if each.version is not None and version < each.version:
            found.append(f"{each.memory_id}: version {version}, not {each.version}")
        if each.other is not None and (each.memory_id, each.other) not in related:
            found.append(f"{each.memory_id} -> {each.other}")
    return found
