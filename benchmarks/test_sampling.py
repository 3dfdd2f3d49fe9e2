"""Times drawing images from a Gated PixelCNN: ours against all of its rivals, in turns, within one run."""

import host_clock
import sampling


def test_sampling(batch, device, passing, save, request):
    for name in ("sampling", "sampling_networks", "sampling_check"):
        passing(name)
    option = request.config.option
    calls = sampling.contestants(batch, option.rival or sampling.RIVALS)
    samples = host_clock.measure(calls, option.rounds or (3 if option.quick else 5))
    save("sampling_", sampling.fields(batch, samples))
