"""The slope of a soak: what is kept for good shows, what comes and goes does not."""

from __future__ import annotations

import random

import pytest

from tests.support.footprint import Footprint
from tests.support.soak import Sample, Soak


def soak_of(leak_mib_per_hour: float) -> Soak:
    """Half an hour with a sawtooth of three minutes and 3 MiB, and peaks while faults last."""
    chance = random.Random(7)
    found = Soak()
    for at_s in range(0, 1800, 3):
        mib = 80.0 + leak_mib_per_hour * at_s / 3600.0 + at_s % 180 / 60.0 + chance.random() * 0.3
        mib += chance.choice((0.0, 0.0, 0.0, 0.0, 4.0))
        found.samples.append(Sample(float(at_s), Footprint(40, 10, 15, round(mib * 1024)), 0))
    return found


@pytest.mark.parametrize("leak", [0.0, 1.0, 5.0, -2.0])
def test_what_is_kept_for_good_shows_to_half_a_mib_an_hour(leak: float) -> None:
    assert soak_of(leak).slope_mib_per_hour == pytest.approx(leak, abs=0.5)


def test_of_a_short_one_all_samples_count_as_one() -> None:
    found = Soak()
    found.samples = [Sample(float(at_s), Footprint(40, 10, 15, 80 * 1024 - at_s), 0) for at_s in range(20)]
    assert found.least_mib() == [(19.0, (80 * 1024 - 19) / 1024)]
    assert found.slope_mib_per_hour == 0.0
