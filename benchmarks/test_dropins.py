"""Times each drop-in against the lines it replaces, forward and backward, in turns, within one run."""

import dropins
import pytest
import ratios


def test_dropins(drop_in, device, passing, measure, save, request):
    passing(drop_in.tests)
    option = request.config.option
    try:
        calls, common = dropins.calls(drop_in)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: pip install fastelbo[dropins]")
    samples = measure(calls, option.rounds or (3 if option.quick else 30))
    if samples:
        save("dropins_", ratios.measured(common, samples))
