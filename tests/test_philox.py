"""Philox's integers as the Triton kernels draw them: bit by bit those of the reference, which has the known answers."""

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastelbo.kernels.philox import words  # noqa: E402
from fastelbo.reference.noise import philox4x32  # noqa: E402

MASK = 0xFFFFFFFF


@triton.jit
def store_words(seed, block, out, sample):
    i = tl.arange(0, 8)
    w0, w1, w2, w3 = words(tl.load(seed), tl.load(block + i), sample)
    tl.store(out + i, w0.to(tl.int64))
    tl.store(out + 8 + i, w1.to(tl.int64))
    tl.store(out + 16 + i, w2.to(tl.int64))
    tl.store(out + 24 + i, w3.to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 0x0123456789ABCDEF])
@pytest.mark.parametrize("first", [0, 7, 2**32 - 3, 2**40 + 1, 2**60])
@pytest.mark.parametrize("sample", [0, 5])
def test_integers_are_those_of_the_reference(seed, first, sample):
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        seeds, block, out = torch.tensor([seed]), first + torch.arange(8), torch.empty(4, 8, dtype=torch.int64)
        store_words[(1,)](seeds, block, out, sample)
        zero = torch.zeros_like(block)
        counter = (block & MASK, (block >> 32) & MASK, zero + sample, zero)
        want = philox4x32(counter, (zero + (seed & MASK), zero + ((seed >> 32) & MASK)))
    assert torch.equal(out, torch.stack(want))
