"""Times drawing images from a Gated PixelCNN: ours against all of its rivals, in turns, within one run."""

import sampling


def test_sampling(timed, bench):
    verified = bench.verified("sampling", "sampling_networks", "sampling_check")
    calls = sampling.contestants(timed, bench.rivals(sampling.RIVALS))
    found = bench.measured(sampling.fields(timed) | {"verified": verified}, calls, rounds=5)
    bench.save("sampling_", sampling.extrapolated(found))
