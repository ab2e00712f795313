"""A tiny decoder of packed layers, folders of it, and ways to damage them."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qlib
from qlib.errors import FormatError
from qlib.files import quantized
from qlib.linear import QLinear, replace_layer
from qlib.model import Config, Decoder
from qlib.qtensor import QTensor
from qlib.tokenizer import Tokenizer

# All widths are multiples of 32, so that codes of any number of bits fill whole words.
CONFIG = Config(61, 64, 96, 1, 4, 2, 16, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
UNTIED = Config(**{**CONFIG.__dict__, "tie_word_embeddings": False})
LAYER = "model.layers.0.mlp.down_proj"


def weight(rows: int, cols: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def tokenizer() -> Tokenizer:
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate("abcdefgh1")}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, 0, 1)


def packed_decoder(quantize, config: Config = CONFIG, dense: tuple[str, ...] = ()) -> Decoder:
    """A decoder whose linear layers, but for lm_head and `dense`, are `quantize(weight)`."""
    model = Decoder(config).normal_init(0.3, torch.Generator().manual_seed(0)).requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name not in (*dense, "lm_head"):
            replace_layer(model, name, QLinear(quantize(layer.weight), layer.bias))
    return model.eval()


def packed(model: nn.Module) -> dict[str, QTensor]:
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, QLinear)}


def saved(folder, container: str, name: str) -> Decoder:
    """The decoder in the format called `name`, which now lies in `folder`."""
    model = packed_decoder(lambda w: qlib.quantize(w, name))
    quantized.save(folder, model, tokenizer(), container=container)
    return model


def same_parts(a: QTensor, b: QTensor) -> bool:
    equal = all(torch.equal(a.parts[name], b.parts[name]) for name in a.parts)
    return a.parts.keys() == b.parts.keys() and a.shape == b.shape and equal


def change_settings(folder, **values) -> None:
    """Set fields of the quantization_config; None removes one."""
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    settings = raw["quantization_config"] | values
    raw["quantization_config"] = {k: v for k, v in settings.items() if v is not None}
    path.write_text(json.dumps(raw))


def change_tensors(folder, part: str, change) -> None:
    """Replace the tensor LAYER.part by `change` of it; None removes it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    changed = change(tensors.pop(f"{LAYER}.{part}"))
    tensors |= {} if changed is None else {f"{LAYER}.{part}": changed.contiguous()}
    save_file(tensors, path, metadata={"format": "pt"})


def refusal(folder) -> str:
    """The message of the FormatError that loading raises, without the folder."""
    with pytest.raises(FormatError) as caught:
        quantized.load(folder)
    assert str(caught.value).startswith(str(folder))
    return str(caught.value).removeprefix(str(folder))
