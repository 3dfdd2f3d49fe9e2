"""Times masked convolutions: ours against all of its rivals in both memory formats, in turns, within one run."""

import convolutions


def test_convolutions(timed, bench):
    verified = bench.verified(timed.layer.op)
    calls = convolutions.calls(timed, bench.device, bench.backends, bench.rivals(convolutions.RIVALS))
    for timing in timed.timings:
        common = timed.fields | {"verified": verified}
        bench.save("conv_", bench.measured(common, convolutions.timed_by(timing, calls), 10, timing))
