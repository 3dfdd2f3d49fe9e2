"""The CUDA library as nvcc made it: what its kernels take of a GPU, read off the machine code, and what it links to."""

import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARY = ROOT / "fastelbo" / "_cuda.so"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")

# A block has 256 threads and a multiprocessor 65536 registers, so these are 4, 2, 2 and 1 blocks at a time, as
# csrc/cuda/tuning.cuh asks of the compiler. Half-precision kernels have twice the elements of a 16-byte vector at hand.
MOST_REGISTERS = {"packed f32": 64, "packed half": 128, "strided f32": 128, "strided f64": 255}
MOST_REGISTERS |= {"flat f32": 80, "flat half": 128}  # 3 blocks at a time, and 2
# The tiles of a convolution have 128 threads: 3 and 2 blocks at a time. What surrounds them has 256: 4 blocks.
MOST_REGISTERS |= {"tile": 168, "tile f64": 255, "elementwise": 64}
MOST_REGISTERS |= {"sampler": 128}  # of 256 threads, one block an image
# A multiprocessor has 163 KiB of shared memory or more: 3 blocks at a time here too.
MOST_SHARED = {"tile": 54 * 1024, "tile f64": 81 * 1024, "flat f32": 18 * 1024, "flat half": 18 * 1024}

# Per element, of gaussian_rsample_kl's packed forward with a standard normal prior and no clamp: the instructions of
# the loop over vectors of 16 bytes, less the branches that a sample from a seed with a summed KL does not take;
# docs/performance.md says what they cost.
MOST_INSTRUCTIONS = {"f32": 81, "bf16": 56}


@functools.cache
def cuobjdump():
    try:
        import triton

        found = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    except ImportError:
        found = Path("/nonexistent")
    return str(found) if found.exists() else shutil.which("cuobjdump")


@pytest.fixture(scope="module")
def built():
    if not LIBRARY.exists():
        pytest.skip("fastelbo/_cuda.so is not there: no nvcc when fastelbo was built, or FASTELBO_CUDA=0")
    return LIBRARY


def dump(library, option, architecture):
    if cuobjdump() is None:
        pytest.skip("no cuobjdump, neither Triton's nor CUDA's")
    command = [cuobjdump(), option, "-arch", architecture, library]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def kernels(library, architecture):
    """Name to (resources, instructions with their addresses) of each kernel; none if the library has no such code."""
    found = {}
    for name, usage in re.findall(r"Function (\S+):\n(.*)", dump(library, "-res-usage", architecture)):
        found[name] = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[\d\])?:(\d+)", usage)}, []
    for name, body in re.findall(
        r"Function : (\S+)\n(.*?)(?=Function : |\Z)", dump(library, "-sass", architecture), re.S
    ):
        found[name][1].extend(
            (int(at, 16), code.strip()) for at, code in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", body, re.M)
        )
    return found


@pytest.fixture(params=ARCHITECTURES)
def code(built, request):
    found = kernels(built, request.param)
    if not found:
        pytest.skip(f"TORCH_CUDA_ARCH_LIST left {request.param} out")
    return found


def kind(name):
    if "conv2d_kernel" in name or "conv2d_weight_kernel" in name:
        return "tile f64" if "FormatE1E" in name else "tile"
    if "conv2d" in name:
        return "elementwise"
    if "sampler" in name:
        return "sampler"
    if "Strided" in name:
        return "strided f64" if "StridedId" in name else "strided f32"
    for access in ("Packed", "Flat"):
        if access in name:
            return f"{access.lower()} {'f32' if 'FormatE0E' in name else 'half'}"
    return "strided f32"  # the sums of partial sums


def test_every_kernel_is_there(code):
    # 3 formats, packed or flat, clamped or not, and 4 strided; with and without a prior where there may be one; both
    # directions
    gaussian = 2 * (2 * (12 * 2 + 4) + 2 * (12 + 4)) + 2
    # of 4 formats: two widths, the weight gradient and that of the activation; of 2 types: packing and reducing; sums
    convolution = 4 * 4 + 2 * 2 + 1
    sampler = 1
    assert len(code) == gaussian + convolution + sampler


def test_nothing_goes_to_local_memory(code):
    for name, (usage, instructions) in code.items():
        assert usage["STACK"] == usage["LOCAL"] == 0, name
        assert not [text for _, text in instructions if re.search(r"\b(LDL|STL)\b", text)], name


def test_registers_and_shared_memory(code):
    for name, (usage, _) in code.items():
        assert usage["REG"] <= MOST_REGISTERS[kind(name)], f"{name} takes {usage['REG']}"
        assert usage["SHARED"] <= MOST_SHARED.get(kind(name), 8 * 1024), f"{name} takes {usage['SHARED']}"


def test_packed_kernels_read_and_write_16_bytes_at_a_time(code):
    for name, (_, instructions) in code.items():
        if "Packed" not in name:
            continue
        loads = [text for _, text in instructions if "LDG" in text]
        # those of 4 or 2 bytes are repeated values, that of 8 is the seed; several branches may read the same address
        assert len([text for text in loads if ".128" in text]) >= 2, name
        narrow = {text.split("[")[-1] for text in loads if ".128" not in text}
        assert len(narrow) <= 2, f"{name}: {narrow}"
        stores = [text for _, text in instructions if "STG" in text]
        assert "kl_fwd" in name or "log_prob" in name or all(".128" in text for text in stores), name


def executed(instructions):
    """How many instructions one turn of the outer loop of a packed gaussian_rsample_kl forward takes."""
    branches = [
        (at, int(found[1], 16), text)
        for at, text in instructions
        if (found := re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text))
    ]
    start, end = max(((to, at) for at, to, _ in branches if to < at), key=lambda loop: loop[1] - loop[0])
    loop = [(at, text) for at, text in instructions if start <= at <= end]

    def conditional(text):
        return text.startswith("@") or text.startswith("BRA.U")

    # Given noise and elementwise terms are read and written in stretches that end with an unconditional jump ahead.
    skipped = set()
    for at, to, text in branches:
        if start <= at <= end and to > at and not conditional(text):
            entry = max(b for b, t, code in branches if b < at and conditional(code) and at < t <= to)
            stretch = [text for a, text in loop if entry < a <= at]
            assert any(name in text for text in stretch for name in ("LDG", "STG")), stretch
            assert not any("MUFU" in text for text in stretch), stretch
            skipped |= {a for a, _ in loop if entry < a <= at}
    return len(loop) - len(skipped)


# For sm_100 the compiler peels the loop over samples, which executed() does not follow.
@pytest.mark.parametrize("code", ["sm_80", "sm_90"], indirect=True)
@pytest.mark.parametrize(("dtype", "format", "width"), [("f32", 0, 4), ("bf16", 2, 8)])
def test_instructions_of_a_sample_and_its_kl(code, dtype, format, width):
    pattern = rf"gaussian_rsample_kl_fwd_kernel.*PackedILNS_6FormatE{format}ELb0.*PriorE0"
    ((_, instructions),) = [kernel for name, kernel in code.items() if re.search(pattern, name)]
    assert executed(instructions) / width <= MOST_INSTRUCTIONS[dtype]


def test_links_against_libtorch_cuda_and_neither_cudart_nor_python(built):
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", built], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", dynamic)
    assert "libtorch_cuda.so" in needed
    assert not [name for name in needed if "cudart" in name or "python" in name], needed
