"""Times masked convolutions: ours against all of its rivals in both memory formats, in turns, within one run."""

import convolutions
import torch


def test_convolutions(convolution, device, backends, passing, measure, save, request):
    passing("masked_conv2d")
    option = request.config.option
    torch._dynamo.reset()
    calls = convolutions.calls(convolution, device, backends, option.rival or convolutions.RIVALS)
    samples = measure(calls, option.rounds or (3 if option.quick else 10))
    if samples:
        save("conv_", convolutions.fields(convolution, samples, device.type == "cuda"))
