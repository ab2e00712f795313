"""What the command line prints: tables, sizes, lists that are cut, and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from ..families import Label
from ..files.gguf_report import GgufReport
from ..files.inspect import Contents, by_kind
from ..report import Report

WIDTH = 100
SHORT = 16
Row = Sequence[Any]


def size(nbytes: float) -> str:
    """A number of bytes in units of 1000, as the library's reports have them.

    >>> size(512), size(98_362_432), size(16_060_522_496)
    ('512 bytes', '98.4 MB', '16.1 GB')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:,.1f} {unit}"
    return f"{nbytes:,.0f} bytes"


def printable(value: Any) -> str:
    """A value on one line; what a hostile file could steer a terminal with becomes a U+FFFD."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(value).split()))


def fit(text: str, width: int) -> str:
    """`text` cut to so many characters.

    >>> fit("a long text", 8)
    'a lon...'
    """
    return text if len(text) <= width else text[: max(0, width - 3)] + "..."


def table(head: Row, rows: Iterable[Row]) -> list[str]:
    """Lines of a table: numbers to the right, with thousands separated; None is left empty.

    >>> print(*table(("type", "bytes"), [("Q4_K", 1234), ("F32", 5)]), sep="\\n")
      type  bytes
      Q4_K  1,234
      F32       5
    """
    rows = list(rows)
    right = [any(isinstance(row[i], int | float) for row in rows) for i in range(len(head))]
    cells = [[_cell(value) for value in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row in cells:
        columns = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right))
        lines.append(fit("  " + "  ".join(columns).rstrip(), WIDTH))
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else printable(value)


def cut(lines: Sequence[str], everything: bool, longest: int = 20) -> list[str]:
    """The first lines, and how many more there are.

    >>> cut(["a", "b", "c"], False, 1)
    ['a', '  ... and 2 more (--all)']
    """
    if everything or len(lines) <= longest + 1:
        return list(lines)
    return [*lines[:longest], f"  ... and {len(lines) - longest:,} more (--all)"]


def bits(nbytes: float, weights: int) -> float | None:
    """Bits per weight, or None where there is no weight."""
    return 8 * nbytes / weights if weights else None


def kinds_table(rows: Sequence[tuple[str, int, int, int]]) -> list[str]:
    """A table of (type, tensors, values, bytes) and the bits of each value."""
    head = ("type", "tensors", "values", "bytes", "bits each")
    return table(head, [(*row, bits(row[3], row[2])) for row in rows])


def contents_text(contents: Contents, everything: bool) -> str:
    """What `inspect` prints: a line, the types, the metadata, the tensors."""
    bpw = contents.bits_per_weight
    per_weight = "" if bpw is None else f", {bpw:.3f} bits per weight"
    count, total = len(contents.tensors), f"{contents.nbytes:,} bytes"
    head = printable(f"{contents.path}: {contents.container}, {count:,} tensors, {total}")
    lines = [head + per_weight, *kinds_table(contents.kinds())]
    lines += [fit(f"inputs: {printable(kind)}", WIDTH) for kind in contents.activations]
    if contents.metadata:
        found = contents.metadata.items()
        pairs = [fit(f"  {printable(key)}: {_short(value)}", WIDTH) for key, value in found]
        lines += ["metadata", *cut(pairs, everything)]
    rows = [(t.name, t.kind, str(list(t.shape)), t.nbytes) for t in contents.tensors]
    head, *body = table(("tensor", "type", "shape", "bytes"), rows)
    return "\n".join([*lines, head, *cut(body, everything)])


def _short(value: Any) -> str:
    if isinstance(value, list | np.ndarray) and len(value) > SHORT:
        return f"{len(value):,} values: {printable(', '.join(map(str, value[:SHORT])))}, ..."
    # Half a megabyte of JSON need not be cleaned when one line of it is shown.
    return printable(str(value)[: 10 * WIDTH])


def contents_data(contents: Contents, everything: bool) -> dict[str, Any]:
    """`contents_text` as data; long arrays of the metadata only with `everything`."""
    rows = contents.kinds()
    metadata = {
        key: value if everything or not _is_long(value) else f"{len(value)} values (--all)"
        for key, value in contents.metadata.items()
    }
    return {
        "path": contents.path,
        "container": contents.container,
        "bytes": contents.nbytes,
        "weights": contents.weights,
        "bits_per_weight": contents.bits_per_weight,
        "types": {kind: {"tensors": n, "values": v, "bytes": b} for kind, n, v, b in rows},
        "inputs": contents.activations,
        "metadata": metadata,
        "tensors": [
            {"name": t.name, "type": t.kind, "shape": list(t.shape), "bytes": t.nbytes}
            for t in contents.tensors
        ],
    }


def _is_long(value: Any) -> bool:
    return isinstance(value, list | np.ndarray) and len(value) > SHORT


def label_data(label: Label) -> dict[str, Any]:
    """The fields of a label that say something."""
    told = {field.name: getattr(label, field.name) for field in fields(label)}
    return {name: value for name, value in told.items() if value not in (None, ())}


def label_text(label: Label) -> str:
    """The fields of a label, one a line."""
    lines = []
    for name, value in label_data(label).items():
        if isinstance(value, tuple):
            value = (" to " if name == "expected_bpw" else ", ").join(map(str, value))
        title = {"qlib": "qlib.format", "bpw_of": "bpw of", "expected_bpw": "bpw"}.get(name, name)
        wrapped = textwrap.wrap(str(value), WIDTH - 15, subsequent_indent=" " * 15)
        lines.append(f"  {title:<12} " + "\n".join(wrapped))
    return f"{label.name}: no such file, but a label of quantization\n" + "\n".join(lines[1:])


def report_data(report: Any) -> dict[str, Any]:
    """A report of `quantize_model` or of a container as data."""
    if isinstance(report, GgufReport):
        types = {kind: {"tensors": n, "bytes": b} for kind, n, _, b in by_kind(report.tensors)}
        data = {"mix": report.mix, "bytes": report.nbytes, "file_bytes": report.file_bytes}
        data |= {"bits_per_weight": report.bits_per_weight, "types": types}
        return data | {"fallbacks": report.fallbacks, "importance": report.importance}
    if not isinstance(report, Report):
        return {"report": str(report)}
    layers = [
        {"layer": r.layer, "shape": r.shape, "bytes": sum(r.nbytes.values()),
         "snr_db": r.snr_db, "output_db": r.output_db}
        for r in report.layers
    ]  # fmt: skip
    data = {"method": report.method, "calibration": report.calibration}
    data |= {"bytes": report.plan.nbytes, "bits_per_weight": report.model_bits_per_weight}
    data |= {"quantized_bits_per_weight": report.bits_per_weight, "seconds": report.seconds}
    return data | {"unreached": report.unreached, "layers": layers}


def to_json(data: Any) -> str:
    """One line of JSON; numbers that are not finite become null, as JSON has none."""
    return json.dumps(_plain(data), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float) else str(value)
