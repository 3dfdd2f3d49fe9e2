"""CompressAI: the masked convolution of its context models.

Replaces ``from compressai.layers import MaskedConv2d``; patch() does in all of its models.

State dicts load strictly both ways, and bitstreams are the original's: its loops over pixels read ``weight * mask``.

Where the original (1.2) is wrong: it puts a new tensor in the place of the weight's data in every call, which nothing
can export; weights at dead taps get gradients, which norms for clipping and optimisers' averages see; 0 times NaN is
NaN, so that an infinite weight at a dead tap spoils the output.

Kernels of unequal sides, and strides, raise here.
"""

import functools
import importlib

from fastelbo import compat, nn

__all__ = ["MaskedConv2d", "patch"]


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
            mask_type=mask_type,
            keep_mask=True,
        )
        if whole and self.padding != (0, 0):
            self.register_forward_hook(functools.partial(_without_edge, self.padding[0]))


def _without_edge(width, module, inputs, output):
    return output[:, :, width:-width, width:-width]


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
    theirs = importlib.import_module("compressai.layers").MaskedConv2d
    return compat.replaced("compressai", {theirs: MaskedConv2d}, modules)
