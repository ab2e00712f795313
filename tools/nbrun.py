"""Execute notebooks in place, and only those whose outputs are stale; a second run changes no byte.

    python tools/nbrun.py                      the stale ones of _toc.yml
    python tools/nbrun.py --force FILE ...     these, stale or not
    python tools/nbrun.py --check              execute nothing; exit 1 if any is stale

Stale means: the notebook's code, or a file that it was executed against, is no longer what it was.
The notebook records the files (the parts of qlib and kernels that it imported) and, with the
shipped data and results, one digest of them all in its metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from notebooks import RECORD, ROOT, listed, normalize, prepare_environment, read, text

# Runs as the last cell and is then removed: which files did this kernel import?
PROBE = """
import json as _json, sys as _sys
_files = [getattr(m, "__file__", None) for m in list(_sys.modules.values())]
print(_json.dumps([file for file in _files if file]))
"""


def digest(notebook: nbformat.NotebookNode, files: list[str]) -> str:
    """One hash over the notebook's code, the named files and the data that they can read."""
    code = [cell.source.strip("\n").encode() for cell in notebook.cells if cell.cell_type == "code"]
    named = {name: ROOT / name for name in files}
    content = {name: p.read_bytes() if p.exists() else b"missing" for name, p in named.items()}
    text = b"\0".join([*code, *content.values()])
    for path in sorted((ROOT / "qlib/data").rglob("*")) + sorted(
        (ROOT / "book/results").glob("*.json")
    ):
        # A result matters only to those who name it; the shipped texts and models, to all.
        if path.is_file() and (path.parent.name != "results" or path.stem.encode() in text):
            content[str(path.relative_to(ROOT))] = path.read_bytes()
    total = hashlib.sha256(text)
    for name in sorted(content):
        total.update(name.encode() + hashlib.sha256(content[name]).digest())
    return total.hexdigest()[:16]


def is_stale(path: Path) -> bool:
    notebook = read(path)
    record = notebook.metadata.get(RECORD, {})
    return record.get("digest") != digest(notebook, record.get("files", []))


def own_files(imported: list[str]) -> list[str]:
    """The project's files among the imported ones, with the scripts and styles of widgets."""
    own = set()
    for path in map(Path, imported):
        if path.is_relative_to(ROOT / "qlib") or path.is_relative_to(ROOT / "kernels"):
            own |= {
                path,
                *path.parent.glob(f"{path.stem}.js"),
                *path.parent.glob(f"{path.stem}.css"),
            }
            if path.parent.name == "widgets":
                own |= {path.parent / "base.js", path.parent / "widget.css"}
    return sorted(str(path.relative_to(ROOT)) for path in own)


@dataclass(frozen=True)
class Run:
    """What came of executing one notebook."""

    path: Path
    changed: bool
    seconds: float
    error: str = ""

    def __str__(self) -> str:
        state = "FAIL" if self.error else "new " if self.changed else "same"
        return f"{state} {self.seconds:5.1f} s  {os.path.relpath(self.path)}\n{self.error}".rstrip()


def execute(path: Path) -> Run:
    """Run one notebook and write its normal form; a notebook that raises stays as it was."""
    start = time.perf_counter()
    notebook = blank(path)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    place = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(
        notebook, timeout=600, kernel_name="python3", record_timing=False, resources=place
    )
    try:
        client.execute()
    except CellExecutionError as error:
        return Run(path, False, time.perf_counter() - start, str(error))
    files = own_files(json.loads(notebook.cells.pop().outputs[0]["text"]))
    notebook.metadata[RECORD] = {"digest": digest(notebook, files), "files": files}
    changed = replace(path, text(normalize(notebook)))
    return Run(path, changed, time.perf_counter() - start)


def blank(path: Path) -> nbformat.NotebookNode:
    """The notebook without its outputs and widget state."""
    notebook = read(path)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def replace(path: Path, content: str) -> bool:
    """Write the file whole or not at all; leave it alone when nothing changes."""
    if path.read_text(encoding="utf-8") == content:
        return False
    temporary = path.with_suffix(".tmp")
    temporary.write_text(content, encoding="utf-8")
    os.replace(temporary, path)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--force", action="store_true", help="execute even what is not stale")
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    parser.add_argument("-j", type=int, default=2, help="notebooks at a time")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.files] or listed()
    todo = [path for path in paths if options.force or is_stale(path)]
    if options.check:
        for path in todo:
            print(f"stale: {os.path.relpath(path)}")
        return int(bool(todo))
    prepare_environment()
    with ProcessPoolExecutor(options.j) as pool:
        failed = 0
        for run in pool.map(execute, todo):
            failed += bool(run.error)
            print(run, flush=True)
    print(f"{len(todo)} of {len(paths)} notebooks executed; the others are up to date")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
