"""Compiles the Triton kernels for a GPU that need not be there; prints what they take of it, as JSON.

    python tests/compile_triton.py 90 most

After the capability: few of the kernels, those that take the most, or most of them; else all.

Runs the launchers on CPU tensors, with a driver that only names the target; nothing is launched.
"""

import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

os.environ["TRITON_INTERPRET"] = "1"  # lets the backend take CPU tensors ...
import ops

import fastelbo
from fastelbo import _library, backends
from fastelbo.nn import GatedMaskedConv2d

del os.environ["TRITON_INTERPRET"]  # ... but the kernels, imported at the first call, are those of a GPU
_library.INTERPRETED = False

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

WIDEST = ("rsample_kl-prior", "log_prob")  # between them they call all there is

# keywords of the public op, shape, dtype, and the ops it is compiled for
CASES = {
    "float32": ({}, (4096, 256), torch.float32, ops.KERNELS),
    "bfloat16": ({}, (4096, 256), torch.bfloat16, ops.KERNELS),
    "float16": ({}, (4096, 256), torch.float16, WIDEST),
    "float64": ({}, (64, 256), torch.float64, WIDEST),
    "softplus": ({"scale": fastelbo.Scale.softplus()}, (4096, 256), torch.float32, WIDEST),
    "ragged": ({}, (4096, 31), torch.float32, WIDEST),
    "long": ({}, (2, 100_000), torch.float32, WIDEST),
    "samples": ({"num_samples": 8}, (512, 256), torch.float32, WIDEST[:1]),
}

CHECKERBOARD = [[(row + column) % 2 for column in range(5)] for row in range(5)]

# Layers: image, weight, keywords, dtype. Channels last, but for the last of all.
LAYERS = {
    "float32": ((8, 64, 28, 28), (64, 64, 7, 7), {}, torch.float32),
    "bfloat16": ((8, 64, 28, 28), (128, 64, 3, 3), {"activation": "tanh_sigmoid"}, torch.bfloat16),
    "float16": ((8, 128, 32, 32), (128, 128, 3, 3), {"activation": "relu"}, torch.float16),
    "float64": ((2, 32, 8, 8), (32, 32, 3, 3), {"activation": "elu"}, torch.float64),
    "first-bfloat16": ((8, 1, 28, 28), (64, 1, 7, 7), {"mask_type": "A"}, torch.bfloat16),
    "first-float32": ((8, 3, 32, 32), (256, 3, 7, 7), {"mask_type": "A", "channel_groups": 3}, torch.float32),
    "groups": ((8, 60, 28, 28), (120, 60, 3, 3), {"activation": "glu", "channel_groups": 3}, torch.bfloat16),
    "taps-bfloat16": ((8, 64, 28, 28), (64, 64, 5, 5), {"taps": CHECKERBOARD}, torch.bfloat16),
    "taps-first": ((8, 3, 28, 28), (64, 3, 5, 5), {"taps": CHECKERBOARD}, torch.float32),
    "ieee": ((8, 64, 28, 28), (128, 64, 3, 3), {"activation": "tanh_sigmoid"}, torch.float32),
    "contiguous": ((8, 64, 28, 28), (64, 64, 5, 5), {}, torch.bfloat16),
}
# Over TMA boxes, for sm_90 alone.
LAYERS_OVER_BOXES = {
    "boxes-bfloat16": ((16, 128, 28, 28), (128, 128, 5, 5), {"activation": "relu"}, torch.bfloat16),
    "boxes-float16": ((16, 64, 28, 28), (128, 64, 3, 3), {"activation": "tanh_sigmoid"}, torch.float16),
}
# Blocks of a Gated PixelCNN: channels in and out, keywords, dtype. With gradients, for which most is written.
BLOCKS = {
    "float32": (64, 64, {}, torch.float32),
    "bfloat16": (64, 64, {"link": "pad-first", "cond_channels": 8}, torch.bfloat16),
    "wide-bfloat16": (128, 128, {}, torch.bfloat16),
    "wide-float32": (128, 128, {}, torch.float32),
    "wider-float16": (160, 160, {"activation": "glu"}, torch.float16),
    "first-bfloat16": (3, 64, {"mask_type": "A"}, torch.bfloat16),
    "groups-bfloat16": (60, 60, {"channel_groups": 3}, torch.bfloat16),
}
# Cases of Gaussians and layers. All layers are compiled for sm_90 alone.
FEW = ("float32", "bfloat16")
EVERYWHERE = (*FEW, "float64", "first-bfloat16", "groups")
MOST = (*EVERYWHERE, "taps-bfloat16", "taps-first", "boxes-bfloat16", "softplus", "ragged", "long", "samples")


class NamedTarget:
    """What Triton asks a driver for before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def machine_code(cubin: bytes) -> bytes:
    """The sections of an ELF file that are code."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<I20x2Q", cubin, table + size * section) for section in range(count)]
    names = sections[names][1]
    code = [cubin[at : at + length] for name, at, length in sections if cubin.startswith(b".text.", names + name)]
    return b"".join(code)


