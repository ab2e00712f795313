"""Quantized checkpoints of other tools: a Hugging Face folder whose linear layers are packed.

What is the same in all of them stands here: which layers there are, the checks, the dense tensors,
config.json. How one weight lies in a container stands in the container's own file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..activations import Inputs
from ..errors import FormatError
from ..ggml import BlockFormat
from ..ggml.schemes import block_of, scheme_of, to_scheme
from ..linear import QLinear, replace_layer
from ..model import Decoder
from ..qtensor import Format, QTensor
from ..tokenizer import Tokenizer
from . import awq, bnb, compressed_tensors, gptq, hf, inputs, mlx, native
from .assemble import empty_decoder, parameter_shapes
from .stored import Container, Settings, Stored

MODULES: tuple[Container, ...] = (compressed_tensors, gptq, awq, bnb, mlx)
CONTAINERS: dict[str, Container] = {module.NAME: module for module in MODULES}
DTYPES = (*hf.FLOATS, "F8_E4M3", "F8_E8M0", "I64", "I32", "I8", "U32", "U8")


@dataclass(frozen=True)
class Written:
    """What was stored of the quantized layers, whatever bits the formats have by themselves."""

    container: str
    layers: int
    nbytes: int
    weights: int

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes of the layers' tensors / weights."""
        return 8 * self.nbytes / max(1, self.weights)

    def __str__(self) -> str:
        bits = f"{self.bits_per_weight:.3f} bits per weight"
        return f"{self.layers} layers stored as {self.container}: {bits}"


