#!/usr/bin/env python3
"""Puts conversations from a JSON or JSONL file into the session memory, each as a session of its own.

    import_sessions.py FILE [--user-id ID] [--source NAME] [--namespace NAME] [--dry-run]

The shapes that are understood stand in agents/sessions_dumps.py. The whole file is read and checked before anything is
written. What is there already changes nothing, so an import can be repeated, and one that was broken off goes on; keep
the --source (the file's name, unless given), by which a conversation is known again. What is there with other words is
reported and left. Exit status: 0 done, 1 failed, 2 wrong arguments, file or configuration, 3 done but for conflicts.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from output import put
from transfer import INTERRUPTED, Advance, bar, fail, make_client

from agents.sessions_dumps import BadDump, portions, read
from memory_client import MemoryClient
from memory_system.errors import ConfigError, InvalidField, MemorySystemError
from memory_system.program import connect_address
from memory_system.settings import load_settings

PROGRAM: Final = "import_sessions"
CONFLICTS: Final = 3
NOBODY: Final = "unknown"
_TURNS: Final = 500
_BYTES: Final = 2 * 1024 * 1024
_SHOWN: Final = 20


@dataclass
class Outcome:
    """What became of the conversations and their turns, and the conflicts in words."""

    sessions: Counter[str] = field(default_factory=Counter)
    turns: Counter[str] = field(default_factory=Counter)
    conflicts: list[str] = field(default_factory=list)

    def take(self, reply: dict[str, Any]) -> None:
        self.sessions.update(reply["sessions"])
        self.turns.update(reply["interactions"])
        for each in reply["results"]:
            what = "the session" if each["turn"] is None else f"turn {each['turn'] + 1}"
            fields = ", ".join(each["fields"])
            self.conflicts.append(f"{each['conversation_id']}: {what} is there with another {fields}")

    def told(self, dry_run: bool) -> str:
        would = "would be " if dry_run else ""
        lines = [
            f"sessions: {self.sessions['added']} {would}added, {self.sessions['unchanged']} there already",
            f"turns: {self.turns['added']} {would}added, {self.turns['unchanged']} there already, "
            f"{self.turns['conflicts']} in conflict",
            *self.conflicts[:_SHOWN],
        ]
        if len(self.conflicts) > _SHOWN:
            lines.append(f"and {self.turns['conflicts'] - _SHOWN} more")
        return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Puts conversations from a file into the session memory.")
    parser.add_argument("file", type=Path, help="JSON or JSONL")
    parser.add_argument("--user-id", metavar="ID", default=NOBODY, help="whose those are that name no user")
    parser.add_argument("--source", metavar="NAME", help="where they come from (default: the file's name)")
    parser.add_argument("--namespace", metavar="NAME", default="default", help="where to put them")
    parser.add_argument("--dry-run", action="store_true", help="change nothing, and show what would be done")
    parser.add_argument("--config", metavar="FILE", help="YAML file laid over the defaults (else MEMORY_CONFIG)")
    parser.add_argument("--endpoint", metavar="ADDRESS", help="of the session memory (else that of the configuration)")
    options = parser.parse_args(arguments)
    outcome = Outcome()
    try:
        settings = load_settings(options.config)
        port = settings.agents.session_memory.port
        endpoint = options.endpoint or connect_address(settings.network.bind, port)
        conversations = read(options.file.read_text(encoding="utf-8"))
        asked = {"source": options.source or options.file.name, "user_id": options.user_id, "dry_run": options.dry_run}
        with make_client(settings, endpoint, options.namespace) as client, bar("importing") as advance:
            send(client, conversations, asked, advance, outcome)
    except ConfigError as error:
        return fail(PROGRAM, error.message, 2)
    except BadDump as error:
        return fail(PROGRAM, f"{options.file}: {error}", 2)
    except UnicodeDecodeError:
        return fail(PROGRAM, f"{options.file}: not a text file in UTF-8", 2)
    except OSError as error:
        return fail(PROGRAM, f"{options.file}: {error.strerror}", 2)
    except MemorySystemError as error:
        status = 2 if isinstance(error, InvalidField) else 1
        return fail(PROGRAM, f"{error.message}\n{outcome.told(options.dry_run)}", status)
    except KeyboardInterrupt:
        return fail(PROGRAM, f"interrupted; run it again to go on\n{outcome.told(options.dry_run)}", INTERRUPTED)
    put(outcome.told(options.dry_run))
    return CONFLICTS if outcome.turns["conflicts"] else 0


def send(
    client: MemoryClient,
    conversations: list[dict[str, Any]],
    asked: dict[str, Any],
    advance: Advance,
    outcome: Outcome,
) -> None:
    """Raises MemorySystemError."""
    done, total = 0, sum(len(each["turns"]) for each in conversations)
    for portion in portions(conversations, _TURNS, _BYTES):
        try:
            outcome.take(client.call("import_sessions", {"conversations": portion, **asked}))
        except InvalidField as error:
            names = ", ".join(each["conversation_id"] for each in portion[:3])
            error.message = f"among the conversations from {names}: {error.message}"
            raise
        done += sum(len(each["turns"]) for each in portion)
        advance(done, total, "")


if __name__ == "__main__":
    sys.exit(main())
