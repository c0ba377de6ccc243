#!/usr/bin/env python3
"""Shows the error bus: what the history has, then each error as it is broadcast, one line for each.

    tail_error_bus.py --severity error --since 2h

Goes on when the health manager restarts, and shows what was missed meanwhile. Rows of the history that repeat each
other are one line, with how many there were from when to when; --json has each. Addresses come from the configuration
(MEMORY_CONFIG) unless given. Where the manager lets in nobody without a key, that of --key or MEMORY_KEY_FILE is shown,
else the operator's of this host. Needs pyzmq alone. Exit status: 0 done, 1 the manager cannot be reached (--no-follow)
or does not take the key, 2 wrong arguments, key file or configuration, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import zmq
from output import discard

from memory_system.bus_progress import BusEvent
from memory_system.bus_reader import MAX_LAST, BusReader
from memory_system.errors import ConfigError, MemorySystemError
from memory_system.events import SEVERITIES, kind_of
from memory_system.keys import KEY_FILE_VARIABLE, KeyFile, load_key_file

LAST: Final = 20
INTERRUPTED: Final = 130
# For so long a row of the history is held back in case that the next one repeats it.
HELD_S: Final = 0.2
_UNITS_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_COLOURS: Final = {"info": "36", "warning": "33", "error": "31", "critical": "1;37;41"}


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        return run(parse(arguments))
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        discard()
        return 0


def run(options: argparse.Namespace) -> int:
    show = as_json if options.json else Line(wants_colour())
    try:
        publish, api, key = place(options)
        with BusReader(
            publish,
            api,
            since_s=options.since,
            last=options.lines,
            severity=options.severity,
            agent=options.agent,
            key=key,
            on_state=say_state if options.follow else lambda reason: None,
        ) as reader:
            events = followed(reader) if options.follow else reader.history()
            write(events if options.json else joined(events), show)
    except ConfigError as error:
        say(error.message)
        return 2
    except MemorySystemError as error:
        say(f"{error.message}; is the health manager running?" if error.retryable else error.message)
        return 1
    except zmq.ZMQError as error:
        say(f"--publish or --api is no address to connect to: {error.strerror}")
        return 2
    return 0


def followed(reader: BusReader) -> Iterator[BusEvent | None]:
    """What comes, and None when nothing follows a row of the history soon."""
    wait_s = None
    while True:
        each = reader.read(wait_s)
        wait_s = HELD_S if each is not None and not each.live else None
        yield each


def joined(events: Iterable[BusEvent | None]) -> Iterator[BusEvent]:
    """Rows of the history that repeat each other without another between them as one, as the broadcast has them."""
    held: BusEvent | None = None
    for each in events:
        if held is not None and each is not None and repeats(held, each):
            held = both(held, each)
            continue
        if held is not None:
            yield held
        held = None if each is None or each.live else each
        if each is not None and each.live:
            yield each
    if held is not None:
        yield held


def repeats(first: BusEvent, second: BusEvent) -> bool:
    kinds = [(kind_of(each.event), each.event.severity) for each in (first, second)]
    return not second.live and kinds[0] == kinds[1]


def both(first: BusEvent, second: BusEvent) -> BusEvent:
    event = replace(second.event, count=first.event.count + second.event.count, request_id=None)
    first_at, last_at = min(first.first_at, second.first_at), max(first.last_at, second.last_at)
    return replace(second, event=event, first_at=first_at, last_at=last_at)


def write(events: Iterable[BusEvent | None], show: Callable[[BusEvent], str]) -> None:
    for each in events:
        if each is None:
            continue
        sys.stdout.write(f"{show(each)}\n")
        sys.stdout.flush()


# -- arguments --------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Shows the errors of the system: the history first, then live.")
    parser.add_argument("--severity", choices=SEVERITIES, default=SEVERITIES[0], help="the least severe to show")
    parser.add_argument("--agent", metavar="NAME", help="errors of this one alone")
    parser.add_argument("--since", type=since, metavar="WHEN", help="10m, 2h, an ISO 8601 time or epoch seconds")
    parser.add_argument(
        "--lines", type=lines, default=LAST, metavar="N", help="how much history without --since (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for each error")
    parser.add_argument(
        "--follow", action=argparse.BooleanOptionalAction, default=True, help="wait for more (default: yes)"
    )
    parser.add_argument("--publish", metavar="ADDRESS", help="where the manager broadcasts, as tcp://127.0.0.1:7150")
    parser.add_argument("--api", metavar="ADDRESS", help="where the manager answers, as tcp://127.0.0.1:7121")
    parser.add_argument("--key", metavar="FILE", help="the key file to show (role operator or admin)")
    return parser.parse_args(arguments)


def since(text: str, now_s: float | None = None) -> float:
    """Epoch seconds of `10m` (ago), `2026-01-31T12:00` (local time unless it names another zone) or `1769860800`."""
    ago = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if ago:
        return max(0.0, (time.time() if now_s is None else now_s) - float(ago[1]) * _UNITS_S[ago[2]])
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    # A time of day alone, a year that no clock has: fromisoformat and timestamp refuse both.
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.fromisoformat(text).timestamp()
    raise argparse.ArgumentTypeError(
        f"{text!r} is no time: expected 30s, 10m, 2h, 1d, 2026-01-31T12:00 or epoch seconds"
    )


def lines(text: str) -> int:
    if text.isdecimal() and int(text) <= MAX_LAST:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no number from 0 to {MAX_LAST}")


def place(options: argparse.Namespace) -> tuple[str, str, KeyFile | None]:
    """Where to listen, where to ask, and with which key. Raises ConfigError."""
    given = options.key or os.environ.get(KEY_FILE_VARIABLE)
    key = load_key_file(given) if given else None
    if options.publish and options.api:
        return options.publish, options.api, key
    try:
        from operator_key import operator_key

        from memory_system.program import connect_address
        from memory_system.settings import load_settings

        settings = load_settings()
    except ImportError:  # a host with pyzmq alone: no PyYAML, no configuration
        return options.publish or "tcp://127.0.0.1:7150", options.api or "tcp://127.0.0.1:7121", key
    bind, health = settings.network.bind, settings.health
    return (
        options.publish or connect_address(bind, health.publish_port),
        options.api or connect_address(bind, health.port),
        key or operator_key(settings),
    )


# -- lines ------------------------------------------------------------------------------------------------------------


def as_json(each: BusEvent) -> str:
    return json.dumps(each.fields())


class Line:
    """An error as one line: time (local), severity, agent, error type, message, how many, request."""

    def __init__(self, colour: bool) -> None:
        self._colour = colour

    def __call__(self, each: BusEvent) -> str:
        event = each.event
        parts = [
            self._dim(datetime.fromtimestamp(event.timestamp).strftime("%Y-%m-%d %H:%M:%S")),
            self._coloured(f"{event.severity.upper():8}", _COLOURS[event.severity]),
            self._coloured(printable(event.agent), "1"),
            printable(event.error_type),
            printable(event.message),
        ]
        if event.count > 1:
            parts.append(self._coloured(f"x{event.count}", "1"))
        if not each.live and each.first_at != each.last_at:
            first, last = (datetime.fromtimestamp(at).strftime("%H:%M:%S") for at in (each.first_at, each.last_at))
            parts.append(self._dim(f"{first}..{last}"))
        if event.request_id:
            parts.append(self._dim(f"request_id={printable(event.request_id)}"))
        return "  ".join(part for part in parts if part)

    def _dim(self, text: str) -> str:
        return self._coloured(text, "2")

    def _coloured(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour else text


def printable(text: str) -> str:
    """On one line, and without what a terminal would take for a command: the text is a stranger's."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def wants_colour() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def say_state(reason: str | None) -> None:
    say("connected again" if reason is None else f"{reason}; is the health manager running? Trying on")


def say(text: str) -> None:
    sys.stderr.write(f"tail_error_bus: {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
