"""What the tests of containers share: a small decoder, formats for it, broken files."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_files_hf import small_tokenizer

from qlib.errors import FormatError
from qlib.files import quantized
from qlib.linear import QLinear, replace_layer
from qlib.model import Config, Decoder
from qlib.presets import quantize

LAYER = "model.layers.0.self_attn.q_proj"


def decoder(tied=False):
    """Two layers whose widths are multiples of 64."""
    config = Config(
        61, 64, 128, 2, 2, 1, 32, max_position_embeddings=64, bos_token_id=0, eos_token_id=1,
        tie_word_embeddings=tied,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    return Decoder(config).normal_init(0.3, generator).requires_grad_(False).eval()


def with_formats(model, formats):
    """Quantize the layers, in turn, by the formats; None leaves a layer dense."""
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    for i, name in enumerate(names):
        format = formats[i % len(formats)]
        if format is not None and name != "lm_head":
            layer = model.get_submodule(name)
            replace_layer(model, name, QLinear(quantize(layer.weight, format), layer.bias))
    return model


def packed(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, QLinear)}


def saved(folder, model, container):
    quantized.save(folder, model, small_tokenizer(), container=container)
    return folder


def prompt():
    return torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(1))


def weights(seed, shape):
    """Gaussian, with a block of zeros, an outlier and exact ties."""
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    w[0, :32] = 0
    w[1, 3] = 40.0
    w[2] = (w[2] * 2).round() / 2
    return w


def change_tensors(folder, **parts):
    """Replace tensors of LAYER; None removes one. Names have two underscores for a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for part, tensor in parts.items():
        key = f"{LAYER}.{part.replace('__', '.', 1)}"
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor.contiguous()
    save_file(tensors, path, {"format": "pt"})


def stored_tensor(folder, part):
    return load_file(folder / "model.safetensors")[f"{LAYER}.{part}"]


def refused(folder, message):
    """Expect a FormatError that says exactly this after the path of the folder."""
    with pytest.raises(FormatError) as caught:
        quantized.load(folder)
    assert str(caught.value) == f"{folder}{message}"