def save(
    folder: str | os.PathLike,
    model: Decoder,
    tokenizer: Tokenizer | None = None,
    *,
    container: str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> Written:
    """Write a model for the tools that read `container`; the packed layers keep their values.

    Args:
        folder: made if need be; a checkpoint that lies there is replaced, at the very end.
        container: a name in CONTAINERS.
        dtype: of the tensors that are not quantized; by default they stay as they are.
        max_shard_bytes: start a new file once one would hold more bytes of tensors than this.

    Raises ValueError, naming the layer and the containers that can hold it, before anything is
    written. Warns if the layers quantize their inputs and the container cannot say so.
    """
    linears = {n: None for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    packed = {
        name: _fitting(container, name, module.weight)
        for name, module in model.named_modules()
        if isinstance(module, QLinear)
    }
    layout = CONTAINERS[container]
    reading = inputs.writable(container, layout, model)
    tensors = dict(_dense(model, dtype))
    stored: dict[str, Tensor] = {}
    for name, q in packed.items():
        try:
            own = layout.store(q, reading[name]) if name in reading else layout.store(q)
            stored |= {f"{name}.{part}": tensor for part, tensor in own.items()}
        # Some values do not fit although their format does, such as a bias too large for float16.
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    tensors |= stored
    formats = {**linears, **{name: q.format for name, q in packed.items()}}
    settings = layout.describe(formats, reading) if reading else layout.describe(formats)
    hf.save_checkpoint(
        folder, model.config, tensors, tokenizer,
        max_shard_bytes=max_shard_bytes, settings=settings,
    )  # fmt: skip
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in stored.values())
    return Written(container, len(packed), nbytes, sum(math.prod(q.shape) for q in packed.values()))


def save_dense(
    folder: str | os.PathLike,
    model: Decoder,
    tokenizer: Tokenizer | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write an ordinary checkpoint: quantized layers become the dense weights that they stand for.

    Arguments as for `save`; a dequantized weight is float32 unless `dtype` says otherwise.
    """
    inputs.writable("hf", None, model)
    tensors = dict(_dense(model, dtype))
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            weight = module.weight.dequantize()
            tensors[f"{name}.weight"] = weight if dtype is None else weight.to(dtype)
    hf.save_checkpoint(folder, model.config, tensors, tokenizer, max_shard_bytes=max_shard_bytes)


def _dense(model: Decoder, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are not quantized, once each."""
    packed = {name for name, module in model.named_modules() if isinstance(module, QLinear)}
    for name, tensor in model.state_dict().items():
        layer, _, part = name.rpartition(".")
        if (layer not in packed or part == "bias") and hf.is_weight(name, model.config):
            yield name, tensor if dtype is None else tensor.to(dtype)


def require(container: str, layer: str, format: Format, shape: tuple[int, ...]) -> None:
    """Raise ValueError, naming containers that would do, if `container` cannot hold a weight.

    A block format of ggml that is a Scheme in other bytes counts as that Scheme.
    """
    forms = [form for form in (format, scheme_of(format)) if form is not None]

    def refusals(one: Container) -> list[str | None]:
        return [one.refusal(form, shape) for form in forms]

    whys = refusals(CONTAINERS[container])
    if None not in whys:
        able = [name for name, one in CONTAINERS.items() if None in refusals(one)]
        block = format if isinstance(format, BlockFormat) else block_of(format)
        able += ["gguf"] * (block is not None and shape[-1] % block.kind.block == 0)
        others = f"it fits {', '.join(able)}" if able else "container='qlib' holds every format"
        message = f"{container} cannot hold {format}: {whys[0]}; {others}"
        raise ValueError(f"{layer} {list(shape)}: {message}")


def _fitting(container: str, layer: str, q: QTensor) -> QTensor:
    require(container, layer, q.format, q.shape)
    return q if CONTAINERS[container].refusal(q.format, q.shape) is None else to_scheme(q)


def load(
    folder: str | os.PathLike, dtype: torch.dtype = torch.float32
) -> tuple[Decoder, Tokenizer]:
    """Read a quantized Llama or Qwen2 checkpoint and its tokenizer; packed layers become QLinear.

    Args:
        dtype: of the parameters that are not quantized. A quantized embedding becomes dense.

    Raises FormatError if a file is missing or malformed, or holds what is not understood here.
    """
    folder = Path(folder)
    name = hf.container_of(folder)
    if name not in CONTAINERS:
        known = ", ".join(map(repr, CONTAINERS))
        raise FormatError(
            folder / "config.json", "quant_method", f"{name!r:.40}; need one of {known}"
        )
    config = hf.read_config(folder, container=name)
    settings = _settings(folder, name)
    tensors = hf.Tensors(folder, DTYPES)
    left = {key for key in tensors.shapes if hf.is_weight(key, config)}
    packed: dict[str, QTensor] = {}
    reading: dict[str, Inputs] = {}
    dense: dict[str, Tensor] = {}
    for key, shape in parameter_shapes(config):
        stored = Stored(tensors, key.rpartition(".")[0], shape)
        q = None
        if key.endswith(".weight") and len(shape) == 2:
            q = CONTAINERS[name].read(stored, settings)
        if q is None:
            dense[key] = stored.take(key.rpartition(".")[2], hf.FLOATS, shape).to(dtype)
        else:
            native.check_values(folder, stored.name, q.format, q.parts, q.shape)
            packed[stored.name] = q
            if hasattr(CONTAINERS[name], "read_inputs"):
                reading[stored.name] = CONTAINERS[name].read_inputs(stored, settings)
        left -= stored.taken
    if left:
        message = f"is not part of a {config.model_type} decoder of this config"
        raise FormatError(folder, min(left), message)
    return _assemble(config, packed, reading, dense, dtype), hf.read_tokenizer(folder, config)


def _settings(folder: Path, container: str) -> Settings:
    field = "quantization" if container == "mlx" else "quantization_config"
    raw = hf.read_json(folder / "config.json")
    return Settings(folder / "config.json", field, raw.get(field))


def _assemble(config, packed: dict[str, QTensor], reading, dense, dtype: torch.dtype) -> Decoder:
    model = empty_decoder(config)
    for name, q in packed.items():
        if isinstance(model.get_submodule(name), nn.Linear):
            bias, read = dense.get(f"{name}.bias"), reading.get(name)
            replace_layer(model, name, QLinear(q, bias, inputs=read))
        else:
            dense[f"{name}.weight"] = q.dequantize().to(dtype)
    loaded = model.load_state_dict(dense, assign=True, strict=False)
    assert not loaded.unexpected_keys
    return model.eval().requires_grad_(False)
