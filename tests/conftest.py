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
