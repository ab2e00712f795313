"""What the benchmarks share: where and with what they ran, JSON files, Markdown tables."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from qlib.files.atomic import replacing

RESULTS = Path(__file__).parents[1] / "book" / "results"


def environment(*packages: str) -> dict[str, Any]:
    """Date, processor, threads, and the versions of what is installed of `packages`."""
    return {
        "date": datetime.date.today().isoformat(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | versions(*packages),
    }


def versions(*packages: str) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The name that the processor gives itself, or that of its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON with one row to a line, in place of the file as a whole."""
    lines = []
    for key, value in content.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            rows = ",\n  ".join(json.dumps(row) for row in value)
            lines.append(f" {json.dumps(key)}: [\n  {rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value)}")
    with replacing(path) as partial:
        partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def markdown(rows: Sequence[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """A table with a line for each row; `columns` says what stands under each heading.

    >>> print(markdown([{"ms": 2.0}], {"time": lambda row: f"{row['ms']:.1f} ms"}))
    | time   |
    |:-------|
    | 2.0 ms |
    """
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    rule = "|" + "|".join(":" + "-" * (width + 1) for width in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def number(key: str, digits: int, scale: float = 1.0, unit: str = "") -> Callable[[dict], str]:
    """A column that shows row[key] * scale, or a dash where the row has none."""

    def cell(row: dict) -> str:
        value = row.get(key)
        return "-" if value is None else f"{value * scale:.{digits}f}{unit}"

    return cell


def text(key: str) -> Callable[[dict], str]:
    """A column that shows row[key] as it is."""
    return lambda row: str(row[key])
