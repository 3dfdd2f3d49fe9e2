"""Times drawing images from a Gated PixelCNN against what users would write, in turns, within one run."""

import pytest
import sampling
from host_clock import clock, measure


@pytest.mark.benchmark(timer=clock)
@pytest.mark.usefixtures("tested")
def test_sampling(benchmark, images, save, request):
    option = request.config.option
    calls = sampling.contestants(images.n, option.rival or sampling.RIVALS)
    rounds = option.rounds or (3 if option.quick else 5)
    if samples := measure(benchmark, calls, rounds, seconds=0):
        save(sampling.rows_of(images, samples, rounds), "sampling_")
