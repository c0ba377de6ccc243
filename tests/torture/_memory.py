"""What the memory of the soak's service is made of, minute by minute: `python -m tests.torture._memory [--minutes 25]`.

The same load as the soak's, without pauses: the population is steady, as much is deleted as is added. By the columns
one can tell a cache that fills (`sqlite` comes to rest), memory that is free and not given back (`free`), and what is
kept for good (`in_use`, or `blocks` of the interpreter, without an end). All but `blocks` in MiB, the least of each
minute.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

from tests.support.soak import soak
from tests.torture.load import FULL_SOON

NAMES: Final = ("Rss", "Pss", "Pss_Anon", "in_use", "free", "mapped", "sqlite", "blocks")


def main() -> int:
    parser = argparse.ArgumentParser(description="What the memory of a service under a steady load is made of.")
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quiet-s", type=float, default=20.0, help="between two faults of the network, on average")
    parser.add_argument("--pause-s", type=float, default=0.0, help="of a client between two calls, on average")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder) / "measured.jsonl"
        shown = threading.Thread(target=show, args=(measured,), daemon=True)
        shown.start()
        seen = soak(
            Path(folder),
            options.seed,
            warm_up_s=60.0,
            lasts_s=60.0 * options.minutes - 60.0,
            every_s=5.0,
            quiet_s=options.quiet_s,
            measured=measured,
            pause_s=options.pause_s,
            **FULL_SOON,
        )
    say(str(seen))
    return 0


def show(measured: Path) -> None:
    """A row each minute, until the program ends."""
    say("minute " + " ".join(f"{name:>8}" for name in NAMES))
    seen = 0
    for minute in range(1, 10**6):
        time.sleep(60.0)
        lines = measured.read_text().splitlines() if measured.exists() else []
        rows, seen = [json.loads(line) for line in lines[seen:]], len(lines)
        if rows:
            least = {name: min(row[name] for row in rows) for name in rows[0]}
            told = (f"{least[n]:8}" if n == "blocks" else f"{least[n] / 1024:8.2f}" for n in NAMES)
            say(f"{minute:6} " + " ".join(told))


def say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
