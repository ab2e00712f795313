"""What needs an NVIDIA GPU (`make gpu`): the same bytes and the same values as on the CPU."""

from __future__ import annotations

import pytest
import torch

import qlib

DEVICE = "cuda"
FORMATS = ["int4-g128", "int4-g32-asym", "int3-g32-asym-mse", "nf4", "mxfp4", "nvfp4", "fp8_e4m3"]


def matrix(rows: int = 96, columns: int = 384) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def differing_codes(here: qlib.QTensor, there: qlib.QTensor) -> float:
    """The share of stored code bytes that differ."""
    return (here.parts["codes"] != there.parts["codes"].cpu()).double().mean().item()


@pytest.mark.parametrize("name", FORMATS)
def test_quantizes_to_the_same_bytes(name):
    here, there = qlib.quantize(matrix(), name), qlib.quantize(matrix().to(DEVICE), name)
    assert there.parts["codes"].device.type == DEVICE
    assert there.nbytes == here.nbytes
    # A sum in another order may move a value across the middle between two codes, rarely.
    assert differing_codes(here, there) < 1e-3
    other = qlib.quantize(matrix().flip(0).to(DEVICE), name)
    assert differing_codes(here, other) > 0.1


def test_quantized_model_agrees_with_the_cpu():
    model, tokenizer = qlib.load("bpw-small")
    qlib.quantize_model(model, "int4-g32-asym", progress=False)
    tokens = torch.tensor([tokenizer.encode(qlib.texts("evaluation")[:400])])
    with torch.no_grad():
        here = model(tokens)
        there = model.to(DEVICE)(tokens.to(DEVICE)).cpu()
    assert torch.allclose(here, there, atol=2e-2)
    assert not torch.allclose(here, there.flip(1), atol=2e-2)
