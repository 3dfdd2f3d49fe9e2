"""Times masked convolutions against the three lines users could write, in turns, within one run."""

import convolutions
import pytest
import torch
from host_clock import clock, measure

SAMPLE_SECONDS = 5e-3


@pytest.mark.benchmark(timer=clock)
@pytest.mark.usefixtures("tested")
def test_convolutions(benchmark, layer, device, backends, save, request):
    option = request.config.option
    torch._dynamo.reset()
    rivals = option.rival or convolutions.RIVALS
    if option.quick and not option.rival:
        rivals = [rival for rival in rivals if rival != "compile"]  # which takes its time
    calls = convolutions.wanted_contestants(layer, device, backends, rivals)
    rounds = option.rounds or (3 if option.quick else 10)
    if samples := measure(benchmark, calls, rounds, SAMPLE_SECONDS):
        save(convolutions.rows_of(layer, backends, samples, rounds), "conv_")
