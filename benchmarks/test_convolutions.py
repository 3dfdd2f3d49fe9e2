"""Times masked convolutions: ours against all of its rivals in both memory formats, in turns, within one run."""

import convolutions
import gpu_clock
import torch


def test_convolutions(convolution, device, backends, passing, save, request):
    passing("masked_conv2d")
    option = request.config.option
    torch._dynamo.reset()
    calls = convolutions.calls(convolution, device, backends, option.rival or convolutions.RIVALS)
    for timing in convolution.timings:
        rounds = option.rounds or (3 if option.quick else 10)
        samples = gpu_clock.CLOCKS[timing](convolutions.timed_by(timing, calls), rounds, device)
        save("conv_", convolutions.fields(convolution, timing, samples))
