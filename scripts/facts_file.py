"""A file of facts: a SQLite database or JSON lines, row by row."""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from memory_system.errors import InvalidField

_MAGIC: Final = b"SQLite format 3\0"
# The names that the table of an older knowledge base goes by, the likeliest first.
_TABLES: Final = ("facts", "knowledge", "knowledge_base", "knowledge_facts", "memories", "entries")


@dataclass(frozen=True, slots=True)
class FactsFile:
    """`columns`: all names that rows have. `size`: the number of rows; of JSON lines the number of bytes."""

    path: Path
    table: str | None
    columns: tuple[str, ...]
    size: int

    @classmethod
    def open(cls, path: Path, table: str | None) -> FactsFile:
        """Raises InvalidField for a file that is neither, OSError for one that cannot be read."""
        with path.open("rb") as file:
            is_database = file.read(len(_MAGIC)) == _MAGIC
        if is_database:
            return _database(path, table)
        if table is not None:
            raise InvalidField("table", f"{path} is no SQLite database, and has no tables")
        names: dict[str, None] = {}
        for _, _, record in _lines(path):
            names.update(dict.fromkeys(record))
        return cls(path, None, tuple(names), path.stat().st_size)

    def rows(self) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
        """(where, how far, row): where for a message, how far of `size` when it is done."""
        yield from _lines(self.path) if self.table is None else _rows(self.path, self.table)


def _connect(path: Path) -> contextlib.closing[sqlite3.Connection]:
    return contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True))


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _database(path: Path, table: str | None) -> FactsFile:
    try:
        with _connect(path) as db:
            there = [name for (name,) in db.execute("SELECT name FROM sqlite_schema WHERE type IN ('table', 'view')")]
            chosen = _table(path, [name for name in there if not name.startswith("sqlite_")], table)
            columns = [row[0] for row in db.execute(f"SELECT * FROM {_quoted(chosen)} LIMIT 0").description]
            (size,) = db.execute(f"SELECT count(*) FROM {_quoted(chosen)}").fetchone()
    except sqlite3.Error as error:
        raise InvalidField("file", f"{path}: SQLite cannot read it: {error}") from None
    return FactsFile(path, chosen, tuple(columns), size)


def _table(path: Path, there: list[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in there:
            raise InvalidField("table", f"{path} has no table {asked}; it has {', '.join(there) or 'none'}")
        return asked
    known = {name.lower(): name for name in there}
    usual = next((known[name] for name in _TABLES if name in known), None)
    if usual is None and len(there) != 1:
        raise InvalidField("table", f"{path}: --table says which; it has {', '.join(there) or 'none'}")
    return usual or there[0]


def _rows(path: Path, table: str) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    try:
        with _connect(path) as db:
            cursor = db.execute(f"SELECT * FROM {_quoted(table)}")
            names = [column[0] for column in cursor.description]
            for number, values in enumerate(cursor, 1):
                row = {name: _plain(value) for name, value in zip(names, values, strict=True)}
                yield f"{table}, row {number}", number, row
    except sqlite3.Error as error:
        raise InvalidField("file", f"{path}: SQLite cannot read it: {error}") from None


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _lines(path: Path) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    done = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            done += len(line)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise InvalidField("file", f"{path}, line {number}: not JSON in UTF-8") from None
            if not isinstance(record, dict):
                raise InvalidField("file", f"{path}, line {number}: expected an object")
            yield f"line {number}", done, record
