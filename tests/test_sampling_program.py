"""The program of a sampler: what Python writes is what C++ reads."""

import re
from pathlib import Path

from fastelbo.reference.masked_conv2d import GATES
from fastelbo.reference.sampling import FUNCTIONS, PANEL
from fastelbo.sampling import program

CSRC = Path(__file__).parent.parent / "csrc"
HEADER = (CSRC / "common" / "sampling.h").read_text()


def as_python(names):
    """kLeakyRelu is leaky_relu."""
    return [re.sub(r"\B(?=[A-Z])", "_", name).lower() for name in names]


def members(enum):
    return as_python(re.findall(r"\bk(\w+)", re.search(rf"enum {enum} : int64_t {{(.*?)}};", HEADER, re.DOTALL)[1]))


def numbers(struct):
    """How many int64 a struct of C++ has."""
    body, count = re.search(rf"struct {struct} {{(.*?)\n}};", HEADER, re.DOTALL)[1], 0
    for kind, names in re.findall(r"^  (int64_t|Ref) ([^;()]+);", body, re.MULTILINE):
        for name in names.split(","):
            length = re.search(r"\[(\d+)]", name)
            count += (numbers("Ref") if kind == "Ref" else 1) * (int(length[1]) if length else 1)
    return count


def test_functions_have_the_same_numbers():
    assert members("Function") == list(FUNCTIONS) == list(program.FUNCTIONS)
    (first_gate,) = as_python(re.findall(r"is_gate\(.*?function >= k(\w+)", HEADER))
    assert list(FUNCTIONS)[list(FUNCTIONS).index(first_gate) :] == list(GATES)


def test_each_function_is_computed():
    (source,) = CSRC.glob("*/sampling_functions.h")
    cases = as_python(re.findall(r"case k(\w+):", source.read_text()))
    assert cases == [name for name in FUNCTIONS if name != "none"]  # which is what is left


def test_instructions_are_laid_out_as_they_are_read():
    assert members("Op") == list(program.OPS)
    assert int(re.search(r"kPanel = (\d+)", HEADER)[1]) == PANEL
    assert numbers("Instruction") == program.INSTRUCTION
    assert (numbers("Ref"), numbers("Run")) == (len(program.Ref._fields), len(program.Run._fields))
