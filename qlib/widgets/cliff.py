"""The cliff explorer: every measured format, its bits counted from bytes against its damage."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import traitlets

from . import BookWidget

# One family per way of sharing a scale: name, label, what a whole name looks like, color and shape
# of its mark (an SVG path of radius one). The first pattern that matches decides.
FAMILIES = (
    ("small", "int, groups of 32", r"int\d-g(8|16|32)(-a?sym)?", "--bw-c1",
     "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z"),
    ("large", "int, groups of 64 or 128", r"int\d-g\d+(-a?sym)?", "--bw-c2",
     "M-1-1H1V1H-1z"),
    ("wide", "int, row or tensor", r"int\d(-row|-tensor)?(-a?sym)?|ternary", "--bw-c3",
     "M0-1.2L1.2 1H-1.2z"),
    ("float", "floats", r"nf4|nvfp4|mxfp\d(_e\dm\d)?|fp8_e\dm\d", "--bw-c4",
     "M0-1.35L1.35 0 0 1.35-1.35 0z"),
    ("search", "int, range by search", r"int\d.*-mse", "--bw-c5",
     "M0 1.2L1.2-1H-1.2z"),
)  # fmt: skip
# Name, label, title of the axis, which number of a point is its standard error.
METRICS = (
    ("kl", "KL divergence", "KL divergence (nats)", "kl_error"),
    ("changed", "changed favorites", "tokens with another favorite (1 − top-1)", ""),
    ("perplexity", "perplexity", "perplexity", "perplexity_error"),
)
# The formats that the line joins, from eight bits down to two.
LINE = re.compile(r"int\d-g32-asym")
MODELS = {"smollm2-135m": "SmolLM2-135M", "bpw-small": "bpw-small"}
DIGITS = 6


def family(format: str) -> str:
    """The family of a format, from its name. Raises ValueError for a name of no family.

    >>> family("int4-g128"), family("int4-g32-asym-mse"), family("mxfp6_e2m3"), family("ternary")
    ('large', 'search', 'float', 'wide')
    """
    for name, _, pattern, _, _ in FAMILIES:
        if re.fullmatch(pattern, format):
            return name
    raise ValueError(f"format {format!r} belongs to no family of the cliff explorer")


def point(row: Mapping) -> dict:
    """What the page needs of one row of the scoreboard, to six digits.

    Raises ValueError for a number that is not finite, which JSON cannot carry.
    """
    numbers = {
        "bits": row["bits_per_weight"],
        "kl": row["kl"],
        "kl_error": row["kl_error"],
        "changed": 1 - row["top1"],
        "perplexity": row["perplexity"],
        "perplexity_error": row["perplexity_error"],
    }
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{row['model']} {row['format']}: {name} is {value}")
    named = {"model": row["model"], "format": row["format"], "family": family(row["format"])}
    rounded = {name: float(f"{value:.{DIGITS}g}") for name, value in numbers.items()}
    return named | rounded | {"line": LINE.fullmatch(row["format"]) is not None}


class Cliff(BookWidget):
    """Walk from format to format: bits per weight against KL, changed favorites or perplexity.

    Args:
        rows: rows of the scoreboard, as `results.load("scoreboard")["rows"]` gives them.

    Raises ValueError if there are no rows, or for a format that belongs to no family.
    """

    points = traitlets.List().tag(sync=True)
    models = traitlets.List().tag(sync=True)
    families = traitlets.List().tag(sync=True)
    metrics = traitlets.List().tag(sync=True)
    sizes = traitlets.List([1, 8, 14, 70]).tag(sync=True)
    factor = traitlets.Float(4.0).tag(sync=True)
    at = traitlets.Int().tag(sync=True)
    metric = traitlets.Unicode("kl").tag(sync=True)
    model = traitlets.Unicode("both").tag(sync=True)
    shown = traitlets.List().tag(sync=True)
    log_x = traitlets.Bool(False).tag(sync=True)
    log_y = traitlets.Bool(True).tag(sync=True)
    billions = traitlets.Int(8).tag(sync=True)

    def __init__(self, rows: Sequence[Mapping], **state):
        """`at`: index of the chosen point; `model`: a name of the board or "both"."""
        if not rows:
            raise ValueError("the cliff explorer needs at least one row of the scoreboard")
        found = dict.fromkeys(row["model"] for row in rows)
        order = sorted(found, key=[*MODELS, *found].index)
        points = sorted(map(point, rows), key=lambda p: (order.index(p["model"]), -p["bits"]))
        used = {p["family"] for p in points}
        keys = ("name", "label", "pattern", "color", "shape")
        present = [dict(zip(keys, entry)) for entry in FAMILIES if entry[0] in used]
        # Begin at the format that most readers know: four bits in small groups.
        known = [i for i, p in enumerate(points) if p["format"] == "int4-g32-asym"]
        defaults = {
            "at": known[0] if known else 0,
            "model": "both" if len(order) > 1 else order[0],
            "shown": [f["name"] for f in present],
        }
        super().__init__(
            points=points,
            models=[{"name": name, "label": MODELS.get(name, name)} for name in order],
            families=present,
            metrics=[dict(zip(("name", "label", "axis", "error"), entry)) for entry in METRICS],
            **(defaults | state),
        )
