"""Execute notebooks in place, and only those whose outputs are stale; a second run changes no byte.

    python tools/nbrun.py                      the stale ones of _toc.yml
    python tools/nbrun.py --force FILE ...     these, stale or not
    python tools/nbrun.py --check              execute nothing; exit 1 if any is stale

Stale means: the notebook's code, or a file that it was executed against, is no longer what it was. The notebook records the files
(the parts of qlib and kernels that it imported, the shipped data and results) and one digest of them all in its metadata.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nbformat
from notebooks import ENVIRONMENT, RECORD, ROOT, listed, normalize, read, text

DATA = ("qlib/data", "book/results")

# Runs as the last cell and is then removed: which files did this kernel import?
PROBE = """
import json as _json, sys as _sys
print(_json.dumps([m.__file__ for m in list(_sys.modules.values()) if getattr(m, "__file__", None)]))
"""


def digest(notebook: nbformat.NotebookNode, files: list[str]) -> str:
    """One hash over the notebook's code and the named files, missing ones included."""
    total = hashlib.sha256()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            total.update(cell.source.strip("\n").encode() + b"\0")
    data = (str(p.relative_to(ROOT)) for d in DATA for p in (ROOT / d).rglob("*") if p.is_file())
    for name in sorted({*files, *data}):
        path = ROOT / name
        total.update(name.encode() + (path.read_bytes() if path.exists() else b"missing"))
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
            own |= {path, *path.parent.glob(f"{path.stem}.js"), *path.parent.glob(f"{path.stem}.css")}
            if path.parent.name == "widgets":
                own |= {path.parent / "base.js", path.parent / "widget.css"}
    return sorted(str(path.relative_to(ROOT)) for path in own)


def execute(path: Path) -> tuple[Path, bool, float]:
    """Run one notebook and write its normal form; say whether the file changed, and the seconds."""
    from nbclient import NotebookClient

    os.environ.update(ENVIRONMENT)
    start = time.perf_counter()
    notebook = read(path)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    files = own_files(json.loads(notebook.cells.pop().outputs[0]["text"]))
    notebook.metadata[RECORD] = {"digest": digest(notebook, files), "files": files}
    return path, replace(path, text(normalize(notebook))), time.perf_counter() - start


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
    parser.add_argument("-j", type=int, default=os.cpu_count(), help="notebooks at a time")
    options = parser.parse_args()
    paths = [path.resolve() for path in options.files] or listed()
    todo = [path for path in paths if options.force or is_stale(path)]
    if options.check:
        for path in todo:
            print(f"stale: {path.relative_to(ROOT)}")
        return bool(todo)
    with ProcessPoolExecutor(options.j) as pool:
        for path, changed, seconds in pool.map(execute, todo):
            print(f"{'new ' if changed else 'same'} {seconds:5.1f} s  {path.relative_to(ROOT)}", flush=True)
    print(f"{len(todo)} of {len(paths)} notebooks executed; the others are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
