"""The long versions of the fault tests: `make torture [MINUTES=5] [SEED=n] [ONLY=part of a name]`.

A module beside this one names its tests by `@torture(part, name)`; each is given a Run and returns what it measured:

@torture("crash", "kill -9 at random", share=2.0)
def kill_at_random(run: Run) -> str:
    while run.goes_on(done=kills, least=200):
        ...
    return f"{kills} kills, {lost} acknowledged writes lost"

A test fails by raising. The short versions are in tests/acceptance, and share what is in tests/support.
"""

from __future__ import annotations

import importlib
import pkgutil
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Run:
    """What a test works with. `seed` names all its decisions; `folder` is its own and goes away with it."""

    seed: int
    folder: Path
    budget_s: float
    began_s: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    @property
    def left_s(self) -> float:
        """Seconds of its time that are left; negative beyond it."""
        return self.began_s + self.budget_s - time.monotonic()

    def goes_on(self, done: int = 0, least: int = 0) -> bool:
        """Whether to do one more: while there is time, and in any case until `least` are done."""
        return done < least or self.left_s > 0.0

    def say(self, text: str) -> None:
        """How far it is, for whoever watches."""
        print(f"    {time.monotonic() - self.began_s:6.0f} s  {text}", flush=True)  # noqa: T201


Test = Callable[[Run], str]


@dataclass(frozen=True)
class Entry:
    """A test of the table. `share`: how much of the minutes it gets, beside the others' shares."""

    part: str
    name: str
    share: float
    test: Test

    @property
    def title(self) -> str:
        return f"{self.part}: {self.name}"


ENTRIES: list[Entry] = []


def torture(part: str, name: str, *, share: float = 1.0) -> Callable[[Test], Test]:
    """Put a test into the table."""

    def enter(test: Test) -> Test:
        ENTRIES.append(Entry(part, name, share, test))
        return test

    return enter


def load() -> list[Entry]:
    """All tests, by module and then as they stand in it."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda found: found.name):
        if not module.name.startswith("_"):
            importlib.import_module(f"{__name__}.{module.name}")
    return ENTRIES
