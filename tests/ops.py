"""The one table of ops: what tests, and benchmarks, of every op call, and with what. It needs torch and fastelbo alone.

An op has an entry for each way to call it that kernels tell apart, the plainest first. GAUSSIAN and CONVOLUTIONS have
those of a kind, by short names; OPS has both. KERNELS has the Gaussian ones but for what another op's kernels compute,
PLAIN the first of each function, by the function's name, FILES the files' names. tests/test_layout.py fails for a
function of fastelbo/ops/ that has no entry.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

import fastelbo
from fastelbo.testing import gaussian

SEED = 7
_DRAW = ("seed", "noise_offset", "num_samples")  # what ops that draw nothing have no use for


def _call(op, inputs, keywords):
    """A tuple of what the op returns. An op that draws has a fixed seed unless it is told otherwise."""
    if not op.drawn:
        keywords = {name: value for name, value in keywords.items() if name not in _DRAW}
    elif "noise" not in keywords:
        keywords.setdefault("seed", SEED)
    out = op.function(*inputs, **keywords)
    return out if isinstance(out, tuple) else (out,)


class Gaussian(NamedTuple):
    """An op on the elements of Gaussians: all tensors broadcast to one shape.

    Args:
        function: the public function.
        tensors: the names of those it is given, in order. Raw scales begin with "s".
        drawn: which of its outputs are draws, of the tensors' shape.
        terms: which are summed over events.
    """

    function: Callable
    tensors: "tuple[str, ...]"
    drawn: "tuple[int, ...]" = ()
    terms: "tuple[int, ...]" = ()

    @property
    def name(self):
        return self.function.__name__

    @property
    def file(self):
        """Of fastelbo/ops/, and of each other folder, without its suffix."""
        return self.function.__module__.rpartition(".")[2]

    @property
    def arity(self):
        return len(self.tensors)

    @property
    def keywords(self):
        """What the function must be given beside tensors."""
        return {}

    def __call__(self, *inputs, **keywords):
        return _call(self, inputs, keywords)

    def shapes(self, shape=(4, 6)):
        """Of each tensor, by name."""
        return dict.fromkeys(self.tensors, shape)

    def of(self, q, p):
        """The op's tensors, in order, out of mean and raw scale of two Gaussians; data is the second one's mean."""
        return {2: q, 3: (p[0], *q), 4: (*q, *p)}[self.arity]

    def inputs(
        self, shape=(4, 6), dtype=torch.float32, *, device=None, kind="logvar", lay_out=None, requires_grad=True
    ):
        """Leaves with values as networks emit them, the same for every dtype and device.

        Args:
            shape, dtype: of all.
            device: torch's default one where None.
            kind: a Scale kind.
            lay_out: takes the position of a tensor and the tensor, and returns it with other strides.
            requires_grad: of all.
        """
        q, p = (gaussian(shape, seed=seed, kind=kind, dtype=dtype) for seed in (0, 1))
        made = (x if lay_out is None else lay_out(i, x) for i, x in enumerate(self.of(q, p)))
        return [x.detach().to(device or x.device).requires_grad_(requires_grad) for x in made]


class Convolution(NamedTuple):
    """An op on images.

    Args:
        function: the public function.
        kernel: rows and columns of its weight.
        keywords: what it must be given beside tensors.
    """

    function: Callable
    kernel: "tuple[int, int]"
    keywords: dict

    tensors = ("input", "weight", "bias")
    drawn = terms = ()
    arity = len(tensors)
    name, file = Gaussian.name, Gaussian.file

    def __call__(self, *inputs, **keywords):
        return _call(self, inputs, {**self.keywords, **keywords})

    def shapes(self, size=(5, 4), *, images=2, channels=3, outputs=8):
        """Of each tensor, by name.

        Args:
            size: rows and columns of an image.
            images, channels: how many, and of each how many.
            outputs: channels before a gate.
        """
        return {"input": (images, channels, *size), "weight": (outputs, channels, *self.kernel), "bias": (outputs,)}

    def inputs(self, size=(5, 4), dtype=torch.float32, *, device=None, requires_grad=True, **counts):
        """Leaves of standard normals; counts: as in shapes."""
        made = (gaussian(s, seed=k, dtype=dtype)[0] for k, s in enumerate(self.shapes(size, **counts).values()))
        return [x.to(device or x.device).requires_grad_(requires_grad) for x in made]


_Q, _Q_AND_P, _DATA = ("mean_q", "s_q"), ("mean_q", "s_q", "mean_p", "s_p"), ("x", "mean", "s")
_GATE = {"activation": "tanh_sigmoid"}

GAUSSIAN = {
    "rsample": Gaussian(fastelbo.gaussian_rsample, ("mean", "s"), drawn=(0,)),
    "kl": Gaussian(fastelbo.gaussian_kl, _Q, terms=(0,)),
    "kl-prior": Gaussian(fastelbo.gaussian_kl, _Q_AND_P, terms=(0,)),
    "rsample_kl": Gaussian(fastelbo.gaussian_rsample_kl, _Q, drawn=(0,), terms=(1,)),
    "rsample_kl-prior": Gaussian(fastelbo.gaussian_rsample_kl, _Q_AND_P, drawn=(0,), terms=(1,)),
    "log_prob": Gaussian(fastelbo.gaussian_log_prob, _DATA, terms=(0,)),
    "nll": Gaussian(fastelbo.gaussian_nll, _DATA, terms=(0,)),
}
CONVOLUTIONS = {
    "masked_conv2d": Convolution(fastelbo.masked_conv2d, (5, 5), {"mask_type": "A"}),
    "masked_conv2d-taps": Convolution(
        fastelbo.masked_conv2d, (3, 4), {"taps": [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 0]]}
    ),
    "masked_conv2d-gate": Convolution(fastelbo.masked_conv2d, (3, 3), {"mask_type": "B", **_GATE}),
    "causal_conv2d-vertical": Convolution(fastelbo.causal_conv2d, (2, 3), {"stack": "vertical", **_GATE}),
    "causal_conv2d-horizontal": Convolution(fastelbo.causal_conv2d, (1, 2), {"stack": "horizontal"}),
}
OPS = {**GAUSSIAN, **CONVOLUTIONS}
KERNELS = {name: op for name, op in GAUSSIAN.items() if op.name == op.file}
PLAIN: "dict[str, Gaussian | Convolution]" = {}
for _op in OPS.values():
    PLAIN.setdefault(_op.name, _op)
FILES = tuple(dict.fromkeys(op.file for op in OPS.values()))
