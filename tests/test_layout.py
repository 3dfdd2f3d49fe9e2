"""The house: one basename per op in every folder, and a reference that stands alone."""

import ast
import doctest
import inspect
import io
import re
import tokenize
from pathlib import Path

import pytest
import torch
from ops import FILES, PLAIN

import fastelbo
import fastelbo.testing

ROOT = Path(__file__).parent.parent
OPS = sorted(path.stem for path in (ROOT / "fastelbo" / "ops").glob("[!_]*.py"))


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_files_of_one_name(op):
    for place in (
        "fastelbo/reference/{}.py",
        "csrc/cpu/{}.cpp",
        "csrc/cpu/{}.loops.h",
        "tests/test_{}.py",
        "csrc/cuda/{}.cu",
        "kernels/{}.py",
    ):
        assert (ROOT / place.format(op)).exists(), place.format(op)
    assert op in fastelbo.__all__


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_an_entry_in_the_table_of_ops(op):
    """tests/ops.py, which the tests and benchmarks of every op read."""
    assert op in FILES
    functions = [getattr(fastelbo, name) for name in fastelbo.__all__]
    functions = {f.__name__ for f in functions if getattr(f, "__module__", "") == f"fastelbo.ops.{op}"}
    assert functions - {"conv_mask2d"} == {name for name, entry in PLAIN.items() if entry.file == op}


@pytest.mark.parametrize("path", sorted((ROOT / "fastelbo" / "reference").glob("*.py")), ids=lambda path: path.stem)
def test_reference_imports_torch_and_nothing_of_ours(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module]
        for name in names:
            ours = name.startswith("fastelbo.reference.")
            assert ours or name.split(".")[0] in ("torch", "math"), f"{path.name} imports {name}"


CSRC = [path for path in (ROOT / "csrc").rglob("*.*") if path.is_file()]


