"""A Hugging Face folder: config.json, safetensors (one file, or shards with an index), tokenizer.

Weights are read through safetensors' memory map, one tensor at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError
from ..model import Config, Decoder
from ..tokenizer import Tokenizer
from .assemble import assemble
from .atomic import replacing

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = re.compile(r"[^/\\\0]+\.safetensors")
FLOATS = ("F64", "F32", "F16", "BF16")
# The largest tokenizer.json of a released model is about 35 MB.
MAX_JSON = 1 << 28


def load(
    folder: str | os.PathLike, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Tokenizer]:
    """Load a Llama or Qwen2 checkpoint and its tokenizer.

    Args:
        folder: holds config.json, tokenizer.json, and model.safetensors or an index with shards.
        dtype: floating-point type of the parameters. Tensors that are stored in it stay mapped.

    Raises FormatError if a file is missing or malformed, or is of another architecture.
    """
    folder = Path(folder)
    config = read_config(folder)
    stored = Tensors(folder)
    shapes = {name: shape for name, shape in stored.shapes.items() if is_weight(name, config)}
    model = assemble(folder, config, shapes, lambda name: stored.read(name).to(dtype))
    return model, read_tokenizer(folder, config)


def is_weight(name: str, config: Config) -> bool:
    # Old checkpoints store the table of rotary frequencies, and tied ones the embedding twice.
    again = config.tie_word_embeddings and name == "lm_head.weight"
    return not again and not name.endswith(".rotary_emb.inv_freq")


def container_of(folder: str | os.PathLike) -> str | None:
    """How config.json says that the weights are quantized (its "quant_method"), if at all.

    MLX names no method: its settings lie under "quantization".
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    quantization = raw.get("quantization_config")
    named = isinstance(quantization, dict) and "quant_method" in quantization
    if isinstance(raw.get("quantization"), dict) and not named:
        return "mlx"
    if quantization is None:
        return None
    if not isinstance(quantization, dict) or type(quantization.get("quant_method")) is not str:
        raise FormatError(path, "quantization_config", "need an object that names a quant_method")
    return quantization["quant_method"]


def read_config(folder: str | os.PathLike, container: str | None = None) -> Config:
    """Read config.json of a model whose weights are dense, or quantized as `container` says.

    Raises FormatError if it describes anything else.
    """
    path = Path(folder) / "config.json"
    raw = read_json(path)
    found = container_of(folder)
    if found != container:
        known = "dense" if container is None else f"{container} container"
        message = f"the weights are quantized by {found!r:.40}; this reads {known} checkpoints"
        raise FormatError(path, "quantization_config", message)
    if type(raw.get("tie_word_embeddings") or False) is not bool:
        raise FormatError(path, "tie_word_embeddings", "need true or false")
    try:
        return Config.from_hf(raw)
    except ValueError as error:
        raise FormatError(path, "config", f"{error!s:.200}") from error


def read_tokenizer(folder: str | os.PathLike, config: Config) -> Tokenizer:
    """Read tokenizer.json. Raises FormatError if it is missing or does not fit the model."""
    path = Path(folder) / "tokenizer.json"
    text = _read_text(path)
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    # The Rust library raises a bare Exception for everything it cannot read.
    except Exception as error:
        raise FormatError(path, "tokenizer", str(error)) from error
    size = backend.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        message = f"has {size} tokens, but the model has {config.vocab_size}"
        raise FormatError(path, "tokenizer", message)
    ends = config.eos_token_id
    if isinstance(ends, tuple):
        ends = ends[0] if ends else None
    return Tokenizer(backend, config.bos_token_id, ends)


