"""The documentation: its Python runs, its commands exist, its quotes stand in the files that they are from."""

import doctest
import re
import runpy
import shlex
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUOTES = "docs/adding_an_op.md"
PATHS = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in PATHS}
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)

# What a page's blocks take for granted.
BEFORE = {
    "docs/noise.md": """
        import torch
        import fastelbo
        mean, logvar = torch.zeros(2, 4, 3)
        generator, seed, noise = torch.Generator().manual_seed(0), torch.tensor([7]), torch.zeros(4, 3)
        mean_shard, logvar_shard, rank = mean[2:], logvar[2:], 1
        """,
    "docs/distributed.md": """
        import torch
        import fastelbo
        mean, logvar = torch.zeros(2, 4, 3)
        """,
}


def blocks(page, *languages):
    return [fence for fence in FENCE.finditer(PAGES[page]) if fence["language"] in languages]


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("page", [page for page in PAGES if page != QUOTES and blocks(page, "python")])
def test_python_runs(page, one_rank):
    names = {"__name__": "__main__"}
    exec(textwrap.dedent(BEFORE.get(page, "")), names)
    for fence in blocks(page, "python"):
        if fence["text"].startswith(">>>"):
            runner = doctest.DocTestRunner()
            runner.run(doctest.DocTestParser().get_doctest(fence["text"], names, page, page, 0))
            assert runner.summarize().failed == 0
        else:
            exec(compile(fence["text"], page, "exec"), names)


def commands():
    """Lines that call a script of ours."""
    for text in PAGES.values():
        call = r"(?:python|torchrun)[^`\n]* (?:examples|benchmarks)/\w+\.py[^`\n#]*"
        yield from (line.strip() for line in re.findall(call, text.replace("\\\n", " ")))


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_exists(command, capsys, monkeypatch):
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    given = [word for word in words[words.index(script) + 1 :] if word.startswith("-")]
    monkeypatch.setattr("sys.argv", [script, "--help"])
    monkeypatch.syspath_prepend((ROOT / script).parent)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert ended.value.code == 0
    takes = re.findall(r"--[\w-]+", capsys.readouterr().out)
    assert set(given) <= set(takes)


def test_links_of_the_readme_lead_somewhere():
    """Those of the pages are checked where the site is built."""
    for path, anchor in re.findall(r"\]\(([\w./]+)(?:#([\w-]+))?\)", PAGES["README.md"]):
        assert (ROOT / path).exists(), path
        headings = re.findall(r"^#+ (.*)$", PAGES[path], re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings]


def test_pictures_are_small_and_shown():
    written = {
        name for pictures in runpy.run_path(ROOT / "docs/pictures.py")["RUNS"].values() for name in pictures.values()
    }
    assert {path.stem for path in ROOT.glob("docs/images/*")} == written
    shown = set(re.findall(r"\((?:\.\./)?images/(\w+)\.png\)", "".join(PAGES.values())))
    assert shown == written
    assert max(path.stat().st_size for path in ROOT.glob("docs/images/*")) < 150_000


def test_make_targets_exist():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    for page, text in PAGES.items():
        in_fences = "\n".join(fence["text"] for fence in blocks(page, "", "sh"))
        named = re.findall(r"`make ([\w-]+)", text) + re.findall(r"^make ([\w-]+)", in_fences, re.M)
        assert set(named) <= set(targets), page


def test_quotes_are_verbatim():
    """Each block stands line by line, but for its indentation, in the file that its section names first."""
    quoted = set()
    for fence in blocks(QUOTES, "python", "cpp"):
        above = PAGES[QUOTES][: fence.start()]
        section = above[above.rindex("\n## ") :]
        named = next(name for name in re.findall(r"`([\w./]+\.\w+)`", section) if (ROOT / name).exists())
        file, quote = (re.sub(r"\n\s*", "\n", text.strip()) for text in ((ROOT / named).read_text(), fence["text"]))
        assert quote in file, f"{named} has no\n{fence['text']}"
        quoted.add(named)
    places = ("fastelbo/reference/{}.py", "tests/test_{}.py", "fastelbo/ops/{}.py", "kernels/{}.py")
    places += (
        "csrc/cpu/{}.cpp",
        "csrc/cpu/{}.loops.h",
        "csrc/cuda/{}.cu",
        "fastelbo/__init__.py",
        "benchmarks/cases.py",
        "tests/ops.py",
    )
    assert quoted == {place.format("gaussian_log_prob") for place in places}
