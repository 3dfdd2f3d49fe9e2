"""Times drawing images from a Gated PixelCNN: ours against all of its rivals, in turns, within one run."""

import sampling


def test_sampling(batch, device, passing, measure, save, request):
    for name in ("sampling", "sampling_networks", "sampling_check"):
        passing(name)
    option = request.config.option
    calls = sampling.contestants(batch, option.rival or sampling.RIVALS)
    samples = measure(calls, option.rounds or (3 if option.quick else 5))
    if samples:
        save("sampling_", sampling.fields(batch, samples))
