"""Samplers of random networks draw the naive loop's images, or refuse by name."""

import collections

import pytest
from random_networks import examine

pytestmark = pytest.mark.usefixtures("one_thread")

SOME, ALL = 60, 5000


def outcomes(seeds):
    """How many networks are drawn the same, within rounding, or refused; faults together, by their seeds."""
    found, faults = collections.Counter(), []
    for seed in seeds:
        try:
            outcome = examine(seed)
        except Exception as error:  # an error of any kind is one that no refusal names
            faults.append(f"seed {seed}: {type(error).__name__}: {error}")
        else:
            found[outcome if outcome in ("same", "rounding") else "refused"] += 1
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:20]])
    return found


def test_some_random_networks():
    found = outcomes(range(SOME))
    assert found["same"] > SOME / 2 and found["refused"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, ALL, 500))
def test_random_networks(first):
    found = outcomes(range(first, first + 500))
    assert found["same"] > 250 and found["rounding"] < 5
