"""qlib's own container: one safetensors file whose metadata says which format each tensor has.

Every stored tensor appears under its own name (`layer.weight.codes`, `layer.weight.scale`, ...),
so any safetensors reader can look inside. The metadata entry "qlib" is JSON:
`{"version": 1, "tensors": {name: {"shape": [out, in], "format": {...}}}}`. Version 2 has also
"layers", by name: what a layer does with its inputs (`qlib.files.inputs`).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import ggml
from ..columns import Columns
from ..double import DoubleQuant
from ..errors import FormatError
from ..fit import FITS
from ..ggml import BlockFormat
from ..grid import GRIDS, Grid
from ..polarquant import PolarQuant
from ..qtensor import Format, QTensor
from ..reordered import Reordered, is_permutation
from ..scheme import Scheme
from ..storage import Divisor
from ..turboquant import TurboQuant
from .atomic import replacing

VERSIONS = (1, 2)
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32)}
STORED_AS = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32",
             torch.int32: "I32"}  # fmt: skip
MAX_WEIGHTS = 1 << 40
MAX_DEPTH = 4
# Formats of rotated rows are described by their own fields, under these names.
ROTATED = {"turboquant": TurboQuant, "polarquant": PolarQuant}
LENGTHS = ("norm", "radius")


def save_tensors(
    path: str | os.PathLike,
    quantized: Mapping[str, QTensor],
    dense: Mapping[str, Tensor] | None = None,
    layers: Mapping[str, dict] | None = None,
) -> None:
    """Write quantized and dense tensors to one file, atomically (temporary name, then rename).

    Args:
        layers: JSON data for each layer that has some, by name.
    """
    described = {
        name: {"shape": list(q.shape), "format": format_to_dict(q.format)}
        for name, q in quantized.items()
    }
    tensors = {_key(n, part): t for n, q in quantized.items() for part, t in q.parts.items()}
    tensors |= dict(dense or {})
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    # A reader of version 1 would pass over what the layers do.
    entry = {"version": 2, "layers": dict(layers)} if layers else {"version": 1}
    metadata = {"qlib": json.dumps(entry | {"tensors": described})}
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt", **metadata})


def load_tensors(path: str | os.PathLike, names: Iterable[str] | None = None) -> dict[str, QTensor]:
    """The quantized tensors of a file (or only those in `names`).

    Raises FormatError, naming file and field, unless every part has exactly the dtype, shape and
    range of values that its format prescribes.
    """
    with _open(path) as file:
        described = _entry(path, file.metadata() or {})["tensors"]
        chosen = list(described) if names is None else list(names)
        missing = [name for name in chosen if name not in described]
        if missing:
            raise FormatError(path, "qlib", f"holds no quantized tensor {missing[0]!r}")
        return {name: _load_one(path, file, name, described[name]) for name in chosen}


def load_dense(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a file that belong to no quantized tensor."""
    with _open(path) as file:
        described = _entry(path, file.metadata() or {})["tensors"]
        owned = tuple(f"{name}." for name in described)
        names = [key for key in file.keys() if not key.startswith(owned)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}


def load_layers(path: str | os.PathLike) -> dict[str, object]:
    """The unchecked JSON data of each layer that has some."""
    with _open(path) as file:
        return _entry(path, file.metadata() or {}).get("layers", {})


def format_to_dict(format: Format) -> dict:
    """A format as JSON data. Raises ValueError for formats and fits that have no name here."""
    if isinstance(format, BlockFormat):
        return {"ggml": format.kind.name}
    if isinstance(format, Columns):
        return {"columns": scheme_to_dict(format.scheme)}
    if isinstance(format, Reordered):
        return {"reordered": scheme_to_dict(format.scheme)}
    for name, kind in ROTATED.items():
        if isinstance(format, kind):
            fields = vars(format).items()
            return {name: {k: _storage_to_data(v) if k in LENGTHS else v for k, v in fields}}
    return scheme_to_dict(format)


def scheme_to_dict(scheme: Scheme) -> dict:
    """A Scheme as JSON data. Raises ValueError for formats and fits that have no name here."""
    if not isinstance(scheme, Scheme):
        raise ValueError(f"qlib's container stores Schemes, not {type(scheme).__name__}")
    if FITS.get(scheme.fit.__name__) is not scheme.fit:
        raise ValueError(f"fit {scheme.fit.__name__} is not in qlib.fit.FITS: it cannot be named")
    return {
        "grid": scheme.grid.name if scheme.is_standard else {"learned": scheme.grid.name},
        "block": scheme.block,
        "fit": scheme.fit.__name__,
        "scale": _storage_to_data(scheme.scale),
        "offset": None if scheme.offset is None else _storage_to_data(scheme.offset),
    }


