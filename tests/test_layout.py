"""The house: one basename per op in every folder, and a reference that stands alone."""

import ast
import inspect
from pathlib import Path

import pytest

import fastelbo

ROOT = Path(__file__).parent.parent
OPS = sorted(path.stem for path in (ROOT / "fastelbo" / "ops").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_files_of_one_name(op):
    for place in (
        "fastelbo/reference/{}.py",
        "csrc/cpu/{}.cpp",
        "tests/test_{}.py",
        "csrc/cuda/{}.cu",
        "kernels/{}.py",
    ):
        assert (ROOT / place.format(op)).exists(), place.format(op)
    assert op in fastelbo.__all__


@pytest.mark.parametrize("path", sorted((ROOT / "fastelbo" / "reference").glob("*.py")), ids=lambda path: path.stem)
def test_reference_imports_torch_and_nothing_of_ours(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            ours = name.startswith("fastelbo.reference.")
            assert ours or name.split(".")[0] in ("torch", "math"), f"{path.name} imports {name}"


@pytest.mark.parametrize("op", OPS)
def test_reference_takes_the_arguments_in_the_same_order(op):
    public = inspect.signature(getattr(fastelbo, op)).parameters
    reference = inspect.signature(getattr(fastelbo.reference, op)).parameters
    positional = [name for name, p in public.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name, p in reference.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


PROJECTS = [getattr(fastelbo.compat, name) for name in fastelbo.compat.PROJECTS]
MODULES = [fastelbo, fastelbo.distributed, fastelbo.distributions, fastelbo.sampling, *PROJECTS]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples_run(module):
    import doctest

    import torch

    for name in module.__all__:
        thing = getattr(module, name)
        if not callable(thing):
            continue
        parser = doctest.DocTestParser().get_doctest(
            inspect.getdoc(thing), {"fastelbo": fastelbo, "torch": torch}, name, None, None
        )
        assert parser.examples, f"{name} has no example"
        runner = doctest.DocTestRunner()
        runner.run(parser)
        assert runner.summarize().failed == 0, name
