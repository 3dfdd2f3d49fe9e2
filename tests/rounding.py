"""How far sums of products may be off by what the library does alone, whatever the processor and the rest of torch do.

Every kernel adds at most B = 128 products one after the other, and then those totals one after the other. Each addition
rounds by at most u = eps / 2 of its result, by u / sqrt(3) in the mean square. For independent products of mean 0 whose
squares add up to S, the squares of all partial sums add up to S B / 2 in the blocks and to S N / (2 B) over the N / B
totals; where multiplication and addition round one by one, the products' own add S, and the result's rounding another.
The errors being independent of each other, their standard deviation is

    u sqrt(S (B / 2 + N / (2 B) + 2) / 3),

and of a million results none is off by more than six of it (Higham and Mary 2019, "A new approach to probabilistic
rounding error analysis"). One chain of N additions has N / 2 for B / 2 + N / (2 B).
"""

import math

import torch

BLOCK = 128


def sum_error(terms, squares, dtype=torch.float32):
    """The most that sums of so many products are off by; squares: the sum of their squares, of any shape."""
    block = min(terms, BLOCK)
    roundings = block / 2 + terms / max(2 * block, 1) + 2
    return 6 * torch.finfo(dtype).eps / 2 * math.sqrt(roundings / 3) * _root_of_most(squares)


def _root_of_most(squares):
    return squares.max().item() ** 0.5 if squares.numel() else 0.0


def convolution_errors(convolve, tensors, upstream, slope=1.0):
    """sum_error of a convolution of float32 arithmetic and an activation: of its output, and of the tensors' gradients.

    Args:
        convolve: maps tensors to what comes before the activation.
        tensors: input, weight and what is added to the sums, None where there is none.
        upstream: the greatest gradient of the output.
        slope: the most that the activation and its derivative change by with what comes before it.
    """
    input, weight = tensors[:2]
    leaves = [None if t is None else t.double().square().requires_grad_() for t in tensors]
    z = convolve(*leaves)
    given = [leaf for leaf in leaves if leaf is not None]
    squares = torch.autograd.grad(z, given, torch.full_like(z, upstream**2))
    pixels = input.numel() // input.shape[-3]
    terms = [weight[:, 0].numel(), *[pixels] * (len(given) - 1)]
    error = slope * (sum_error(weight[0].numel(), z) + 8 * torch.finfo(torch.float32).eps)
    # an error of the gradient before the activation goes through the sums as that gradient does
    after = [slope * sum_error(n, s) + error * _root_of_most(s) for n, s in zip(terms, squares, strict=True)]
    return [error, *after]