def _storage_to_data(storage):
    if isinstance(storage, Scheme):
        return scheme_to_dict(storage)
    if isinstance(storage, DoubleQuant):
        return {"double": storage.block}
    if isinstance(storage, Divisor):
        return {"divisor": _storage_to_data(storage.dtype)}
    return {"grid": storage.name} if isinstance(storage, Grid) else str(storage)[len("torch.") :]


class Reader:
    """Turns JSON data into Schemes; every refusal names the file and the field."""

    def __init__(self, path, field: str, learned: Tensor | None = None):
        self.path, self.field, self.learned = path, field, learned

    def format(self, data) -> Format:
        if isinstance(data, dict) and set(data) == {"ggml"}:
            formats = {format.kind.name: format for format in ggml.FORMATS.values()}
            if isinstance(data["ggml"], str) and data["ggml"] in formats:
                return formats[data["ggml"]]
            raise self.error(f"unknown ggml type {data['ggml']!r}")
        if isinstance(data, dict) and set(data) == {"columns"}:
            return Columns(self.scheme(data["columns"]))
        if isinstance(data, dict) and set(data) == {"reordered"}:
            return self.reordered(data["reordered"])
        if isinstance(data, dict) and len(data) == 1 and next(iter(data)) in ROTATED:
            return self.rotated(*next(iter(data.items())))
        return self.scheme(data)

    def rotated(self, name: str, data) -> Format:
        fields = ROTATED[name].__dataclass_fields__
        if not isinstance(data, dict) or set(data) != set(fields):
            raise self.error(f"{name} has exactly the fields {', '.join(fields)}")
        stored = {k: DTYPES.get(str(data[k])) for k in LENGTHS if k in data}
        try:
            return ROTATED[name](**{**data, **stored})
        except (TypeError, ValueError) as error:
            raise self.error(str(error)) from None

    def reordered(self, data) -> Reordered:
        try:
            return Reordered(self.scheme(data))
        except ValueError as error:
            raise error if isinstance(error, FormatError) else self.error(str(error)) from None

    def scheme(self, data, depth: int = 0) -> Scheme:
        keys = {"grid", "block", "fit", "scale", "offset"}
        if not isinstance(data, dict) or set(data) != keys or depth > MAX_DEPTH:
            raise self.error(f"a scheme has exactly the fields {', '.join(sorted(keys))}")
        if data["fit"] not in list(FITS):
            raise self.error(f"unknown fit {data['fit']!r}")
        offset = data["offset"]
        try:
            return Scheme(
                self.grid(data["grid"]),
                data["block"],
                FITS[data["fit"]],
                self.storage(data["scale"], depth),
                None if offset is None else self.storage(offset, depth),
            )
        except ValueError as error:
            raise error if isinstance(error, FormatError) else self.error(str(error)) from None

    def storage(self, data, depth: int):
        if isinstance(data, str) and data in DTYPES:
            return DTYPES[data]
        kind = next(iter(data)) if isinstance(data, dict) and len(data) == 1 else None
        if kind == "grid":
            return self.grid(data["grid"])
        if kind == "double":
            return DoubleQuant(data["double"])
        if kind == "divisor" and isinstance(data["divisor"], str) and data["divisor"] in DTYPES:
            return Divisor(DTYPES[data["divisor"]])
        return self.scheme(data, depth + 1)

    def grid(self, data) -> Grid:
        if isinstance(data, str) and data in GRIDS:
            return GRIDS[data]
        if isinstance(data, dict) and isinstance(data.get("learned"), str):
            if self.learned is not None and self.learned.dtype == torch.float32:
                return Grid(data["learned"], self.learned)
            raise self.error("a learned grid needs its points, a float32 tensor called 'grid'")
        raise self.error(f"unknown grid {data!r}")

    def error(self, message: str) -> FormatError:
        return FormatError(self.path, self.field, message)


