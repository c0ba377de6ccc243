#!/usr/bin/env python3
"""The jobs of the scheduler: `jobs.py list` shows them, `jobs.py run NAME [--dry-run] [--as-of T]` runs one now.

A dry run shows what would be changed, and changes nothing; run with the --as-of that it prints, the job changes exactly
that. Exit status: 0 done, 1 the job failed or the scheduler cannot be reached, 2 wrong arguments or configuration.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from operator_key import operator_key_file
from output import put
from status_table import clock, columns, plain

from memory_client import MemoryClient
from memory_system.errors import ConfigError
from memory_system.program import connect_address
from memory_system.protocol import new_request_id
from memory_system.scheduling.runs import CHANGE_MEMORIES
from memory_system.settings import load_settings

# The trigger is in UTC, NEXT and LAST are local.
HEADINGS: Final = ("JOB", "TRIGGER", "STATE", "NEXT", "LAST", "TOOK", "RESULT")
CHANGES: Final = ("MEMORY", "NAMESPACE", "FROM", "TO", "REASON")
LOOK_MS: Final = 5000
WAIT_MS: Final = 60_000
INTERRUPTED: Final = 130
_CONTENT_CHARS: Final = 100

Reply = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        settings = load_settings()
        endpoint = connect_address(settings.network.bind, settings.scheduler.port)
        key_file = operator_key_file(settings)
        scheduler = MemoryClient(endpoint, agent_id="operator", timeout_ms=LOOK_MS, error_bus="", key_file=key_file)
    except ConfigError as error:
        return say(error.message, 2)
    with scheduler:
        try:
            return list_jobs(scheduler, options) if options.command == "list" else run_job(scheduler, options)
        except KeyboardInterrupt:
            return say("not waiting any longer; what runs goes on in the orchestrator", INTERRUPTED)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Shows the jobs of the scheduler, or runs one now.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show every job")
    run = commands.add_parser("run", help="run a job now, and wait for its end")
    run.add_argument("name", help="such as decay, consolidation or backup")
    run.add_argument("--dry-run", action="store_true", help="show what it would change, and change nothing")
    run.add_argument(
        "--as-of", type=instant, metavar="T", help="as if it were then: epoch seconds, or an ISO 8601 time"
    )
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", help="the reply as it is")
    return parser.parse_args(arguments)


def instant(text: str) -> float:
    """Epoch seconds of `1769860800.5` or `2026-01-31T12:00` (local time unless it names another zone)."""
    try:
        found = float(text)
    except ValueError:
        try:
            found = datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError):
            found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no time: expected epoch seconds or 2026-01-31T12:00")
    return found


def say(text: str, status: int) -> int:
    print(f"error: {text}", file=sys.stderr)
    return status


def refused(reply: Mapping[str, Any], scheduler: MemoryClient) -> int:
    if reply.get("error_code") in ("unreachable", "timeout"):
        return say(f"the scheduler does not answer at {scheduler.endpoint}; is it running? (make status)", 1)
    return say(plain(f"{reply.get('message')} ({reply.get('error_code')})"), 1)


# -- list -------------------------------------------------------------------------------------------------------------


def list_jobs(scheduler: MemoryClient, options: argparse.Namespace) -> int:
    reply = scheduler.call("list_jobs")
    if reply["status"] != "success":
        return refused(reply, scheduler)
    if options.json:
        put(json.dumps(reply))
        return 0
    if reply["orchestrator"] != "ready":
        print("the orchestrator does not answer: what is due is delayed", file=sys.stderr)
    put(columns(HEADINGS, [job_cells(job) for job in reply["results"]]))
    return 0


def job_cells(job: Mapping[str, Any]) -> tuple[str, ...]:
    last = job["last"] or {}
    result = str(last.get("error") or last.get("result") or "") if last else "has not run yet"
    if last and last.get("state") != "done":
        result = f"{last.get('state')}: {result}" if result else str(last.get("state"))
    if job["state"] == "delayed":
        result = f"delayed since {clock(job['delayed_since'])}: {job['reason']}"
    cells = (
        str(job["name"]),
        str(job["trigger"]),
        "running" if job["running"] else str(job["state"]),
        clock(job["next_run_at"]),
        clock(last.get("started_at")),
        took(last.get("duration_s")),
        result,
    )
    return tuple(map(plain, cells))


def took(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 1.0:
        return f"{seconds * 1000.0:.0f} ms"
    minutes, rest_s = divmod(seconds, 60.0)
    return f"{minutes:.0f} min {rest_s:.0f} s" if minutes else f"{rest_s:.1f} s"


# -- run --------------------------------------------------------------------------------------------------------------


def run_job(scheduler: MemoryClient, options: argparse.Namespace) -> int:
    data = {"name": options.name, "dry_run": options.dry_run, "as_of": options.as_of}
    reply = wait_for(scheduler, {name: value for name, value in data.items() if value is not None})
    if reply["status"] != "success":
        return refused(reply, scheduler)
    if options.json:
        put(json.dumps(reply))
        return 0
    for line in told(options.name, reply):
        put(line)
    return 0


def wait_for(scheduler: MemoryClient, data: Reply) -> Reply:
    """The reply of the run: asked for again, under one request_id, as long as the scheduler answers."""
    request_id = new_request_id()
    while True:
        look = scheduler.call("health_check")
        if look["status"] != "success":
            return look
        reply = scheduler.call("run_job", data, request_id=request_id, deadline_ms=WAIT_MS)
        if reply.get("error_code") != "timeout":
            return reply


def told(name: str, reply: Mapping[str, Any]) -> Iterator[str]:
    """What a run did, or would do, for a person."""
    dry = bool(reply.get("dry_run"))
    as_of = reply.get("as_of")
    at = f" as of {datetime.fromtimestamp(as_of, UTC):%Y-%m-%d %H:%M:%S} UTC" if isinstance(as_of, int | float) else ""
    ended, began = reply.get("finished_at"), reply.get("started_at")
    in_time = f" in {took(ended - began)}" if isinstance(ended, int | float) and isinstance(began, int | float) else ""
    yield f"{name}{' (dry run: nothing was changed)' if dry else ''}{at}{in_time}"
    counts = reply.get("counts") or {}
    yield from (f"  {kind:<20} {number}" for kind, number in counts.items())
    yield from facts(reply)
    yield from plans(reply.get("plans") or ())
    yield from changes(reply, "would change" if dry else "changed")
    if dry and isinstance(as_of, int | float):
        yield f"to change exactly this: make run-job JOB={name} AS_OF={as_of!r}"


# What every run's reply has; all else is the job's own.
_COMMON: Final = frozenset(
    {"status", "request_id", "run_id", "job", "as_of", "dry_run", "started_at", "finished_at", "counts", "changes"}
) | {"digest", "results", "count", "plans", "replayed", "joined", "commit_seq"}


def facts(reply: Mapping[str, Any]) -> Iterator[str]:
    for name, value in reply.items():
        if name not in _COMMON and value not in (None, [], {}):
            yield f"  {plain(name):<20} {plain(value if isinstance(value, str) else json.dumps(value))}"


def plans(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What consolidation merges: how many memories into which text."""
    for plan in found:
        members = plan.get("members") or ()
        kind, namespace = plain(str(plan.get("kind", "merged"))), plain(str(plan.get("namespace", "")))
        text = textwrap.shorten(str(plan.get("content", "")), _CONTENT_CHARS, placeholder=" ...")
        yield f"  {kind} of {len(members)} in {namespace}: {plain(text)}"


def changes(reply: Mapping[str, Any], verb: str) -> Iterator[str]:
    total, results = reply.get("changes"), reply.get("results") or []
    if not isinstance(total, int) or not (total or reply.get("job") in CHANGE_MEMORIES):
        return
    if not total:
        yield f"nothing {'would be' if verb.startswith('would') else 'was'} changed"
        return
    yield f"{verb} {total} {'memory' if total == 1 else 'memories'}:"
    names = ("memory_id", "namespace", "from", "to", "reason")
    cells = [tuple(plain(str(each.get(name) or "")) for name in names) for each in results]
    yield textwrap.indent(columns(CHANGES, cells), "  ")
    if total > len(results):
        yield f"  and {total - len(results)} more"


if __name__ == "__main__":
    sys.exit(main())
