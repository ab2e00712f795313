"""Blocks of ggml as Schemes and back: gguf's own decoder is the judge, and no bit may change."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

import qlib
from qlib.ggml import BY_ID
from qlib.ggml.schemes import BLOCKS, SCHEMES, to_blocks, to_scheme

NAMES = list(SCHEMES)


def weight(kind: str = "gaussian") -> torch.Tensor:
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, 5] = 300
    x[3] *= 1e-3
    return x


def decoded(q: qlib.QTensor) -> np.ndarray:
    kind = gguf.GGMLQuantizationType(BY_ID[q.format.kind.id].id)
    return gguf.quants.dequantize(q.parts["blocks"].numpy(), kind)


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back(name):
    q = BLOCKS[name].quantize(weight())
    scheme = to_scheme(q)
    assert scheme.format == SCHEMES[name]
    assert np.array_equal(scheme.dequantize().numpy(), decoded(q))
    assert scheme.bits_per_weight == q.bits_per_weight
    back = to_blocks(scheme)
    assert torch.equal(back.parts["blocks"], q.parts["blocks"])
    scheme.parts["codes"][0, 0] ^= 1
    assert not np.array_equal(scheme.dequantize().numpy(), decoded(q))
    assert not torch.equal(to_blocks(scheme).parts["blocks"], q.parts["blocks"])


@pytest.mark.parametrize(
    ("format", "block"),
    [("int4-g32", "Q4_0"), ("int8-g32", "Q8_0"), ("int5-g32-mse", "Q5_0"), ("mlx4-g32", "Q4_1"),
     ("int4-g32-offset", "Q4_1"), ("int5-g32-offset", "Q5_1"), ("mxfp4-rceil", "MXFP4")],
)  # fmt: skip
def test_own_formats_become_blocks(format, block):
    q = qlib.quantize(weight(), format)
    blocks = to_blocks(q)
    assert str(blocks.format) == block
    assert np.array_equal(decoded(blocks), q.dequantize().numpy())
    blocks.parts["blocks"][0, 3] ^= 16
    assert not np.array_equal(decoded(blocks), q.dequantize().numpy())


@pytest.mark.parametrize("format", ["int4-g64", "int4-row", "int4-g32-asym", "nf4", "nvfp4"])
def test_what_no_block_holds(format):
    assert to_blocks(qlib.quantize(weight(), format)) is None


def test_what_is_no_scheme():
    assert to_scheme(qlib.quantize(torch.ones(2, 256), "q4_k")) is None
    assert to_blocks(qlib.quantize(torch.ones(2, 80), "int4-g32")) is None
    q = BLOCKS["ggml_mxfp4"].quantize(weight())
    q.parts["blocks"][0, 0] = 255
    with pytest.raises(ValueError, match=r"^MXFP4 \[6, 96\]: a scale of 2\^128 has no E8M0 code$"):
        to_scheme(q)


def test_a_file_of_blocks_keeps_them_in_other_containers(tmp_path):
    """The published Q4_1 file of SmolLM2 goes to MLX, and back to GGUF, with the same values."""
    path = qlib.zoo.packaged_path(qlib.zoo.SMOLLM2_FILE)
    model, tokenizer = qlib.load(path, packed=True)
    dense = qlib.load(path)[0]
    layer = "model.layers.3.self_attn.k_proj"
    q = model.get_submodule(layer).weight
    assert str(q.format) == "Q4_1"
    assert torch.equal(q.dequantize(), dense.get_submodule(layer).weight)
    qlib.save(model, tmp_path / "mlx", tokenizer, "mlx")
    moved = qlib.load(tmp_path / "mlx")[0]
    qlib.save(moved, tmp_path / "back.gguf", tokenizer, mix="F32")
    back = qlib.load(tmp_path / "back.gguf", packed=True)[0]
    for name, module in model.named_modules():
        if isinstance(module, qlib.QLinear):
            weight = dense.get_submodule(name).weight
            assert torch.equal(moved.get_submodule(name).weight.dequantize(), weight)
            assert torch.equal(back.get_submodule(name).blocks, module.blocks)
    with pytest.raises(ValueError, match="gptq cannot hold Q4_1"):
        qlib.save(model, tmp_path / "gptq", tokenizer, "gptq")
    with pytest.raises(ValueError, match="give permuted or packed, not both"):
        qlib.load(path, packed=True, permuted=True)
