"""What lies in a model file or folder, read from its headers: no weight is loaded."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import FormatError
from ..shapes import ModelShape
from . import gguf, hf
from .gguf_report import Stored

MAX_CONFIG = 1 << 24
# Dtypes that hold one weight in each value, so that values can be counted as weights.
WHOLE = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Contents:
    """The tensors and metadata of a file or folder.

    Args:
        container: "gguf", "safetensors", or what config.json names as its quant_method.
        tensors: `kind` is the type of ggml or the dtype of safetensors.
        metadata: of the GGUF file, or of config.json and the headers of the safetensors files.
        weights: how many weights the tensors stand for; None if only their container knows.
    """

    path: str
    container: str
    tensors: tuple[Stored, ...]
    metadata: dict[str, Any]
    weights: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float | None:
        """8 * bytes / weights, norms and embeddings included, where the weights are known."""
        return 8 * self.nbytes / self.weights if self.weights else None

    @property
    def activations(self) -> list[str]:
        """How layers quantize what they read, in the words of the file."""
        found = self.metadata.get("quantization_config")
        found = found if isinstance(found, dict) else {}
        groups = found.get("config_groups")
        groups = groups.values() if isinstance(groups, dict) else ()
        said = [g.get("input_activations") for g in groups if isinstance(g, dict)]
        if found.get("load_in_8bit") and "llm_int8_threshold" in found:
            said.append({"llm_int8_threshold": found["llm_int8_threshold"]})
        said += _of_layers(self.metadata.get("qlib"))
        return list(dict.fromkeys(json.dumps(one) for one in said if one))

    def kinds(self) -> list[tuple[str, int, int, int]]:
        """(type, tensors, values, bytes) of every type, the most bytes first."""
        return by_kind(self.tensors)


def _of_layers(text: object) -> list[Any]:
    """The inputs that qlib's own container says of its layers, without the ranges of each."""
    try:
        layers = json.loads(text)["layers"].values()
        inputs = [layer["inputs"] for layer in layers if "inputs" in layer]
        return [{k: v for k, v in one.items() if k not in ("low", "high")} for one in inputs]
    # What is not as it should be is refused where weights are read; here it says nothing.
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def inspect_file(path: str | os.PathLike) -> Contents:
    """What lies in a .gguf or .safetensors file, or in a folder of them.

    Raises FormatError if a file is malformed, and ValueError or OSError if there is none.
    """
    path = Path(path)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.suffix == ".safetensors":
        tensors, metadata = _safetensors([path])
        return Contents(str(path), "safetensors", tensors, metadata, _count(tensors))
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic != b"GGUF" and path.suffix != ".gguf":
        raise ValueError(f"{path}: is neither a .gguf nor a .safetensors file")
    opened = gguf.read(path)
    found = opened.tensors.values()
    tensors = tuple(Stored(info.name, info.kind.name, info.shape, info.size) for info in found)
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return Contents(str(path), "gguf", tensors, opened.metadata, weights)


def by_kind(tensors: Iterable[Stored]) -> list[tuple[str, int, int, int]]:
    """(type, tensors, values, bytes) of every type among the tensors, the most bytes first."""
    found: dict[str, list[Stored]] = {}
    for tensor in tensors:
        found.setdefault(tensor.kind, []).append(tensor)
    rows = [
        (kind, len(same), sum(math.prod(t.shape) for t in same), sum(t.nbytes for t in same))
        for kind, same in found.items()
    ]
    return sorted(rows, key=lambda row: (-row[3], row[0]))


def _folder(folder: Path) -> Contents:
    single = folder / hf.SINGLE
    # As transformers does: a single file wins, and shards win over what else lies there.
    paths = [single] if single.exists() else sorted(folder.glob("model-*.safetensors"))
    paths = paths or sorted(folder.glob("*.safetensors"))
    if not paths:
        others = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; inspect {str(folder / others[0])!r}" if others else ""
        raise ValueError(f"{folder}: no .safetensors file in this folder{hint}")
    tensors, metadata = _safetensors(paths)
    config = _config(folder / "config.json") if (folder / "config.json").is_file() else {}
    quantization = config.get("quantization_config") or config.get("quantization")
    container = "safetensors"
    if isinstance(quantization, dict):
        container = str(quantization.get("quant_method", "quantized safetensors"))
    weights = _count(tensors) if quantization is None else _published(folder)
    return Contents(str(folder), container, tensors, config | metadata, weights)


def _safetensors(paths: Sequence[Path]) -> tuple[tuple[Stored, ...], dict[str, str]]:
    tensors: list[Stored] = []
    metadata: dict[str, str] = {}
    for path in paths:
        try:
            # Torch would map the file as private memory, which a large one may not get.
            with safe_open(path, framework="np") as file:
                metadata |= file.metadata() or {}
                views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
                tensors += [_stored(name, view) for name, view in views.items()]
        except (SafetensorError, OSError) as error:
            message = f"not a valid safetensors file ({error})"
            raise FormatError(path, "header", message) from error
    return tuple(tensors), metadata


def _stored(name: str, view) -> Stored:
    kind, shape = view.get_dtype(), tuple(view.get_shape())
    # The first number of a dtype's name is its bits: F8_E4M3, BF16, U8.
    bits = 8 if kind == "BOOL" else int(re.search(r"\d+", kind)[0])
    return Stored(name, kind, shape, math.prod(shape) * bits // 8)


def _count(tensors: Iterable[Stored]) -> int | None:
    whole = all(tensor.kind in WHOLE for tensor in tensors)
    return sum(math.prod(tensor.shape) for tensor in tensors) if whole else None


def _config(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_CONFIG:
        raise FormatError(path, "file", f"has more than {MAX_CONFIG} bytes")
    try:
        config = json.loads(path.read_bytes())
    # Deep nesting exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "json", f"{error!s:.200}") from error
    if not isinstance(config, dict):
        raise FormatError(path, "json", f"holds a {type(config).__name__}; need an object")
    return config


def _published(folder: Path) -> int | None:
    """The weights of the model that config.json describes, or None if it is no decoder of ours."""
    try:
        return ModelShape.of(hf.read_config(folder, hf.container_of(folder))).parameters
    except FormatError:
        return None
