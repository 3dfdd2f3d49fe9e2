"""Times each drop-in against the lines it replaces, in turns, within one run."""

import dropins
import pytest
from host_clock import clock, measure

SAMPLE_SECONDS = 2e-3


@pytest.mark.benchmark(timer=clock)
@pytest.mark.usefixtures("tested")
def test_dropins(benchmark, drop_in, save, request):
    option = request.config.option
    calls, common = dropins.prepare(drop_in)
    rounds = option.rounds or (3 if option.quick else 30)
    if samples := measure(benchmark, calls, rounds, SAMPLE_SECONDS):
        save(dropins.rows_of(drop_in, samples, common | {"rounds": rounds}), "dropins_")
