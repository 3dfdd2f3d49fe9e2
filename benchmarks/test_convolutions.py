"""Times masked convolutions: ours against all of its rivals in both memory formats, in turns, within one run."""

import convolutions
import host_clock
import torch


def test_convolutions(convolution, device, backends, passing, save, request):
    passing("masked_conv2d")
    option = request.config.option
    torch._dynamo.reset()
    calls = convolutions.calls(convolution, device, backends, option.rival or convolutions.RIVALS)
    samples = host_clock.measure(calls, option.rounds or (3 if option.quick else 10))
    save("conv_", convolutions.fields(convolution, samples, device.type == "cuda"))
