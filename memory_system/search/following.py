"""One step along the log of changes: read what the changed rows are now, and put it into the view."""

from __future__ import annotations

import sqlite3
from contextlib import AbstractContextManager

from memory_system.search import feed, word_keeping
from memory_system.search.view import View, has_vector, put, remove


class LogGap(Exception):
    """Changes that the index has not seen are no longer in the log."""


def follow(
    conn: sqlite3.Connection, view: View, lock: AbstractContextManager[object], with_metadata: bool
) -> tuple[int, list[int]]:
    """Apply one batch of the log to the view, in a read transaction of `conn`: how many changes it had, and the rows
    that are new or changed and have no vector yet.

    Rows are read and texts analysed without the lock, by which searches are held up. Raises LogGap.
    """
    changes = feed.read_log(conn, view.seq)
    last = feed.last_seq(conn)
    if changes[0][0] != view.seq + 1 if changes else last != view.seq:
        raise LogGap(f"applied up to {view.seq}, the log goes on at {changes[0][0] if changes else last + 1}")
    if not changes:
        return 0, []
    row_ids = list({row_id: None for _, row_id, _ in changes})
    entries = feed.read_rows(conn, row_ids, view.model_id, with_metadata)
    texts = feed.read_texts(conn, word_keeping.unread(view, entries))
    words = view.words.analyse([text for _, _, text in texts])
    with lock:
        for row_id in row_ids:
            entry = entries.get(row_id)
            remove(view, row_id) if entry is None else put(view, entry)
        word_keeping.add(view, texts, words)
        view.seq = changes[-1][0]
        if view.vectors is None:
            return len(changes), []
        fresh = {row_id for _, row_id, op in changes if op == "put" and row_id in entries}
        return len(changes), [row_id for row_id in row_ids if row_id in fresh and not has_vector(view, row_id)]
