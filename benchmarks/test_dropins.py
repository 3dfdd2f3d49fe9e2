"""Times each drop-in against the lines it replaces, forward and backward, in turns, within one run."""

import dropins
import pytest


def test_dropins(timed, bench):
    verified = bench.verified(timed.tests)
    try:
        calls, common = dropins.calls(timed)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: pip install fastelbo[dropins]")
    bench.save("dropins_", bench.measured(common | {"verified": verified}, calls, rounds=30))