class Tensors:
    """The tensors of a folder, wherever they lie: shapes at once, contents when asked for.

    Args:
        folder: holds model.safetensors, or an index with shards.
        dtypes: the types that a tensor may have, by safetensors' names.

    Raises FormatError if a shard is missing or broken, if shards and index disagree, or if a tensor
    is of another type.
    """

    def __init__(self, folder: str | os.PathLike, dtypes: Sequence[str] = FLOATS) -> None:
        self.folder = Path(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._allowed = dtypes
        self._files: dict[str, Any] = {}
        # As transformers does: a single file wins over an index.
        if (self.folder / SINGLE).exists() or not (self.folder / INDEX).exists():
            self._add(SINGLE)
            return
        weight_map = self._read_index()
        for shard in sorted(set(weight_map.values())):
            self._add(shard)
        for name in sorted(self.shapes.keys() ^ weight_map.keys()):
            where = "the index" if name in self.shapes else "the shards"
            raise FormatError(self.folder / INDEX, name, f"this tensor is missing from {where}")

    def read(self, name: str) -> Tensor:
        """One tensor, as stored: a view of the mapped file."""
        return self._files[name].get_tensor(name)

    def _read_index(self) -> dict[str, str]:
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(path, "weight_map", "need an object that maps tensors to shards")
        for shard in weight_map.values():
            # A plain name cannot climb out of the folder; it may be a link, as in the hub's cache.
            if type(shard) is not str or not SHARD.fullmatch(shard):
                message = f"shard {shard!r:.80} is not the name of a .safetensors file"
                raise FormatError(path, "weight_map", message)
        return weight_map

    def _add(self, shard: str) -> None:
        path = self.folder / shard
        if not path.is_file():
            raise FormatError(path, "file", "this file is missing")
        try:
            file = safe_open(path, framework="pt")
            names = file.keys()
            # Of a repeated name safetensors silently keeps one.
            with open(path, "rb") as opened:
                header = opened.read(int.from_bytes(opened.read(8), "little"))
            json.loads(header, object_pairs_hook=_no_repeats)
        except (SafetensorError, OSError, ValueError) as error:
            raise FormatError(path, "header", str(error)) from error
        for name in names:
            if name in self._files:
                raise FormatError(path, name, "this tensor is also in another shard")
            view = file.get_slice(name)
            self.dtypes[name] = view.get_dtype()
            if self.dtypes[name] not in self._allowed:
                message = f"has dtype {self.dtypes[name]}; need one of {', '.join(self._allowed)}"
                raise FormatError(path, name, message)
            self.shapes[name], self._files[name] = tuple(view.get_shape()), file


def save_checkpoint(
    folder: str | os.PathLike,
    config: Config,
    tensors: Mapping[str, Tensor],
    tokenizer: Tokenizer | None = None,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a folder that `load` and transformers read.

    Args:
        folder: made if need be; a checkpoint that lies there is replaced, at the very end.
        config: becomes config.json.
        tensors: what is stored, as it is; usually ``model.state_dict()``.
        tokenizer: becomes tokenizer.json and tokenizer_config.json.
        metadata: strings for the header of every safetensors file.
        max_shard_bytes: start a new file once one would hold more bytes of tensors than this.
        settings: further entries of config.json, such as its quantization_config.

    Raises ValueError if there is nothing to store, or a shard has no room.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(tensors, max_shard_bytes)
    small = _small_files({**config.to_hf(), **(settings or {})}, tensors, tokenizer)
    if len(shards) > 1:
        small[INDEX] = _index(shards)
    stale = {folder / INDEX, *folder.glob("model*.safetensors")}
    # All temporary files are complete before the first is renamed: weights first, then the rest.
    with contextlib.ExitStack() as renames:
        for name, text in small.items():
            renames.enter_context(replacing(folder / name)).write_text(text, encoding="utf-8")
        for name, part in shards.items():
            part = {key: tensor.detach().cpu().contiguous() for key, tensor in part.items()}
            temporary = renames.enter_context(replacing(folder / name))
            save_file(part, temporary, metadata={**(metadata or {}), "format": "pt"})
    for path in stale - {folder / name for name in (*small, *shards)}:
        path.unlink(missing_ok=True)


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> dict[str, dict[str, Tensor]]:
    if not tensors or (limit is not None and limit < 1):
        raise ValueError(f"cannot store {len(tensors)} tensors in files of {limit} bytes")
    parts: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if limit is not None and parts[-1] and used + size > limit:
            parts.append({})
            used = 0
        parts[-1][name] = tensor
        used += size
    if len(parts) == 1:
        return {SINGLE: parts[0]}
    count = len(parts)
    return {f"model-{i:05d}-of-{count:05d}.safetensors": p for i, p in enumerate(parts, 1)}


def _index(shards: Mapping[str, Mapping[str, Tensor]]) -> str:
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    total = sum(t.numel() * t.element_size() for part in shards.values() for t in part.values())
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)


def _small_files(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], tokenizer: Tokenizer | None
) -> dict[str, str]:
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    files = {"config.json": json.dumps({"torch_dtype": dtype, **config}, indent=2)}
    if tokenizer is not None:
        backend = tokenizer.backend
        names = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        special = {name: backend.id_to_token(i) for name, i in names.items() if i is not None}
        # Otherwise transformers takes the pre-tokenizer of its own Llama instead of the file's.
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
        files["tokenizer.json"] = backend.to_str()
        files["tokenizer_config.json"] = json.dumps(settings, indent=2)
    return files


def read_json(path: Path) -> dict[str, Any]:
    text = _read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_no_repeats)
    # Deep nesting exhausts the parser's stack.
    except (ValueError, RecursionError) as error:
        raise FormatError(path, "json", str(error)) from error
    if not isinstance(value, dict):
        raise FormatError(path, "json", f"holds a {type(value).__name__}; need an object")
    return value


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r:.80} is repeated")
        found[name] = value
    return found


def _read_text(path: Path) -> str:
    if not path.is_file():
        raise FormatError(path, "file", "this file is missing")
    if path.stat().st_size > MAX_JSON:
        raise FormatError(path, "file", f"has more than {MAX_JSON} bytes")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(path, "text", "is not valid UTF-8", error.start) from error
