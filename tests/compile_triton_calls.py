"""Compiles calls of the Gaussian ops in Triton, for a GPU that need not be there; prints as JSON what became of each.

    python tests/compile_triton_calls.py 90 2 gaussian_kl gaussian_nll

The second number is 2 for calls that between them pair every value of every option with every other's, 1 for fewer
calls which between them have every value; ops after it, if not all are wanted. PYTHONPATH may name another Triton.
"""

import itertools
import json
import sys
import time

import torch
import triton

if __name__ == "__main__":
    import compile_triton  # before fastelbo: it has the kernels compiled
from ops import GAUSSIAN, PLAIN

import fastelbo
from fastelbo.testing import gaussian

SCALES = {
    "kind": fastelbo.scale.KINDS,
    "limits": ("none", "zero", "straight_through", "inward", "soft"),
    "floor": ("none", "min_std", "var_eps"),
}
TENSORS = {
    "layout": ("even", "uneven", "odd", "one column", "long", "unaligned", "transposed", "halves"),
    "dtype": ("float32", "bfloat16", "float16", "float64", "mixed"),
    "s": ("full", "row", "column", "one"),
}
DRAWN = {
    "noise": ("drawn", "full", "row", "one"),
    "num_samples": (None, 3),
    "temperature": (1.0, 0.5),
    "noise_offset": (0, 3),
    "out_dtype": (None, torch.float32, torch.bfloat16),
}
SUMMED = {"mask": ("none", "full", "row", "column", "one"), "event_ndim": (None, 0, 2)}
PRIOR = {"prior": ("none", "shared scale", "own scale", "balanced", "numbers", "without gradient")}


def options(op):
    """What calls of an op may be given; the first of each is what most give."""
    found = {**TENSORS}
    if op.name == op.file:  # else its kernels are another's, which calls of that compile
        found |= SCALES | (PRIOR if "mean_q" in op.tensors else {})
    found |= (SUMMED if op.terms else {}) | (DRAWN if op.drawn else {})
    return found | ({"x_grad": (True, False)} if "x" in op.tensors and op.name == op.file else {})


# What is always compiled too, of an op that takes all of it: a float64 kernel with numbers that float32 has not.
WIDE = {"dtype": "float64", "kind": "softplus", "limits": "zero", "floor": "min_std"}
OPTIONS = {name: options(op) for name, op in PLAIN.items() if op in GAUSSIAN.values()}
SHAPES = {"uneven": (61, 256), "odd": (64, 31), "one column": (64, 1), "long": (2, 100_000)}


def covering(options, strength):
    """Calls, as dictionaries, that between them have every combination of values of any `strength` options."""
    names = list(options)
    missing = {  # in the order of options, not that of a set: every run compiles the same
        frozenset(zip(some, values, strict=True)): None
        for some in itertools.combinations(names, strength)
        for values in itertools.product(*(options[name] for name in some))
    }
    while missing:
        call = dict(next(iter(missing)))
        for name in names:
            if name not in call:
                others = [frozenset(some) for some in itertools.combinations(call.items(), strength - 1)]
                call[name] = max(
                    options[name],
                    key=lambda value, name=name, others=others: sum(
                        some | {(name, value)} in missing for some in others
                    ),
                )
        for some in itertools.combinations(call.items(), strength):
            missing.pop(frozenset(some), None)
        yield {name: call[name] for name in names}


def laid_out(layout, shape, make):
    """What make(shape) returns, in a layout."""
    if layout == "unaligned":
        flat = torch.cat([make(shape).new_zeros(1), make(shape).flatten()])
        return flat[1:].view(shape)
    if layout == "transposed":
        return make(shape[::-1]).T
    if layout == "halves":
        return make((shape[0], 2 * shape[1])).chunk(2, dim=1)[1]
    return make(shape)


def scale_of(kind, limits, floor):
    options = {} if limits in ("none", "soft") else {"clamp": (0.1, 5.0), "clamp_grad": limits}
    options |= {"soft_clamp": 3.0} if limits == "soft" else {}
    options |= {} if floor == "none" else {floor: 1e-3}
    return fastelbo.Scale(kind, **options)


def prepared(op, layout, dtype, s="full", prior="none", mask="none", noise="drawn", x_grad=True, **keywords):
    """A function that calls an op, forward and backward."""
    if "kind" in keywords:
        keywords["scale"] = scale_of(*(keywords.pop(name) for name in SCALES))
    rows, columns = SHAPES.get(layout, (64, 256))
    shapes = {"full": (rows, columns), "row": (columns,), "column": (rows, 1), "one": ()}
    wide = torch.float32 if dtype == "mixed" else getattr(torch, dtype)
    narrow = torch.bfloat16 if dtype == "mixed" else wide

    def tensor(shape, dtype):
        made = [lambda shape: gaussian(shape, kind="std", dtype=dtype)[1]]
        return (laid_out(layout, shape, *made) if len(shape) == 2 and 1 not in shape else made[0](shape)).detach()

    mean, raw = tensor(shapes["full"], narrow), tensor(shapes[s], wide)
    inputs = [mean.requires_grad_(), raw.requires_grad_()]
    if "x" in PLAIN[op].tensors:
        inputs.insert(0, tensor(shapes["full"], wide).requires_grad_(x_grad))
    if prior == "numbers":
        inputs += [0.5, 0.5]
    elif prior != "none":
        given = [tensor(shapes["full"], narrow), tensor(shapes["full"], wide)]
        inputs += [value.requires_grad_(prior != "without gradient") for value in given]
    if prior == "own scale":
        keywords["scale_p"] = "softplus"
    elif prior == "balanced":
        keywords["balance"] = 0.3
    if mask != "none":
        keywords["mask"] = torch.ones(shapes[mask], dtype=torch.bool)
    if noise != "drawn":
        samples = keywords.get("num_samples")
        sampled = (samples,) if samples and noise != "one" else ()
        keywords["noise"] = torch.zeros((*sampled, *((1,) * (2 - len(shapes[noise]))), *shapes[noise]), dtype=wide)
    wanted = [value for value in inputs if isinstance(value, torch.Tensor) and value.requires_grad]

    def run():
        outputs = PLAIN[op](*inputs, **keywords, backend="triton")
        torch.autograd.grad(outputs, wanted, [torch.ones_like(out) for out in outputs])

    return run


def main(capability: int, strength: int, *ops: str) -> None:
    compiled = compile_triton.compile_for(capability)
    found, begin = {}, time.perf_counter()
    for op in ops or OPTIONS:
        plain = {option: values[0] for option, values in OPTIONS[op].items()}
        for call in [*covering(OPTIONS[op], strength), *([plain | WIDE] if plain.keys() >= WIDE.keys() else [])]:
            compiled.clear()
            name = f"{op}({', '.join(f'{option}={value}' for option, value in call.items())})"
            try:
                prepared(op, **call)()
            except Exception as error:
                found[name] = {"error": str(error)}
            for kernel, code, _ in compiled:
                found[f"{kernel} of {name}"] = compile_triton.usage(code)
    print(json.dumps({"triton": triton.__version__, "seconds": time.perf_counter() - begin, "calls": found}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
