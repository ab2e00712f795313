"""A quantized model in qlib's own container: a folder with config.json, tokenizer.json and one
safetensors file that holds packed and dense tensors side by side."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import nn

from ..errors import FormatError
from ..linear import QLinear, replace_layer
from ..model import Decoder
from ..tokenizer import Tokenizer
from . import hf, inputs, native
from .assemble import parameter_shapes
from .atomic import replacing

CONTAINER = "qlib"


def save(folder: str | os.PathLike, model: Decoder, tokenizer: Tokenizer | None = None) -> None:
    """Write a model whose linear layers may be QLinear; `load` gives back the same bytes.

    Files are written under temporary names and renamed, the weights first.
    """
    folder, layers = Path(folder), inputs.layers_to_dict(model)
    folder.mkdir(parents=True, exist_ok=True)
    packed = {n: m.weight for n, m in model.named_modules() if isinstance(m, QLinear)}
    quantized = {f"{name}.weight": q for name, q in packed.items()}
    # Of a quantized layer the packed tensor has everything but the bias.
    dense = {n: t for n, t in model.state_dict().items()
             if n.rpartition(".")[0] not in packed or n.endswith(".bias")}  # fmt: skip
    # Layers may share a transform, and a file holds no tensor twice.
    dense |= {name: t.clone() for name, t in dense.items() if ".transform." in name}
    native.save_tensors(folder / hf.SINGLE, quantized, dense, layers)
    config = model.config.to_hf() | {"quantization_config": {"quant_method": CONTAINER}}
    with replacing(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(config, indent=2), encoding="utf-8")
    if tokenizer is not None:
        with replacing(folder / "tokenizer.json") as temporary:
            temporary.write_text(tokenizer.backend.to_str(), encoding="utf-8")


def load(folder: str | os.PathLike) -> tuple[Decoder, Tokenizer | None]:
    """Read what `save` wrote: the model with its QLinear layers, and the tokenizer if there is one.

    Raises FormatError if a tensor is missing, left over, or of another shape than config.json says,
    and if what a layer does with its inputs is not understood.
    """
    folder = Path(folder)
    config = hf.read_config(folder, container=CONTAINER)
    path = folder / hf.SINGLE
    if not path.is_file():
        raise FormatError(path, "file", "this file is missing")
    quantized, dense = native.load_tensors(path), native.load_dense(path)
    widths = {n.removesuffix(".weight"): t.shape[-1] for n, t in (quantized | dense).items()}
    layers = inputs.load_layers(path, dense, widths)
    found = {name: tuple(tensor.shape) for name, tensor in (quantized | dense).items()}
    # Lazily, so that a config of 2^31 layers ends at the first missing tensor.
    for name, need in parameter_shapes(config):
        have = found.pop(name, None)
        if have != need:
            have = "is missing" if have is None else f"has shape {list(have)}"
            raise FormatError(path, name, f"{have}; the config needs {list(need)}")
    if found:
        message = f"is not part of a {config.model_type} decoder of this config"
        raise FormatError(path, min(found), message)
    with torch.device("meta"):
        model = Decoder(config)
    for name, q in quantized.items():
        layer = name.removesuffix(".weight")
        if not isinstance(model.get_submodule(layer), nn.Linear):
            raise FormatError(path, name, "is quantized, but does not belong to a linear layer")
        replace_layer(model, layer, QLinear(q, dense.get(f"{layer}.bias")))
    model.load_state_dict(dense, assign=True, strict=False)
    inputs.attach(path, model, layers)
    has_tokenizer = (folder / "tokenizer.json").exists()
    tokenizer = hf.read_tokenizer(folder, config) if has_tokenizer else None
    return model.eval().requires_grad_(False), tokenizer
