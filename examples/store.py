"""Storing conversations: a session for each of theirs, a memory for each turn, nothing twice.

A session is ended when all its turns are in, so an open one was left by a run that broke off. Such a session, one that
the file tells otherwise by now, and a second copy are deleted with all they hold, and stored anew if they belong there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from locomo import Conversation, Session
from report import Report

from memory_client import MemoryClient

BATCH = 200
POLL_S = 0.2
# Without any progress for this long the questions are asked all the same.
PATIENCE_S = 120.0


def store_all(client: MemoryClient, conversations: list[Conversation], report: Report) -> None:
    """Bring the namespace to hold each conversation exactly once."""
    began = time.monotonic()
    missing = [(conversation, session) for conversation in conversations for session in _prepare(client, conversation)]
    turns = sum(len(session.turns) for _, session in missing)
    if turns:
        with report.bar("storing turns", turns) as advance:
            for conversation, session in missing:
                for count in _store(client, conversation, session):
                    advance(count)
    total = sum(conversation.turns for conversation in conversations)
    report.stored(turns, total - turns, time.monotonic() - began)


def _prepare(client: MemoryClient, conversation: Conversation) -> list[Session]:
    """The sessions that are not stored yet; what is there and should not be is deleted."""
    wanted = {session.digest: session for session in conversation.sessions}
    for found in _all_sessions(client, conversation.sample_id):
        complete = found["session_state"] == "ended"
        if complete and wanted.pop(found["metadata"].get("digest"), None) is not None:
            continue
        client.delete_memory(found["session_id"], cascade=True)
    return list(wanted.values())


def _all_sessions(client: MemoryClient, user_id: str) -> list[dict[str, Any]]:
    found, cursor = [], None
    while True:
        page = client.list_sessions(user_id, limit=1000, cursor=cursor)
        found += page["results"]
        cursor = page.get("next_cursor")
        if cursor is None:
            return found


def _store(client: MemoryClient, conversation: Conversation, session: Session) -> Iterator[int]:
    """Store one session; yields how many turns went in with each batch."""
    metadata = {
        "sample_id": conversation.sample_id,
        "number": session.number,
        "date_time": session.date_time,
        "started_at": session.started_at,
        "digest": session.digest,
    }
    session_id = client.create_session(conversation.sample_id, "conversation", metadata)["session_id"]
    memories = [
        {
            "content": turn.content,
            "memory_type": "turn",
            "tags": [turn.speaker],
            "metadata": {"dia_id": turn.dia_id, "speaker": turn.speaker, "sample_id": conversation.sample_id},
            "occurred_at": turn.occurred_at,
            "parent_id": session_id,
        }
        for turn in session.turns
    ]
    for start in range(0, len(memories), BATCH):
        yield client.batch_add_memories(memories[start : start + BATCH])["count"]
    client.end_session(session_id)
    client.set_session_id(None)


def wait_for_vectors(client: MemoryClient, report: Report) -> None:
    """Return when every memory has its vector, or when there is no hope of that."""
    began = last_change = time.monotonic()
    left = _pending(client)
    if left == 0:
        return
    with report.bar("making vectors", left or 0) as advance:
        while left != 0 and time.monotonic() - last_change < PATIENCE_S:
            time.sleep(POLL_S)
            now_left = _pending(client)
            if now_left is not None and now_left != left:
                last_change = time.monotonic()
                advance(max(0, left - now_left) if left is not None else 0, total=now_left if left is None else None)
                left = now_left
            if _hopeless(client):
                break
    report.vectors(left, time.monotonic() - began)


def _pending(client: MemoryClient) -> int | None:
    """Memories without a vector; None while that cannot be known."""
    if "loading" in client.health_check()["readiness"].values():
        return None
    count = int(client.stats()["pending"])
    if count == 0:  # the index follows the store by milliseconds, so one zero proves nothing
        time.sleep(POLL_S)
        count = int(client.stats()["pending"])
    return count


def _hopeless(client: MemoryClient) -> bool:
    return bool(client.health_check()["readiness"]["embedding"] in ("off", "unavailable"))


def cached_answers(client: MemoryClient) -> int:
    """How many searches the service has answered from its cache so far."""
    results = client.health_check()["caches"]["results"]
    return int(results["hits"] + results["redis_hits"])
