"""Runs the long fault tests one after the other and prints a table; the exit status is 1 when one failed.

python -m tests.torture [--minutes 5] [--seed N] [--only part-of-a-title]
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

from tests.torture import Entry, Run, load


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    title: str
    ok: bool
    seconds: float
    told: str


def main() -> int:
    parser = argparse.ArgumentParser(prog="torture", description="Runs the long fault tests.")
    parser.add_argument("--minutes", type=float, default=5.0, help="all together; some tests have a least number")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat its decisions")
    parser.add_argument("--only", default="", help="tests whose title has this in it")
    parser.add_argument("--list", action="store_true", help="only name the tests")
    options = parser.parse_args()
    warnings.simplefilter("error")
    entries = [entry for entry in load() if options.only.lower() in entry.title.lower()]
    if not entries or options.list:
        print("\n".join(entry.title for entry in entries) or f"no test has {options.only!r} in its title")
        return 0 if entries else 2
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    print(f"SEED={seed}", flush=True)
    shares = sum(entry.share for entry in entries)
    rows = []
    for entry in entries:
        print(f"{entry.title} ...", flush=True)
        rows.append(performed(entry, seed, options.minutes * 60.0 * entry.share / shares))
    print(f"\nSEED={seed}\n{table(rows)}")
    return 0 if all(row.ok for row in rows) else 1


def performed(entry: Entry, seed: int, budget_s: float) -> Row:
    """Run one test in a folder of its own, which is kept when it fails."""
    folder = Path(tempfile.mkdtemp(prefix="torture-"))
    began_s = time.monotonic()
    try:
        told, ok = entry.test(Run(seed, folder, budget_s)), True
        shutil.rmtree(folder, ignore_errors=True)
    except Exception as error:  # noqa: BLE001  one test that fails must not keep the others from running
        traceback.print_exc()
        told, ok = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]} (kept: {folder})", False
    return Row(entry.title, ok, time.monotonic() - began_s, told)


def table(rows: list[Row]) -> str:
    """The rows as lines of Markdown."""
    lines = ["| Test | Result | Seconds | Measured |", "|---|---|---:|---|"]
    lines += [f"| {row.title} | {'ok' if row.ok else 'FAILED'} | {row.seconds:.0f} | {row.told} |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
