"""Tiny models of random weights: our decoder, and transformers' families by name."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from qlib.model import Config, Decoder

VOCAB = 61


def tiny_decoder(tied: bool = True) -> Decoder:
    config = Config(VOCAB, 32, 48, 2, 4, 2, 8, tie_word_embeddings=tied, max_position_embeddings=64)
    generator = torch.Generator().manual_seed(0)
    return Decoder(config).normal_init(0.3, generator).requires_grad_(False)


def huggingface(family: str, **options) -> nn.Module:
    import transformers

    text = "Text" if family == "Gemma3" else ""
    config = getattr(transformers, f"{family}{text}Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


MODELS = {
    "own-tied": tiny_decoder,
    "own-untied": lambda: tiny_decoder(tied=False),
    "llama": lambda: huggingface("Llama"),
    "qwen2": lambda: huggingface("Qwen2"),
    "gpt-neox": lambda: huggingface("GPTNeoX"),
}
CALIBRATED = MODELS | {
    "qwen3": lambda: huggingface("Qwen3", head_dim=8),
    "gemma": lambda: huggingface("Gemma", head_dim=8),
    "gemma2": lambda: huggingface("Gemma2", head_dim=8),
    "gemma3": lambda: huggingface("Gemma3", head_dim=8),
}


def uneven(name: str = "own-tied") -> nn.Module:
    """A model whose channels differ in size: something to find or to smooth."""
    model = CALIBRATED[name]()
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            spread = torch.empty_like(parameter).normal_(generator=generator)
            parameter.data = parameter + spread.exp() - 1
    return model


def tokens(n: int, seed: int = 0) -> torch.Tensor:
    """Random token ids."""
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def raises(message: str):
    """Expect a ValueError that says exactly this."""
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")
