"""The Triton kernels compiled for GPUs that need not be there: what they take of each, read off the machine code."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# Most kernels for one compute capability, for two the few that take the most; all of them slowly.
SLOWLY = [pytest.param(machine, marks=pytest.mark.slow) for machine in ("80", "90", "100")]
every_machine = pytest.mark.parametrize("machine", ["80 few", "90 most", "100 few", *SLOWLY])

# Three blocks of four warps each fit the 65536 registers of a multiprocessor; of the matrix products, two.
MOST_REGISTERS = {"gaussian": 168, "masked": 255, "gated": 255}
KERNELS = {  # of the Gaussian ops, of the convolution's layers, and of blocks
    "80 few": 12 + 10 + 1,
    "80": 46 + 25 + 7,
    "90 most": 42 + 35 + 5 + 2,
    "90": 46 + 55 + 10 + 7,
    "100 few": 12 + 10 + 1,
    "100": 46 + 25 + 7,
}
MATRIX_PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA", "UTCQMMA", "DMMA")  # on tensor cores


@pytest.fixture(scope="module")
def compiled(request):
    """Name to resources and instructions of every kernel, for each machine that tests ask for."""
    script = Path(__file__).with_name("compile_triton.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    calls = [item.callspec.params for item in request.session.items if item.path == request.path]
    machines = sorted({parameters["machine"] for parameters in calls})

    def compile_for(machine):
        command = [sys.executable, script, *machine.split()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(machines, pool.map(compile_for, machines), strict=True))


@every_machine
def test_every_kernel_compiles_without_spills(compiled, machine):
    assert len(compiled[machine]) == KERNELS[machine]
    for name, kernel in compiled[machine].items():
        assert kernel["stack"] == kernel["local"] == 0, name
        assert not kernel["narrowed"], name
        assert not [code for code in kernel["code"] if code.startswith(("LDL", "STL"))], name
        assert kernel["reg"] <= MOST_REGISTERS[name.split("_")[0]], f"{name} takes {kernel['reg']} registers"


@every_machine
def test_whole_rows_are_loaded_16_bytes_at_a_time(compiled, machine):
    gaussian = {name: kernel for name, kernel in compiled[machine].items() if name.startswith("gaussian")}
    for name, kernel in gaussian.items():
        loads = [code for code in kernel["code"] if code.startswith("LDG")]
        wide = [code for code in loads if "128" in code]
        if name.endswith("ragged"):  # 31 columns: no row but the first starts at a multiple of 16 bytes
            assert not wide, name
        elif name.endswith("fwd-float32"):
            # the inputs, and the seed
            assert len(wide) == len(loads) - ("rsample" in name), f"{name}: {loads}"
        else:
            assert wide, name


@every_machine
@pytest.mark.parametrize(("dtype", "most"), [("float32", 76), ("bfloat16", 69)])
def test_instructions_of_a_sample_and_its_kl(compiled, machine, dtype, most):
    """docs/performance.md says what they cost."""
    kernel = compiled[machine][f"gaussian_rsample_kl_fwd-{dtype}"]
    assert len(kernel["code"]) / kernel["elements"] <= most


@every_machine
def test_convolutions_run_on_tensor_cores(compiled, machine):
    """But for the elementwise kernels, and for float32 where TF32 is not allowed."""
    for name, kernel in compiled[machine].items():
        if name.startswith(("masked_conv2d", "gated_block")):
            elementwise = any(kernel in name for kernel in ("before_activation", "add_shares", "sum_shares"))
            found = any(code.startswith(MATRIX_PRODUCTS) for code in kernel["code"])
            assert found != (elementwise or name.endswith("ieee")), name


@every_machine
@pytest.mark.parametrize("case", ["float32", "bfloat16"])
def test_convolutions_load_16_bytes_at_a_time(compiled, machine, case):
    for kernel in ("convolution", "convolution_input"):
        code = compiled[machine][f"masked_conv2d_{kernel}-{case}"]["code"]
        copies = [instruction for instruction in code if instruction.startswith("LDGSTS")]
        assert copies and all("128" in instruction for instruction in copies)


@every_machine
def test_blocks_fit_the_shared_memory_of_every_gpu(compiled, machine):
    blocks = {name: kernel for name, kernel in compiled[machine].items() if name.startswith("gated_block")}
    assert blocks and all(kernel["shared"] <= 99 * 1024 for kernel in blocks.values())


@pytest.mark.parametrize("machine", ["90 most", SLOWLY[1]])
def test_operands_of_boxes_pass_through_no_register(compiled, machine):
    """From the copy engine (UTMALDG) by shared memory to the tensor cores."""
    boxes = {name: kernel["code"] for name, kernel in compiled[machine].items() if "boxes" in name}
    products = [code for name, code in boxes.items() if "convolve" in name or "weight_shares" in name]
    assert len(products) == (3 if machine == "90 most" else 6)
    for code in products:
        assert any(instruction.startswith("HGMMA") for instruction in code)
        assert any(instruction.startswith("UTMALDG") for instruction in code)
        assert not any(instruction.startswith(("LDSM", "LDG.E.128")) for instruction in code)
