"""Names of KV cache formats, as data: every family of names is one row."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace

import torch

from .. import fit, polarquant, presets, turboquant
from ..grid import E4M3, E5M2, GRIDS
from ..qtensor import Format
from ..scheme import Scheme
from .format import Constant, KVFormat


def _ranged(bits: str, size: str | None) -> Scheme:
    levels = GRIDS[f"uint{bits}"]
    return Scheme(levels, int(size or 32), fit.own_range, offset=torch.float16)


def _full(bits: str) -> KVFormat:
    dtypes = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}
    return KVFormat(dtype=dtypes[bits])


def _fp8(element: str | None, per_token: str | None) -> KVFormat:
    grid = {"e4m3": E4M3, "e5m2": E5M2}[element or "e4m3"]
    return _both(presets.format(f"fp8_{element or 'e4m3'}") if per_token else Constant(grid))


def _both(format: Format) -> KVFormat:
    return KVFormat(format, format)


def _kivi(bits: str, size: str | None) -> KVFormat:
    format = _ranged(bits, size)
    return KVFormat(format, format, key_axis="channel", window=128)


def _turbo(bits: str, residual: str | None) -> KVFormat:
    # The 1-bit residual makes inner products unbiased, and only keys enter inner products.
    keys, values = (turboquant.format(f"turbo{bits}{part or ''}") for part in (residual, None))
    return KVFormat(keys, values)


# Every family of names: a pattern, and what makes a KVFormat of the pattern's groups.
KV: dict[str, Callable[..., KVFormat]] = {
    r"(f16|bf16|f32)": _full,
    r"fp8(?:-(e4m3|e5m2))?(-token)?": _fp8,
    r"int([1-8])(?:-g([1-9]\d*))?": lambda *integer: _both(_ranged(*integer)),
    r"kivi([1-8])(?:-g([1-9]\d*))?": _kivi,
    r"turbo([1-8])(-qjl)?": _turbo,
    r"(polar[23]?)": lambda name: _both(polarquant.format(name)),
}
# Each count may stand once.
COUNTS = r"(?:-w(?P<window>\d+)(?!.*-w)|-s(?P<sinks>\d+)(?!.*-s))*"
OPTIONS = rf"(?P<name>.+?)(?P<rotate>-hadamard(?:-kv)?)?{COUNTS}"
GRAMMAR = "then -hadamard or -hadamard-kv may follow, then -w{window} and -s{sinks}"
EXAMPLES = "f16 fp8 fp8-token int8 int4 int4-hadamard int3 int2 kivi4 kivi3 kivi2 kivi2-w32-s4 "
EXAMPLES += "turbo4 turbo3-qjl polar q8_0 q4_0"


def kv_format(name: str | KVFormat) -> KVFormat:
    """The format of a cache with this name; a KVFormat is returned as it is.

    - f16, bf16, f32: full precision.
    - fp8[-e4m3|-e5m2][-token]: one constant scale of 1.0, or a float32 scale for each token.
    - int{1..8}[-g{n}]: by token, n = 32 values share a float16 scale and a float16 minimum.
    - kivi{1..8}[-g{n}]: the same, but keys by channel, and a window of 128 (KIVI).
    - turbo{1..8}[-qjl]: TurboQuant, with qjl its 1-bit residual of the keys; polar, polar3, polar2:
      PolarQuant. Both rotate by themselves.
    - any name that `qlib.format` knows, by token: q8_0, mxfp4, int4-g64-asym, ...

    Each may be followed by -hadamard (rotate keys) or -hadamard-kv (keys and values), then
    -w{tokens} (window) and -s{tokens} (sinks). Raises ValueError, with the nearest name, for
    unknown names, and TypeError for what is neither a name nor a KVFormat.

    >>> kv_format("int4-hadamard-s4").bits(64)         # 4 + (16 + 16) / 32
    (5.0, 5.0)
    """
    if isinstance(name, KVFormat):
        return name
    if not isinstance(name, str):
        raise TypeError(f"format must be a name or a KVFormat, got {name!r}")
    if (found := re.fullmatch(OPTIONS, name)) and (format := _named(found["name"])):
        if found["rotate"]:
            format = replace(format, rotate="keys+values" if "kv" in found["rotate"] else "keys")
        counts = {key: int(found[key]) for key in ("window", "sinks") if found[key] is not None}
        return replace(format, **counts)
    names = [*EXAMPLES.split(), *presets.formats()]
    near = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    known = f"known are {', '.join(EXAMPLES.split())} and qlib.formats()"
    raise ValueError(f"unknown KV cache format {name!r}: {hint}{known}; {GRAMMAR}")


def _named(name: str) -> KVFormat | None:
    for pattern, make in KV.items():
        if match := re.fullmatch(pattern, name):
            return make(*match.groups())
    try:
        return _both(presets.format(name))
    except ValueError:
        return None
