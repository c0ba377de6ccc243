#!/usr/bin/env python3
"""Puts the facts of an older knowledge base, a SQLite database or JSON lines, into the knowledge base.

    import_facts.py FILE [--table NAME] [--column FIELD=COLUMN ...] [--topic TOPIC] [--source SOURCE] [--skip-bad]
                    [--namespace NAME] [--dry-run]

The fields are content, topic, confidence, source, tags and created_at; columns with the usual names (fact, category,
timestamp, ...) are found by themselves, and shown. The whole file is checked before anything is written. What is there
already changes nothing, so an import can be repeated, and one that was broken off goes on. Exit status: 0 done,
1 failed, 2 wrong arguments, file or configuration, 3 done but for bad rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from facts_file import FactsFile
from output import put
from transfer import INTERRUPTED, Advance, bar, fail, make_client

from agents.facts import Draft
from agents.facts_import import COLUMNS, columns_of, draft_of
from memory_client import MemoryClient
from memory_system.errors import ConfigError, InvalidField, MemorySystemError
from memory_system.program import connect_address
from memory_system.settings import load_settings

PROGRAM: Final = "import_facts"
BAD_ROWS: Final = 3
_BATCH: Final = 200
_BATCH_BYTES: Final = 2_000_000
_SHOWN: Final = 20
# A restart of the agent or of the memory service takes less: the client waits for it.
_CALL_MS: Final = 20_000


@dataclass
class Outcome:
    added: int = 0
    unchanged: int = 0
    bad: list[str] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    outcome = Outcome()
    try:
        settings = load_settings(options.config)
        port = settings.agents.knowledge_base.port
        endpoint = options.endpoint or connect_address(settings.network.bind, port)
        file = FactsFile.open(options.file, options.table)
        columns = columns_of(file.columns, dict(options.column))
        print(", ".join(f"{name} from {column}" for name, column in columns.items()), file=sys.stderr)
        with bar("checking") as advance:
            rows = sum(1 for _ in drafts(file, columns, options, advance, outcome))
        if outcome.bad and not options.skip_bad:
            return fail(PROGRAM, f"nothing was written: {told_bad(outcome)}", 2)
        if options.dry_run:
            put(f"{rows} rows would be imported")
            return BAD_ROWS if outcome.bad else 0
        with make_client(settings, endpoint, options.namespace, _CALL_MS) as client, bar("importing") as advance:
            send(client, drafts(file, columns, options, advance, Outcome()), outcome)
    except (ConfigError, InvalidField) as error:
        return fail(PROGRAM, f"{error.message}{told(outcome)}", 2)
    except MemorySystemError as error:
        return fail(PROGRAM, f"{error.message}; run it again to go on{told(outcome)}", 1)
    except OSError as error:
        return fail(PROGRAM, f"{error.filename or options.file}: {error.strerror}", 2)
    except KeyboardInterrupt:
        return fail(PROGRAM, f"interrupted; run it again to go on{told(outcome)}", INTERRUPTED)
    put(f"{outcome.added} added, {outcome.unchanged} there already")
    if outcome.bad:
        return fail(PROGRAM, told_bad(outcome), BAD_ROWS)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Puts the facts of an older knowledge base into the knowledge base.")
    parser.add_argument("file", type=Path, help="a SQLite database, or JSON lines")
    parser.add_argument(
        "--table", metavar="NAME", help="of the database (default: facts, knowledge, ..., or the only one)"
    )
    parser.add_argument(
        "--column", metavar="FIELD=COLUMN", action="append", default=[], type=pair, help="where a field is"
    )
    parser.add_argument("--topic", help="for rows that have none")
    parser.add_argument("--source", help="for rows that have none")
    parser.add_argument("--skip-bad", action="store_true", help="import the rest when rows cannot be read as facts")
    parser.add_argument("--namespace", metavar="NAME", default="default", help="where to put them")
    parser.add_argument("--dry-run", action="store_true", help="check the file, and write nothing")
    parser.add_argument("--config", metavar="FILE", help="YAML file laid over the defaults (else MEMORY_CONFIG)")
    parser.add_argument("--endpoint", metavar="ADDRESS", help="of the knowledge base (else that of the configuration)")
    return parser.parse_args(arguments)


def pair(text: str) -> tuple[str, str]:
    name, equals, column = text.partition("=")
    if not equals or name not in COLUMNS or not column:
        raise argparse.ArgumentTypeError(f"expected FIELD=COLUMN, where FIELD is one of {', '.join(COLUMNS)}")
    return name, column


def drafts(
    file: FactsFile, columns: dict[str, str], options: argparse.Namespace, advance: Advance, outcome: Outcome
) -> Iterator[Draft]:
    """The rows that are facts; the others go into `outcome.bad`."""
    for where, done, row in file.rows():
        advance(done, file.size, "")
        try:
            yield draft_of(row, columns, where, topic=options.topic, source=options.source)
        except InvalidField as error:
            outcome.bad.append(error.message)


def send(client: MemoryClient, found: Iterator[Draft], outcome: Outcome) -> None:
    """Raises MemorySystemError."""
    for batch in batches(found):
        reply = client.call("import_facts", {"records": batch})
        outcome.added += reply["added"]
        outcome.unchanged += reply["unchanged"]


def batches(found: Iterator[Draft]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    size = 0
    for draft in found:
        if batch and (len(batch) == _BATCH or size + len(draft.content) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(record(draft))
        size += len(draft.content)
    if batch:
        yield batch


def record(draft: Draft) -> dict[str, Any]:
    fields = {
        "content": draft.content,
        "topic": draft.topic,
        "confidence": draft.confidence,
        "source": draft.source,
        "tags": list(draft.tags) or None,
        "created_at": draft.said_at,
    }
    return {name: value for name, value in fields.items() if value is not None}


def told(outcome: Outcome) -> str:
    done = outcome.added or outcome.unchanged
    return f"\n{outcome.added} added, {outcome.unchanged} there already" if done else ""


def told_bad(outcome: Outcome) -> str:
    shown = outcome.bad[:_SHOWN]
    if len(outcome.bad) > len(shown):
        shown.append(f"and {len(outcome.bad) - len(shown)} more")
    return "\n".join([f"{len(outcome.bad)} bad rows", *shown])


if __name__ == "__main__":
    sys.exit(main())
