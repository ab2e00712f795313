"""Check the notebooks against the rules of CONTRIBUTING.md, "Write a chapter".

python tools/nbcheck.py [--fix] [FILE ...]      --fix writes setup lines and normal form, no outputs
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbrun import replace
from notebooks import VIEW, WIDGETS, listed, normalize, read, setup_lines, text

LINE, CELL, MEDIAN, P90 = 80, 20, 5, 12
EXTENT = {"cells": (35, 65), "words": (1500, 3000), "figures": (5, 8), "exercises": (3, 5)}
DIRECTIVE = re.compile(r"^\s*(:{3,}|`{3,}\s*\{)|\{[a-z:_-]+\}`|^\([\w-]+\)=$", re.M)
RAW_HTML = re.compile(r"<(?!https?://|/?(?:sub|sup)>)/?[a-zA-Z][^>\n]*>")
TEXT_LINE = re.compile(r"""^\s*(?:alt=|caption=)?\(?[rf]?(["']).*\1[,)]*$""")
MACHINE = re.compile(r"(?:^|[\s\"'(=])/(?:home|root|tmp|usr|work|Users|opt)/|0x[0-9a-f]{6,}")


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines_of(cell: nbformat.NotebookNode) -> list[str]:
    """Its lines of code: neither blank nor only a text, as captions and alternative texts are."""
    return [line for line in cell.source.split("\n") if line.strip() and not TEXT_LINE.match(line)]


def check_setup(notebook: nbformat.NotebookNode) -> Iterator[str]:
    first = code_cells(notebook)[0]
    if not f"{first.source}\n".startswith(setup_lines()):
        yield "the first code cell does not start with the setup lines: run tools/nbcheck.py --fix"
    if "hide-cell" not in first.metadata.get("tags", []):
        yield "the setup cell is not tagged hide-cell"


def check_cells(notebook: nbformat.NotebookNode) -> Iterator[str]:
    cells = code_cells(notebook)[1:]
    # What is folded, the setup and the solutions, does not count for the flow of the page.
    seen = [cell for cell in cells if "hide-cell" not in cell.metadata.get("tags", [])]
    sizes = sorted(len(lines_of(cell)) for cell in seen)
    for i, cell in enumerate(cells, start=2):
        if len(lines_of(cell)) > CELL:
            yield f"code cell {i} has {len(lines_of(cell))} lines; at most {CELL}"
        for line in cell.source.split("\n"):
            if len(line) > LINE:
                start = line.strip()[:40]
                yield f"code cell {i} has a line of {len(line)} columns, at most {LINE}: {start}"
    if sizes and statistics.median(sizes) > MEDIAN:
        yield f"the median code cell has {statistics.median(sizes):g} lines; at most {MEDIAN}"
    if sizes and (tenth := sizes[int(0.9 * (len(sizes) - 1))]) > P90:
        yield f"the 90th percentile of the code cells is {tenth} lines; at most {P90}"


def check_outputs(notebook: nbformat.NotebookNode) -> Iterator[str]:
    state = notebook.metadata.get("widgets", {}).get(WIDGETS, {}).get("state", {})
    missing = [cell for cell in code_cells(notebook) if cell.execution_count is None]
    if missing:
        yield f"{len(missing)} code cells were not executed: run tools/nbrun.py"
    for i, cell in enumerate(code_cells(notebook), start=1):
        for output in cell.outputs:
            yield from (f"code cell {i}: {problem}" for problem in check_output(output, state))


def check_output(output: nbformat.NotebookNode, state: dict) -> Iterator[str]:
    if output.output_type == "error":
        yield f"raises {output.ename}"
    if output.get("name") == "stderr":
        yield f"writes to stderr: {output.text.strip()[:60]!r}"
    data = output.get("data", {})
    if VIEW in data and data[VIEW]["model_id"] not in state:
        yield "shows a widget whose state is not stored: the page would have a blank"
    if "image/png" in data:
        yield "shows a PNG; use qlib.plots.show"
    for shown in (output.get("text", ""), data.get("text/plain", "")):
        if found := MACHINE.search(shown):
            yield f"shows an address or a path of this machine: {found[0].strip()!r}"


def plain_prose(cell: nbformat.NotebookNode) -> str:
    """A Markdown cell without its code, mathematics and link targets."""
    marks = r"```.*?```|`[^`\n]*`(?!`)|\$\$.*?\$\$|\$[^$\n]*\$|(?<=\])\([^)]*\)"
    return re.sub(marks, "", cell.source, flags=re.S)


def check_prose(notebook: nbformat.NotebookNode) -> Iterator[str]:
    depth = 0
    for i, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "markdown":
            continue
        prose = plain_prose(cell)
        if found := DIRECTIVE.search(cell.source):
            yield f"cell {i} uses MyST, which Colab shows as raw text: {found[0].strip()!r}"
        if found := RAW_HTML.search(prose):
            yield f"cell {i} uses raw HTML: {found[0]!r}"
        for heading in re.findall(
            r"^(#+) ", re.sub(r"```.*?```", "", cell.source, flags=re.S), re.M
        ):
            if len(heading) > depth + 1 or (len(heading) == 1 and depth):
                yield f"cell {i} has a heading of level {len(heading)} after one of level {depth}"
            depth = len(heading)


def check_form(notebook: nbformat.NotebookNode) -> Iterator[str]:
    if text(normalize(notebook)) != text(notebook):
        yield "is not in normal form: run tools/nbcheck.py --fix"


def check_extent(notebook: nbformat.NotebookNode) -> Iterator[str]:
    """The size of a chapter: small enough for one sitting, large enough to show what it says."""
    prose = " ".join(plain_prose(cell) for cell in notebook.cells if cell.cell_type == "markdown")
    shown = [output for cell in code_cells(notebook) for output in cell.outputs]
    figures = sum(
        VIEW in o.get("data", {}) or "<figure " in o.get("data", {}).get("text/html", "")
        for o in shown
    )
    exercises = exercises_of(notebook)
    sizes = {"cells": len(notebook.cells), "words": len(re.findall(r"[A-Za-z][\w'-]*", prose))}
    sizes |= {"figures": figures, "exercises": len(exercises)}
    for what, (low, high) in EXTENT.items():
        if not low <= sizes[what] <= high:
            yield f"has {sizes[what]} {what}; a chapter has {low} to {high}"


def exercises_of(notebook: nbformat.NotebookNode) -> list[str]:
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return re.findall(r"^\*\*Exercise \d+", prose, re.M)


def check_exercises(notebook: nbformat.NotebookNode) -> Iterator[str]:
    solutions = [
        cell.source for cell in code_cells(notebook) if cell.source.startswith("# Solution")
    ]
    wanted = exercises_of(notebook)
    if len(solutions) != len(wanted):
        yield f"has {len(wanted)} exercises and {len(solutions)} solutions"
    for source in solutions:
        if "assert " not in source:
            yield f"{source.splitlines()[0][2:]} asserts nothing"


CHECKS = (check_setup, check_cells, check_outputs, check_prose, check_exercises, check_form)


def problems(path: Path) -> list[str]:
    """Every broken rule of one notebook, as sentences."""
    notebook = read(path)
    # A notebook in a part's folder is a chapter; the front page is not.
    checks = CHECKS if path.parent.name == "book" else (*CHECKS, check_extent)
    return [problem for check in checks for problem in check(notebook)]


def fix(path: Path) -> None:
    """Write the setup lines in place of older ones, and the normal form."""
    notebook = read(path)
    first = code_cells(notebook)[0]
    own = re.sub(
        r"\A(import sys\n+)?(if [^\n]*google.colab[^\n]*\n([ \t]+[^\n]*\n?)*)?", "", first.source
    )
    first.source = setup_lines() + own
    first.metadata["tags"] = sorted({*first.metadata.get("tags", []), "hide-cell"})
    replace(path, text(normalize(notebook)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--fix", action="store_true", help="write setup lines and normal form")
    options = parser.parse_args()
    found = 0
    for path in [path.resolve() for path in options.files] or listed():
        if options.fix:
            fix(path)
        for problem in problems(path):
            found += 1
            print(f"{os.path.relpath(path)}: {problem}")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