@pytest.mark.parametrize("path", CSRC, ids=lambda path: path.name)
def test_compiled_sources_are_short_and_include_others(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 700
    included = [line.split('"')[1] for line in lines if re.match(r'#include "|#define FASTELBO_LOOPS "', line)]
    assert path.name not in included and all((path.parent / name).exists() for name in included)


def modules():
    """All files of the package by their modules' names."""
    found = {}
    for folder, package in ((ROOT / "fastelbo", "fastelbo"), (ROOT / "kernels", "fastelbo.kernels")):
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(path, names):
    """The modules of ours that a file imports, at its head or within a function; not the packages that hold these."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in names)
        if isinstance(node, ast.ImportFrom) and node.module in names:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in names else node.module


def circle(edges):
    """A circle of imports, or None."""
    done = set()

    def follow(module, path):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        found = next(filter(None, (follow(other, [*path, module]) for other in edges[module])), None)
        done.add(module)
        return found

    return next(filter(None, (follow(module, []) for module in edges)), None)


def test_no_circle_of_imports():
    names = modules()
    edges = {name: sorted(set(imported(path, names))) for name, path in names.items()}
    assert "fastelbo.scale" in edges["fastelbo.ops.gaussian_kl"] and "fastelbo.kernels.philox" in names
    assert circle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}) == ["b", "d", "b"]
    assert circle(edges) is None


HOUSE = ("fastelbo", "kernels", "csrc", "tests", "benchmarks", "tools")
ENDINGS = (".py", ".h", ".cuh", ".cpp", ".cu", ".ninja", ".sh")
STANDING = [path for folder in (*HOUSE, "docs", "examples") for path in (ROOT / folder).rglob("*.*") if path.is_file()]
NAMES = {path.name for path in STANDING}
# Of other projects, whose files our docstrings cite, and of a user.
OTHERS = re.compile(r"(torch|compressai|diffusers|pyro|pythae|bayesian_torch|torchbnn|guided_diffusion)/|[A-Z]+/")
CITED = {"fastelbo/compat/vdvae.py": {"vae_helpers.py"}, "fastelbo/compat/vits.py": {"losses.py", "models.py"}}


def remarks(path):
    """The comments and docstrings of a file, each with its first line."""
    text = path.read_text()
    if path.suffix != ".py":
        for found in re.finditer(r"(?:^|\s)# .*" if path.suffix in (".ninja", ".sh") else r"(?<!:)//.*", text):
            yield text.count("\n", 0, found.start()) + 1, found[0]
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            yield node.body[0].lineno, ast.get_docstring(node)


def named_paths(text):
    """The paths in a text, with directories or without."""
    endings = "py|h|cuh|cpp|cu|ninja|md|sh|csv|toml|txt|in"
    yield from re.findall(rf"(?<![\w/.<*{{~-])(?:[\w.-]+/)*[\w.-]+\.(?:{endings})\b(?![\w(])", text)
    yield from re.findall(rf"(?<![\w/.])(?:{'|'.join(HOUSE)})/[\w/.-]*\w(?![\w<{{*/.-])", text)


def stale(path):
    """What a file's comments and docstrings say of paths that are not there, or of names that these do not have."""
    cited = CITED.get(str(path.relative_to(ROOT)), ())
    for line, text in remarks(path):
        for name in named_paths(text):
            places = [base / name for base in (ROOT, path.parent, path.parent.parent)]
            known = name in NAMES or name in cited or OTHERS.match(name)
            if not known and not any(place.exists() for place in places):
                yield f"{path.relative_to(ROOT)}:{line} {name}"
        for name, thing in re.findall(r"\(([\w./]+\.\w+), (\w+)\)", text):
            if (ROOT / name).exists() and not re.search(rf"\b{thing}\b", (ROOT / name).read_text()):
                yield f"{path.relative_to(ROOT)}:{line} {thing} in {name}"


def test_comments_name_paths_that_exist():
    files = [path for path in STANDING if path.relative_to(ROOT).parts[0] in HOUSE and path.suffix in ENDINGS]
    assert len(files) > 100
    assert [remark for path in files for remark in stale(path)] == []
    for remark in ("# as in csrc/common/nothing.h", "# of nothing.cuh", '"""csrc/cuda/none has it."""'):
        assert list(named_paths(remark)), remark


@pytest.mark.parametrize("op", OPS)
def test_no_op_imports_another(op):
    """What ops share is in files of fastelbo/ops/ whose names begin with an underscore."""
    for node in ast.walk(ast.parse((ROOT / "fastelbo" / "ops" / f"{op}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fastelbo.ops"):
            assert node.module == "fastelbo.ops" and all(alias.name.startswith("_") for alias in node.names)


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_the_parts_that_every_op_has(op):
    parts = ast.parse((ROOT / "fastelbo" / "ops" / f"{op}.py").read_text()).body
    names = [part.name for part in parts if isinstance(part, (ast.FunctionDef, ast.ClassDef))]
    names += [part.targets[0].id for part in parts if isinstance(part, ast.Assign)]
    assert {op, "_local", "_reference", "_arguments", "_fwd_fake", "_bwd_fake", "_FWD", "_BWD"} <= set(names)


@pytest.mark.parametrize("op", OPS)
def test_reference_takes_the_arguments_in_the_same_order(op):
    public = inspect.signature(getattr(fastelbo, op)).parameters
    reference = inspect.signature(getattr(fastelbo.reference, op)).parameters
    positional = [name for name, p in public.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [name for name, p in reference.items() if p.kind is p.POSITIONAL_OR_KEYWORD]


PROJECTS = [getattr(fastelbo.compat, name) for name in fastelbo.compat.PROJECTS]
DOCUMENTED = [
    fastelbo,
    fastelbo.backends,
    fastelbo.compat,
    fastelbo.distributed,
    fastelbo.distributions,
    fastelbo.nn,
    fastelbo.sampling,
    fastelbo.testing,
    *PROJECTS,
]


def public(module):
    """The public functions and classes of a module, by their full names."""
    defined = [name for name, thing in vars(module).items() if getattr(thing, "__module__", "") == module.__name__]
    for name in getattr(module, "__all__", [name for name in defined if not name.startswith("_")]):
        if callable(getattr(module, name)):
            yield f"{module.__name__}.{name}", getattr(module, name)


PUBLIC = dict(sorted(pair for module in DOCUMENTED for pair in public(module)))
each_public_name = pytest.mark.parametrize("name", PUBLIC)


@each_public_name
def test_docstring_examples_run(name):
    finder = doctest.DocTestFinder()  # finds those of a class's methods, too
    tests = finder.find(PUBLIC[name], name, module=False, globs={"fastelbo": fastelbo, "torch": torch})
    assert any(test.name == name for test in tests), f"{name} has no example"
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize().failed == 0


@each_public_name
def test_docstring_has_its_sections(name):
    thing = PUBLIC[name]
    sections = dict(re.findall(r"^(\w+):\n((?:(?:    .*)?\n)+)", inspect.getdoc(thing) + "\n", flags=re.MULTILINE))
    described = re.findall(r"^    (\w[\w, ]*):", sections.get("Args", ""), flags=re.MULTILINE)
    described = {argument for names in described for argument in names.split(", ")}
    assert set(inspect.signature(thing).parameters) == described
    ours = ("fastelbo.ELBO", "fastelbo.Scale", "fastelbo.backends.", "fastelbo.distributed.", "fastelbo.testing.")
    if not name.startswith((*ours, "fastelbo.compat.diffusers.patch", "fastelbo.compat.patch")):
        assert {"Raises", "Source"} <= set(sections)
    if not inspect.isclass(thing):
        assert "Returns" in sections or thing.__name__.startswith("assert_")
        return
    for method, function in vars(thing).items():
        if inspect.isfunction(function) and not method.startswith("_"):
            for argument in list(inspect.signature(function).parameters)[1:]:
                assert re.search(rf"\b{argument}\b", function.__doc__), f"{method} does not say what {argument} is"
