"""CompressAI: the masked convolutions of its context models.

Replaces ``from compressai.layers import CheckerboardMaskedConv2d, MaskedConv2d``; patch() does in all of its models.

State dicts load strictly both ways, and bitstreams are the original's: its loops over pixels read ``weight * mask``.

Where the original (1.2) is wrong: it puts a new tensor in the place of the weight's data in every call, which nothing
can export; weights at dead taps get gradients, which norms for clipping and optimisers' averages see; 0 times NaN is
NaN, so that an infinite weight at a dead tap spoils the output.

Strides raise here.
"""

import functools
import importlib

from fastelbo import _checks, compat, nn
from fastelbo.ops.masked_conv2d import MASK_TYPES

__all__ = ["CheckerboardMaskedConv2d", "MaskedConv2d", "patch"]


class MaskedConv2d(nn.MaskedConv2d):
    """fastelbo.nn.MaskedConv2d with CompressAI's arguments, and a state_dict that holds the mask.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for nn.Conv2d; padding is 0 unless it is given, which leaves pixels at the edge out.
        mask_type: "A" or "B".

    Attributes:
        mask: of the weight's shape, 1 where a tap is live.

    Raises:
        ValueError, NotImplementedError: as fastelbo.nn.MaskedConv2d, and for a padding beyond that of an output of the
            input's size.

    Source:
        compressai/layers/layers.py; Minnen et al. 2018, "Joint Autoregressive and Hierarchical Priors for Learned Image
        Compression".

    Example:
        >>> conv = fastelbo.compat.compressai.MaskedConv2d(192, 384, kernel_size=5, padding=2, stride=1)
        >>> list(conv.state_dict()), conv.mask.sum((2, 3))[0, 0]
        (['weight', 'bias', 'mask'], tensor(12.))
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        bias=True,
        padding_mode="zeros",
        device=None,
        dtype=None,
        *,
        mask_type="A",
    ):
        whole = padding in (0, (0, 0), "valid")  # windows, that is: none reaches beyond the edge
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            None if whole else padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device,
            dtype,
            **self._taps_of(kernel_size, mask_type),
            keep_mask=True,
        )
        if whole and self.padding != (0, 0):
            self.register_forward_hook(functools.partial(_without_edge, self.padding))

    def _taps_of(self, kernel_size, mask_type):
        """As fastelbo.nn.MaskedConv2d takes them: a mask where sides are unequal."""
        _checks.check_one_of("mask_type", mask_type, MASK_TYPES)
        if not isinstance(kernel_size, (tuple, list)) or len(set(kernel_size)) == 1:
            return {"mask_type": mask_type}
        rows, columns = kernel_size
        live = rows // 2 * columns + columns // 2 + (mask_type == "B")  # the first so many, in raster order
        return {"mask": [[row * columns + column < live for column in range(columns)] for row in range(rows)]}


class CheckerboardMaskedConv2d(MaskedConv2d):
    """MaskedConv2d with every second tap, those of the pixels beside: for images that are drawn in two steps.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype: as
            for MaskedConv2d.
        mask_type: "A", or "B" with the pixel itself.

    Attributes:
        mask: as MaskedConv2d's.

    Raises:
        ValueError, NotImplementedError: as MaskedConv2d.

    Source:
        compressai/layers/layers.py; He et al. 2021, "Checkerboard Context Model for Efficient Learned Image
        Compression".

    Example:
        >>> conv = fastelbo.compat.compressai.CheckerboardMaskedConv2d(3, 6, kernel_size=3, padding=1)
        >>> conv.mask[0, 0]
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])
    """

    def _taps_of(self, kernel_size, mask_type):
        _checks.check_one_of("mask_type", mask_type, MASK_TYPES)
        rows, columns = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
        mask = [[(row + column) % 2 == 1 for column in range(columns)] for row in range(rows)]
        mask[rows // 2][columns // 2] = mask_type == "B"
        return {"mask": mask}


def _without_edge(padding, module, inputs, output):
    rows, columns = padding
    return output[:, :, rows : output.shape[2] - rows, columns : output.shape[3] - columns]


def patch(*modules):
    """Puts this class in the place of CompressAI's own in all of its modules that are loaded, those imported later
    included.

    Args:
        modules: further ones, as of a user, that hold CompressAI's class under any name.

    Returns:
        A context manager: leaving it, or calling its close(), puts CompressAI's class back.

    Raises:
        ImportError: CompressAI is not installed.

    Source:
        compressai/layers/layers.py.

    Example:
        >>> with fastelbo.compat.compressai.patch():  # doctest: +SKIP
        ...     model = compressai.models.JointAutoregressiveHierarchicalPriors(192, 192)
    """
    layers = importlib.import_module("compressai.layers")
    ours = CheckerboardMaskedConv2d, MaskedConv2d
    found = {vars(layers)[kind.__name__]: kind for kind in ours if kind.__name__ in vars(layers)}
    return compat.replaced("compressai", found, modules)
