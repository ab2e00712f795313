"""The notebooks keep the rules of CONTRIBUTING.md, and the tools for them work."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbcheck
import nbformat
import nbrun
import notebooks
import pytest
import yaml

ROOT = notebooks.ROOT
BOOK = notebooks.listed()
NAMES = [str(path.relative_to(ROOT)) for path in BOOK]


def test_contents_and_folder_agree():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    named = [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]
    for name in named:
        assert (ROOT / f"{name}.ipynb").exists() or (ROOT / f"{name}.md").exists(), name
    assert set(BOOK) == set((ROOT / "book").rglob("*.ipynb"))


@pytest.mark.parametrize("path", BOOK, ids=NAMES)
def test_rules(path):
    assert nbcheck.problems(path) == []


@pytest.mark.parametrize("path", BOOK, ids=NAMES)
def test_cited_papers_are_in_the_bibliography(path):
    known = set(re.findall(r"url\s*=\s*\{([^}]+)\}", (ROOT / "book/references.bib").read_text()))
    prose = "\n".join(c.source for c in notebooks.read(path).cells if c.cell_type == "markdown")
    cited = set(re.findall(r"\((https?://(?:arxiv\.org|doi\.org)/[^)\s]+)\)", prose))
    assert cited - known == set()


def test_repository_has_one_address():
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    for name in ("pyproject.toml", "CITATION.cff"):
        assert set(re.findall(r"https://github\.com/[^\s\"']+", (ROOT / name).read_text())) == {
            address
        }


def chapter() -> nbformat.NotebookNode:
    """A small notebook in normal form that keeps every rule but those on its size."""
    new = nbformat.v4
    cells = [
        new.new_markdown_cell("# Title\n\nA sentence with `code` and $x < y$."),
        new.new_code_cell(notebooks.setup_lines().rstrip("\n"), metadata={"tags": ["hide-cell"]}),
        new.new_code_cell("1 + 1"),
        new.new_markdown_cell("**Exercise 1.** Add."),
        new.new_code_cell("# Solution 1\nassert 1 + 1 == 2"),
    ]
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), start=1):
        cell.execution_count = count
    cells[2].outputs = [new.new_output("execute_result", {"text/plain": "2"}, execution_count=2)]
    return notebooks.normalize(new.new_notebook(cells=cells))


def complaints(notebook: nbformat.NotebookNode) -> list[str]:
    return [problem for check in nbcheck.CHECKS for problem in check(notebook)]


def stream(name: str, text: str) -> list:
    return [nbformat.v4.new_output("stream", name=name, text=text)]


def view(model: str) -> list:
    data = {notebooks.VIEW: {"model_id": model}, "text/plain": "<Bits: interactive figure>"}
    return [nbformat.v4.new_output("display_data", data)]


def test_good_notebook_has_no_problem():
    assert complaints(chapter()) == []


BROKEN = {
    "uses MyST": (0, "source", "# Title\n\n```{note}\nx\n```"),
    "cell 1 uses MyST": (0, "source", "# Title\n\nsee {cite:p}`x`"),
    "raw HTML: '<b>'": (0, "source", "# Title\n\n<b>x</b>"),
    "heading of level 3": (3, "source", "### Deep\n\n**Exercise 1.** Add."),
    "1 exercises and 0 solutions": (4, "source", "assert True"),
    "asserts nothing": (4, "source", "# Solution 1\nprint(2)"),
    "setup lines": (1, "source", "import sys"),
    "not tagged hide-cell": (1, "metadata", {}),
    "has 21 lines": (2, "source", "\n".join(["x = 1"] * 21)),
    "median code cell has 6": (2, "source", "\n".join(["x = 1"] * 6)),
    "90th percentile of the code cells is 13": (2, "source", "\n".join(["x = 1"] * 13)),
    "line of 81 columns": (2, "source", "x" * 81),
    "1 code cells were not executed": (2, "execution_count", None),
    "writes to stderr: 'careful'": (2, "outputs", stream("stderr", "careful")),
    "an address or a path": (2, "outputs", stream("stdout", "<object at 0x7f12ab34cd56>")),
    "a path of this machine: '/tmp/'": (2, "outputs", stream("stdout", "read /tmp/x/y")),
    "the page would have a blank": (2, "outputs", view("0" * 32)),
    "not in normal form": (2, "metadata", {"collapsed": True}),
}


@pytest.mark.parametrize("expected", BROKEN)
def test_broken_notebook_is_found(expected):
    notebook = copy.deepcopy(chapter())
    index, key, value = BROKEN[expected]
    notebook.cells[index][key] = nbformat.from_dict(value)
    assert any(expected in problem for problem in complaints(notebook)), complaints(notebook)


def test_lines_of_text_are_not_code():
    source = "f(\n    x,\n    alt=\"One \"\n    'two',\n\n    caption=f\"three\")\ny = 'text'"
    assert nbcheck.lines_of(nbformat.v4.new_code_cell(source)) == ["f(", "    x,", "y = 'text'"]


def test_size_of_a_chapter_is_checked():
    found = list(nbcheck.check_extent(chapter()))
    assert "has 5 cells; a chapter has 35 to 65" in found
    assert "has 0 figures; a chapter has 5 to 8" in found
    assert len(found) == 4


def test_fix_writes_setup_lines_before_the_chapters_own(tmp_path):
    notebook = chapter()
    notebook.cells[1].source = (
        "import sys\n"
        'if "google.colab" in sys.modules:\n'
        '    %pip install -q "git+https://example.org/old"\n'
        "import torch\n"
    )
    path = tmp_path / "x.ipynb"
    path.write_text(notebooks.text(notebook))
    nbcheck.fix(path)
    assert notebooks.read(path).cells[1].source == notebooks.setup_lines() + "import torch"
    assert complaints(notebooks.read(path)) == []


def test_normal_form_does_not_depend_on_random_ids():
    def with_ids(first: str, second: str) -> nbformat.NotebookNode:
        notebook = copy.deepcopy(chapter())
        state = {second: {"state": {}}, first: {"state": {"layout": f"IPY_MODEL_{second}"}}}
        notebook.metadata["widgets"] = {notebooks.WIDGETS: {"state": state}}
        notebook.cells[2].outputs = view(first)
        notebook.cells[2].id = first[:8]
        return notebooks.normalize(notebook)

    one, other = with_ids("a" * 32, "b" * 32), with_ids("f" * 32, "e" * 32)
    assert notebooks.text(one) == notebooks.text(other)
    assert notebooks.normalize(one) == one
    assert list(nbcheck.check_outputs(one)) == []


@pytest.fixture
def executed(tmp_path) -> Path:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CODE)])
    path = tmp_path / "x.ipynb"
    path.write_text(notebooks.text(notebooks.normalize(notebook)))
    notebooks.prepare_environment()
    run = nbrun.execute(path)
    assert run.changed
    assert run.error == ""
    return path


CODE = "import torch\nimport qlib\nqlib.quantize(torch.ones(2, 32), 'int4-g32').nbytes"


def test_second_execution_changes_no_byte(executed):
    before = executed.read_bytes()
    assert not nbrun.execute(executed).changed
    assert executed.read_bytes() == before
    assert notebooks.read(executed).cells[0].outputs[0].data["text/plain"] == "36"


def test_stale_when_code_or_a_used_file_changes(executed, tmp_path, monkeypatch):
    assert not nbrun.is_stale(executed)
    notebook = notebooks.read(executed)
    notebook.cells[0].source += " + 0"
    executed.write_text(notebooks.text(notebook))
    assert nbrun.is_stale(executed)

    record = notebook.metadata[notebooks.RECORD]
    assert {"qlib/__init__.py", "qlib/scheme.py", "qlib/pack.py"} <= set(record["files"])
    assert "qlib/plots.py" not in record["files"]
    used = tmp_path / "used.py"
    used.write_text("a = 1")
    monkeypatch.setattr(nbrun, "ROOT", tmp_path)
    digest = nbrun.digest(notebook, ["used.py"])
    assert nbrun.digest(notebook, ["used.py"]) == digest
    used.write_text("a = 2")
    assert nbrun.digest(notebook, ["used.py"]) != digest


def test_failing_notebook_stays_as_it_was(executed):
    notebook = notebooks.read(executed)
    notebook.cells[0].source = "1 / 0"
    executed.write_text(notebooks.text(notebook))
    before = executed.read_bytes()
    run = nbrun.execute(executed)
    assert "ZeroDivisionError" in run.error
    assert str(run).startswith("FAIL")
    assert executed.read_bytes() == before


def boxed(markdown: str) -> str:
    """The document tree of one block quote, after the book's transform."""
    from book_ext import Boxes
    from docutils.core import publish_doctree
    from myst_parser.docutils_ import Parser

    tree = publish_doctree(markdown, parser=Parser())
    Boxes(tree).apply()
    return tree.pformat()


def test_quote_with_a_known_title_becomes_a_box():
    tree = boxed("> **Definition: block.** A block has $n$ weights.\n>\n> More.")
    assert '<admonition classes="note bw-box">' in tree
    assert "<title>\n            Definition: block\n" in tree
    assert "<block_quote>" not in tree
    assert "A block has" in tree
    assert "More." in tree
    assert boxed("> **You will learn.**\n>\n> - to count").count("<paragraph>") == 1


def test_other_quotes_stay_quotes():
    for markdown in ("> Plain words.", "> **Bold** but no title known.", "> - a list"):
        assert "<admonition" not in boxed(markdown)
        assert "<block_quote>" in boxed(markdown)
