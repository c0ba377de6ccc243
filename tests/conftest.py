"""What holds for all tests and for the programs that they start."""

from __future__ import annotations

import os
import signal
import sys

import hypothesis
import pytest

# Nobody reports to an error bus that was not asked for.
os.environ["MEMORY_ERROR_BUS_ADDR"] = ""
# Hundreds of programs are started. Where the environment forbids to keep byte code, a quarter of each start and most of
# the collection would go into compiling the same modules again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# A shell starts what it runs in the background with SIGINT ignored, and children inherit that: Ctrl-C would do nothing.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A busy machine makes examples slow, and what makes them: neither is a fault of what is tested.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


# Slow files first: the many quick ones then fill what is left, instead of one long file ending alone.
_ORDER = ("acceptance", "integration", "contract", "unit")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """After pytest-randomly has shuffled them; within a folder its order stays."""
    items.sort(key=lambda item: _ORDER.index(item.path.parent.name))


# What these find may show itself only once in a while: a second run that passes would prove nothing.
_FINAL = frozenset(
    f"acceptance/test_{name}.py"
    for name in (
        "crash",
        "disk",
        "lifecycle_crash",
        "trust_access",
        "trust_corruption",
        "trust_disk",
        "trust_points",
        "trust_powercut",
    )
)
_MANY = 5
_EXIT_FINAL = 10  # pytest's own end at 5
_failed: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _failed.add(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Say by the exit status whether `make test` may run what failed once more, alone (1) or not (10).

    The tests of real processes share two cores with three others; what fails only then is told, and is to be mended,
    but ends no release. CPython's own test runner does so too.
    """
    final = any(nodeid.split("::")[0].removeprefix("tests/").startswith(("unit/", *_FINAL)) for nodeid in _failed)
    if session.exitstatus == pytest.ExitCode.TESTS_FAILED and (final or len(_failed) > _MANY):
        session.exitstatus = _EXIT_FINAL