def _open(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise FormatError(path, "header", f"not a valid safetensors file ({error})") from None


def _entry(path, metadata: Mapping[str, str]) -> dict:
    if "qlib" not in metadata:
        raise FormatError(path, "qlib", "missing: this file was not written by qlib")
    try:
        data = json.loads(metadata["qlib"])
    except (ValueError, RecursionError):
        raise FormatError(path, "qlib", "not valid JSON") from None
    if not isinstance(data, dict) or not isinstance(data.get("tensors"), dict):
        raise FormatError(path, "qlib", "has no table of tensors")
    if data.get("version") not in VERSIONS:
        message = f"has version {data.get('version')!r}, expected 1 or 2"
        raise FormatError(path, "qlib", message)
    if not isinstance(data.get("layers", {}), dict):
        raise FormatError(path, "qlib.layers", "is no table of layers")
    return data


def _load_one(path, file, name: str, data) -> QTensor:
    field = f"qlib.tensors[{name!r}]"
    shape = data.get("shape") if isinstance(data, dict) else None
    if not isinstance(shape, list) or not all(type(n) is int and n > 0 for n in shape):
        raise FormatError(path, field, "shape must be a list of positive integers")
    if math.prod(shape) > MAX_WEIGHTS:
        raise FormatError(path, field, f"shape {shape} is larger than any tensor qlib reads")
    present = set(file.keys())
    key = _key(name, "grid")
    learned = file.get_tensor(key) if key in present else None
    format = Reader(path, field, learned).format(data.get("format"))
    if isinstance(format, Columns) and len(shape) != 2:
        raise FormatError(path, field, f"shape {shape} has no columns")
    try:
        layout = format.layout(shape)
    except ValueError as error:
        raise FormatError(path, field, str(error)) from None
    parts = {}
    for part, (dtype, size) in layout.items():
        if _key(name, part) not in present:
            raise FormatError(path, _key(name, part), "missing")
        parts[part] = _load_part(path, file, _key(name, part), dtype, size)
    if isinstance(format, BlockFormat):
        if not bool(format.decode(parts, shape).isfinite().all()):
            raise FormatError(path, _key(name, "blocks"), "holds NaN or infinite values")
        return QTensor(format, tuple(shape), parts)
    if isinstance(format, tuple(ROTATED.values())):
        # Every code stands for a number, and that lengths are finite has been seen.
        return QTensor(format, tuple(shape), parts)
    turned = isinstance(format, Columns)
    scheme, stored = (format.scheme, shape[::-1]) if turned else (format, shape)
    check_values(path, name, scheme, parts, stored)
    return QTensor(format, tuple(shape), parts)


def check_values(path, name: str, scheme: Format, parts: Mapping[str, Tensor], shape) -> None:
    """Refuse parts of the right dtypes and shapes that stand for no weight."""
    if isinstance(scheme, Reordered):
        if not is_permutation(parts["order"], shape[1]):
            raise FormatError(path, _key(name, "order"), "does not name every column once")
        scheme = scheme.scheme
    codes = scheme.unpack(parts["codes"], shape)
    if int(codes.max()) >= len(scheme.grid.points):
        raise FormatError(path, _key(name, "codes"), "holds a code beyond the end of its grid")
    special = not bool(scheme.grid.points.isfinite().all())
    if special and not bool(scheme.grid.decode(codes).isfinite().all()):
        raise FormatError(path, _key(name, "codes"), "holds a code that stands for no number")
    scale, offset = scheme.read(parts, shape)
    scale = scale.reciprocal() if isinstance(scheme.scale, Divisor) else scale
    for field, values in (("scale", scale), ("offset", offset)):
        if values is not None and not bool(values.isfinite().all()):
            raise FormatError(path, _key(name, field), "holds NaN or infinite values")


def _load_part(path, file, key: str, dtype: torch.dtype, size: tuple[int, ...]) -> Tensor:
    stored = file.get_slice(key)
    found = (stored.get_dtype(), tuple(stored.get_shape()))
    if found != (STORED_AS[dtype], size):
        need = f"{STORED_AS[dtype]} {list(size)}"
        raise FormatError(path, key, f"is {found[0]} {list(found[1])}, its format needs {need}")
    tensor = file.get_tensor(key)
    if dtype.is_floating_point and not bool(tensor.isfinite().all()):
        raise FormatError(path, key, "holds NaN or infinite values")
    return tensor


def _key(name: str, part: str) -> str:
    return f"{name}.{part}" if name else part
