"""Times each drop-in against the lines it replaces, forward and backward, in turns, within one run."""

import dropins
import host_clock
import pytest
import ratios


def test_dropins(drop_in, device, passing, save, request):
    passing(drop_in.tests)
    option = request.config.option
    try:
        calls, common = dropins.calls(drop_in)
    except ModuleNotFoundError as error:
        pytest.skip(f"{error.name} is not installed: pip install fastelbo[dropins]")
    samples = host_clock.measure(calls, option.rounds or (3 if option.quick else 30))
    save("dropins_", ratios.measured(common, samples))
