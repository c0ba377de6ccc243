"""Keeping the words of the index in step with its rows: at a start, while it follows the log, and on disk."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

import numpy as np

from memory_system.log import get_logger
from memory_system.search import feed, word_file
from memory_system.search.columns import Columns
from memory_system.search.keywords import WordIndex, Words
from memory_system.search.manifest import SnapshotRefused
from memory_system.search.segment import Segment
from memory_system.search.tokens import Tokenizer
from memory_system.search.view import View, holds, put
from memory_system.search.word_file import Identity, Rows

log = get_logger(__name__)

# Texts taken in at once: some milliseconds of work.
_STEP: Final = 512
# So many are looked at by a search that finds no index: about a tenth of a second.
_NEWEST: Final = 2000


def fill(conn: sqlite3.Connection, view: View, lock: AbstractContextManager[object]) -> bool:
    """Take in some of the words that are lacking; whether there were any."""
    rows = view.lacking[-_STEP:]
    if not rows:
        return False
    texts = feed.read_texts(conn, rows)
    words = view.words.analyse([text for _, _, text in texts])
    with lock:
        if view.lacking[-_STEP:] == rows:  # not all begun anew meanwhile
            add(view, texts, words)
            del view.lacking[-_STEP:]
    return True


def begin_anew(folder: Path, view: View) -> None:
    """Forget all words, on disk too, and have them taken from the texts again, the newest first."""
    word_file.discard(folder)
    view.words.postings.clear()
    _note_lacking(view)


def newest(conn: sqlite3.Connection, namespace: str, tokenizer: Tokenizer, metadata_keys: Sequence[str]) -> View:
    """A view of a namespace's newest memories, without vectors, for searches while there is no other."""
    view = View(Columns(metadata_keys), None, WordIndex(tokenizer), None, "", 0)
    row_ids = feed.read_newest(conn, namespace, _NEWEST)
    for entry in feed.read_rows(conn, row_ids, None, bool(metadata_keys)).values():
        put(view, entry)
    texts = feed.read_texts(conn, row_ids)
    add(view, texts, view.words.analyse([text for _, _, text in texts]))
    return view


def add(view: View, texts: Sequence[feed.Text], words: Words) -> None:
    """Take in the words of those of the texts that are still their rows' and are not here yet."""
    slots = [_slot(view, row_id, digest) for row_id, digest, _ in texts]
    wanted = np.array([slot is not None and not view.words.postings.has(slot) for slot in slots], np.bool_)
    chosen = [slot for slot, want in zip(slots, wanted.tolist(), strict=True) if slot is not None and want]
    names, which = view.columns.namespaces(np.array(chosen, np.int64))
    view.words.add(chosen, [names[code] for code in which.tolist()], words.part(wanted))


def wrong(view: View, texts: Sequence[feed.Text], lock: AbstractContextManager[object]) -> list[int]:
    """Those of the rows, of which the index has this text, whose words are not in it as they should be."""
    words = view.words.analyse([text for _, _, text in texts])
    with lock:
        slots = [_slot(view, row_id, digest) for row_id, digest, _ in texts]
        held = np.array([slot is not None for slot in slots], np.bool_)
        names, which = view.columns.namespaces(np.array([slot for slot in slots if slot is not None], np.int64))
        rows = [row_id for (row_id, _, _), slot in zip(texts, slots, strict=True) if slot is not None]
        differs = view.words.disagreement(
            [slot for slot in slots if slot is not None], [names[code] for code in which.tolist()], words.part(held)
        )
    disagrees = differs()
    return [row_id for row_id, wrong in zip(rows, disagrees.tolist(), strict=True) if wrong]


def unread(view: View, entries: Mapping[int, feed.Entry]) -> list[int]:
    """Those of the rows whose words are not here."""
    return [row_id for row_id, (row, _) in entries.items() if not _has_words(view, row_id, row.digest)]


def restore(folder: Path, view: View) -> None:
    """Take over the saved words, row by row as far as they agree with the database."""
    try:
        saved = word_file.load(folder, _identity(view), view.seq)
    except SnapshotRefused as refusal:
        log.info("search_words_refused", reason=str(refusal), action="they are taken from the texts anew")
        saved = []
    _adopt(view, saved)
    if not view.lacking:
        view.words.postings.saved_changes = view.words.postings.changes


def inherit(view: View, before: View) -> None:
    """Take over the words of another view of the same store, as far as they are of the same texts."""
    _adopt(view, [(_copy(segment), _rows(before.columns, segment)) for segment in before.words.postings.segments])


def save(folder: Path, view: View, lock: AbstractContextManager[object]) -> bool:
    """Save the words if they changed since they were saved last; whether they were. A failure is logged."""
    postings = view.words.postings
    if postings.changes == postings.saved_changes:
        return False
    with lock:
        changes, segments, seq = postings.changes, list(postings.segments), view.seq
        rows = {id(segment): _rows(view.columns, segment) for segment in segments if segment.file is None}
    try:
        written = word_file.save(folder, segments, rows, _identity(view), seq)
    except OSError as error:
        log.warning("search_words_not_saved", reason=str(error))
        return False
    postings.saved_changes = changes
    log.info("search_words_saved", texts=postings.texts, segments=len(segments), written=written, seq=seq)
    return True


def _adopt(view: View, saved: Sequence[tuple[Segment, Rows]]) -> None:
    postings, columns = view.words.postings, view.columns
    for segment, rows in reversed(saved):  # where a row stands twice, the newer text is the one that counts
        slots = columns.lookup(rows.row_ids)
        held = slots >= 0
        held[held] = columns.digests[slots[held]] == rows.digests[held]
        held[held] = ~postings.has_each(slots[held])
        segment.slots[held] = slots[held]
        if held.any():
            postings.adopt(segment, *columns.namespaces(slots[held]), oldest=True)
    _note_lacking(view)
    log.info("search_words_loaded", texts=postings.texts, lacking=len(view.lacking))


def _note_lacking(view: View) -> None:
    slots = view.columns.alive()
    slots = slots[~view.words.postings.has_each(slots)]
    view.lacking = np.sort(view.columns.row_ids[slots]).tolist()


def _copy(segment: Segment) -> Segment:
    """The same postings, for rows at other slots."""
    arrays = (segment.keys, segment.starts, segment.docs, segment.counts, segment.lengths, segment.notes)
    return Segment(*arrays, slots=np.full(len(segment), -1, np.int32), file=segment.file)


def _rows(columns: Columns, segment: Segment) -> Rows:
    held = segment.slots >= 0
    rows = Rows(np.zeros(len(segment), np.int64), np.zeros(len(segment), "V16"))
    rows.row_ids[held] = columns.row_ids[segment.slots[held]]
    rows.digests[held] = columns.digests[segment.slots[held]]
    return rows


def _slot(view: View, row_id: int, digest: bytes) -> int | None:
    return view.columns.slot(row_id) if holds(view, row_id, digest) else None


def _has_words(view: View, row_id: int, digest: bytes) -> bool:
    slot = _slot(view, row_id, digest)
    return slot is not None and view.words.postings.has(slot)


def _identity(view: View) -> Identity:
    return Identity(view.epoch, view.words.tokenizer.identity)