def disassembled(codes: list, capability: int) -> list:
    """The instructions of each kernel, by one disassembler: it takes as long to start as for a hundred kernels."""
    machine = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        command = [BIN / "nvdisasm", "--binary", machine, file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = iter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE))
    instructions = [list(itertools.islice(names, len(code) // 16)) for code in codes]
    assert not list(names) and all(instructions)
    # the code ends with a jump to itself and padding
    return [kernel[: len(kernel) - kernel[::-1].index("EXIT")] for kernel in instructions]


def usage(compiled) -> dict:
    """Registers, stack and shared memory of a compiled kernel, and its float64 constants that were float32 before."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [BIN / "cuobjdump", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)
    return {name.lower(): int(value) for name, value in found} | {"narrowed": narrowed(compiled)}


def narrowed(compiled) -> list:
    """What has the digits of a float32, all of them, where the source's number has more."""
    constants = re.findall(
        r"(?:dense<|constant )(-?[\d.]+(?:[Ee][-+]?\d+)?)>? ?: (?:tensor<\S*xf64>|f64)",
        compiled.asm["ttir" if "ttir" in compiled.asm else "ttgir"],
    )
    numbers = torch.tensor([float(constant) for constant in constants], dtype=torch.float64)
    long = numbers.view(torch.int64) & (2**40 - 1) != 0  # more than 12 bits
    return numbers[(numbers.float().double() == numbers) & long].tolist()


def compile_for(capability: int) -> list:
    """Has every launch of this process compile for a GPU instead: (name, compiled kernel, options), in the list."""
    triton.runtime.driver.set_active(NamedTarget(capability))
    compiled = []
    triton.JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **options: compiled.append((kernel.__name__, kernel.warmup(*args, grid=grid, **options), options))
    )
    return compiled


def main(capability: int, share: str = "") -> None:
    compiled = compile_for(capability)
    found = {}
    chosen = {"few": FEW, "most": MOST}.get(share, (*CASES, *LAYERS, *LAYERS_OVER_BOXES))
    for case, (keywords, shape, dtype, names) in CASES.items():
        names = ("rsample_kl", *WIDEST) if share == "few" else names
        for op in names if case in chosen else ():
            compiled.clear()
            run(ops.KERNELS[op], keywords, shape, dtype)
            for name, kernel, options in compiled:
                elements = options["R"] * options["C"] // (32 * options["num_warps"])
                found[f"gaussian_{op}{name}-{case}"] = kernel, {"elements": elements}
    layers = {**LAYERS, **LAYERS_OVER_BOXES} if capability == 90 else {case: LAYERS[case] for case in EVERYWHERE}
    layers = {case: layer for case, layer in layers.items() if case in chosen}
    for case, layer in layers.items():
        compiled.clear()
        over_boxes(case in LAYERS_OVER_BOXES)
        run_layer(case, *layer)
        for name, kernel, options in compiled:
            direction = "_input" if options.get("SIGN") == -1 or options.get("TRANSPOSED") else ""
            found[f"masked_conv2d_{name.removeprefix('_')}{direction}-{case}"] = kernel, {}
    for case, block in BLOCKS.items():
        if case in (BLOCKS if not share else FEW) and (share, case) != ("few", "float32"):
            compiled.clear()
            run_block(*block)
            (kernel,) = (kernel for name, kernel, _ in compiled if name == "_horizontal")
            found[f"gated_block_horizontal-{case}"] = kernel, {"shared": kernel.metadata.shared}
    codes = disassembled([machine_code(kernel.asm["cubin"]) for kernel, _ in found.values()], capability)
    kernels = zip(found.items(), codes, strict=True)
    print(json.dumps({name: {**usage(kernel), **more, "code": code} for (name, (kernel, more)), code in kernels}))


def over_boxes(wanted):
    """Has convolutions take those kernels, as FASTELBO_CONV=tma does on a GPU of capability 9.0."""
    from fastelbo.kernels import masked_conv2d, masked_conv2d_tma

    masked_conv2d.boxes = masked_conv2d_tma if wanted else None
    masked_conv2d_tma._capability = lambda device: (9, 0)
    masked_conv2d_tma._multiprocessors = lambda tensor: 132


def run(op, keywords, shape, dtype):
    inputs = op.inputs(shape, dtype)
    outputs = op(*inputs, **keywords, backend="triton")
    torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])


def run_layer(case, shape, weight_shape, keywords, dtype):
    torch.backends.cudnn.conv.fp32_precision = "ieee" if case == "ieee" else "tf32"
    memory_format = torch.contiguous_format if case == "contiguous" else torch.channels_last
    x, weight = (torch.ones(s, dtype=dtype).to(memory_format=memory_format) for s in (shape, weight_shape))
    bias, cond = torch.ones(weight_shape[0], dtype=dtype), torch.ones(shape[0], weight_shape[0], dtype=dtype)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias, cond)]
    keywords = keywords if "taps" in keywords else {"mask_type": "B"} | keywords
    y = fastelbo.masked_conv2d(x, weight, bias, cond=cond, backend="triton", **keywords)
    torch.autograd.grad(y, inputs, torch.ones_like(y))


def run_block(inputs, outputs, keywords, dtype):
    backends.CONVOLUTIONS = "block"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    block = GatedMaskedConv2d(inputs, outputs, 3, **keywords, dtype=dtype, backend="triton")
    x = torch.ones(8, inputs, 28, 28, dtype=dtype).to(memory_format=torch.channels_last)
    cond = torch.ones(8, keywords["cond_channels"], dtype=dtype) if "cond_channels" in keywords else None
    block.to(memory_format=torch.channels_last)(x, x, cond)
    backends.CONVOLUTIONS = None


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
