"""Schemes: fake equals packed equals loaded, bytes are counted, integers equal torch's."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlib
from qlib import fit, grid, scheme
from qlib.ggml import BlockFormat
from qlib.metrics import snr_db
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
EXTRA = ["int4-g32-sym", "int4-g128-asym", "int4-tensor-asym", "int5-g7", "int7-row-asym"]
EXTRA += ["int8-g32-asym-mse", "int1-row-asym", "int4-g128-mse", "int3-tensor-mse"]
EVERY_NAME = [*qlib.formats(), *EXTRA]


def random_weight(shape, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def stream(packed: torch.Tensor, bits: int, n: int) -> np.ndarray:
    """Codes of packed rows, read as numpy bits."""
    raw = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, : n * bits]
    return raw.reshape(len(packed), n, bits) @ (1 << np.arange(bits))


def plain_values(w: np.ndarray, q: QTensor, bits: int, size: int) -> np.ndarray:
    """Quantize and dequantize weight by weight, with the scale and zero point that `q` stores."""
    low, asymmetric = -(2 ** (bits - 1)), "zero_point" in q.parts
    scales = q.parts["scale"].float().numpy()
    zeros = stream(q.parts["zero_point"], bits, scales.shape[1]) if asymmetric else None
    out = np.empty_like(w)
    for row, col in np.ndindex(w.shape):
        at = (row % len(scales), col // size)
        x = w[row, col] / (scales[at] or np.float32(1))
        if asymmetric:
            code = np.clip(np.rint(x) + zeros[at], 0, 2**bits - 1) - zeros[at]
        elif bits == 1:
            code = np.where(x > 0, 1, -1)
        else:
            code = np.clip(np.rint(x), low, -low - 1)
        out[row, col] = np.float32(code) * scales[at]
    return out


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    bits=st.integers(1, 8),
    block=st.sampled_from([1, 3, 16, "row", "tensor"]),
    kind=st.sampled_from(["sym", "asym"]),
    search=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(1, 3),
    cols=st.integers(1, 37),
    seed=st.integers(0, 2**32 - 1),
)
def test_fake_packed_and_loaded_agree(
    tmp_path_factory, bits, block, kind, search, dtype, rows, cols, seed
):
    name = f"int{bits}-{block if isinstance(block, str) else f'g{block}'}-{kind}"
    weight = random_weight((rows, cols), dtype, seed)
    q = qlib.quantize(weight, name + "-mse" * search)
    size = block if isinstance(block, int) else cols
    fake = plain_values(weight.float().numpy(), q, bits, size)
    np.testing.assert_array_equal(q.dequantize().numpy(), fake)

    path = tmp_path_factory.getbasetemp() / "hypothesis.safetensors"
    q.save(path)
    loaded = QTensor.load(path)
    assert torch.equal(loaded.dequantize(), q.dequantize())
    assert loaded.format == q.format
    assert loaded.tobytes() == q.tobytes()
    assert len(q.tobytes()) == q.nbytes == q.format.nbytes(q.shape)

    loaded.parts["codes"][0, 0] ^= 1
    assert loaded.tobytes() != q.tobytes()
    if q.parts["scale"].count_nonzero() == q.parts["scale"].numel():
        assert not np.array_equal(loaded.dequantize().numpy(), fake)


@pytest.mark.parametrize("shape", [(4, 96), (3, 100), (1, 1), (2, 3, 33), (7,)])
@pytest.mark.parametrize("name", EVERY_NAME)
def test_bits_are_bytes(name, shape, tmp_path):
    if isinstance(qlib.format(name), BlockFormat):
        shape = (*shape[:-1], 512)
    q, weights = qlib.quantize(random_weight(shape), name), math.prod(shape)
    path = tmp_path / "w.safetensors"
    q.save(path)
    with safetensors.safe_open(path, framework="np") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118
    assert q.bits_per_weight == 8 * len(q.tobytes()) / weights == 8 * stored / weights
    assert q.nbytes == qlib.format(name).nbytes(shape)
    layout = q.format.layout(shape)
    assert {k: (t.dtype, tuple(t.shape)) for k, t in q.parts.items()} == layout
    assert list(q.parts) == list(layout)
    assert torch.equal(QTensor.load(path).dequantize(), q.dequantize())
    codes = next(iter(q.parts))
    q.parts[codes] = torch.cat([q.parts[codes]] * 2, dim=-1)
    assert q.bits_per_weight != 8 * stored / weights


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("int4-g128", 4 + 16 / 128),
        ("int4-g32-asym", 4 + 16 / 32 + 4 / 32),
        ("nf4", 4 + 32 / 64),
        ("nf4-dq", 4 + 8 / 64 + 32 / 64 / 256 + 32 / 640 / 640),
        ("nf3-g128", 3 + 32 / 128),
        ("lloyd4", 4 + 16 / 64),
        ("mlx4", 4 + 32 / 64),
        ("mxint8", 8 + 8 / 32),
        ("nvfp4-4over6-reciprocal", 4 + 8 / 16 + 32 / 640 / 640),
        ("mxfp4", 4 + 8 / 32),
        ("mxfp8_e4m3", 8 + 8 / 32),
        ("mxfp6_e2m3", 6 + 8 / 32),
        ("nvfp4", 4 + 8 / 16 + 32 / 640 / 640),
        ("ternary", 8 / 5 + 16 / 640 / 640),
        ("int8-tensor", 8 + 16 / 640 / 640),
        ("fp8_e4m3", 8 + 32 / 640),
    ],
)
def test_bits_by_hand(name, bits):
    assert 8 * qlib.format(name).nbytes((640, 640)) / 640**2 == pytest.approx(bits, rel=1e-12)


# -- integers against torch ---------------------------------------------------------------------


def torch_fake(weight: torch.Tensor, q: QTensor, bits: int) -> torch.Tensor:
    scale, zero = q.format.read(q.parts, q.shape)
    low = -(2 ** (bits - 1)) if zero is None else 0
    args = (low, low + 2**bits - 1)
    zero = torch.zeros_like(scale) if zero is None else zero
    if q.format.block == "tensor":
        return torch.fake_quantize_per_tensor_affine(weight, scale.item(), int(zero), *args)
    per_row = (scale[:, 0].contiguous(), zero[:, 0].int(), 0)
    return torch.fake_quantize_per_channel_affine(weight, *per_row, *args)


@pytest.mark.parametrize("block", ["row", "tensor"])
@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_integers_equal_torch(bits, kind, block):
    weight = random_weight((16, 129), seed=bits)
    q = qlib.quantize(weight, f"int{bits}-{block}-{kind}")
    expected = torch_fake(weight, q, bits)
    assert torch.equal(q.dequantize(), expected)
    q.parts["codes"][3, 5] ^= 1
    assert not torch.equal(q.dequantize(), expected)


@pytest.mark.parametrize("kind", ["sym", "asym"])
def test_ties_equal_torch(kind):
    """Every half step of a 4-bit grid of scale 1; both ends make the fit exact."""
    ends = (-7.0, 7.0) if kind == "sym" else (-5.0, 10.0)
    weight = torch.cat([torch.arange(ends[0], ends[1] + 0.5, 0.5), torch.tensor(ends)])
    weight = weight[None]
    q = qlib.quantize(weight, f"int4-row-{kind}")
    assert q.parts["scale"].item() == 1
    assert torch.equal(q.dequantize(), torch_fake(weight, q, 4))
    assert torch.equal(q.dequantize(), weight.round())
    # Half up is another rule, and the comparison notices it.
    assert not torch.equal(q.dequantize(), (weight + 0.5).floor().clamp(*ends))


# -- shapes, chunks, levels ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 5), (40, 3)])
@pytest.mark.parametrize("name", ["int4-g2-asym", "ternary", "nvfp4"])
def test_any_shape_keeps_its_rows(name, shape):
    weight = random_weight(shape)
    q = qlib.quantize(weight, name)
    assert q.dequantize().shape == weight.shape
    matrix = weight.reshape(-1, shape[-1]) if shape else weight.view(1, 1)
    assert torch.equal(qlib.quantize(matrix, name).dequantize().view(shape), q.dequantize())


def test_transposed_and_trainable_weights():
    weight = random_weight((32, 48)).T.requires_grad_()
    expected = qlib.quantize(weight.detach().contiguous(), "int4-g32-asym").tobytes()
    assert qlib.quantize(weight, "int4-g32-asym").tobytes() == expected


@pytest.mark.parametrize("name", ["int4-g16-asym-mse", "int3-row", "nf4", "nvfp4", "ternary"])
def test_chunks_change_nothing(name, monkeypatch):
    weight, importance = random_weight((9, 70)), random_weight((70,)).abs()
    whole = qlib.quantize(weight, name, importance)
    monkeypatch.setattr(scheme, "CHUNK_WEIGHTS", 140)
    pieces = qlib.quantize(weight, name, importance)
    assert pieces.tobytes() == whole.tobytes()
    assert torch.equal(pieces.dequantize(), whole.dequantize())


def test_importance_reaches_every_block():
    weight = torch.tensor([[7.0, 2.0, 2.0, 2.0]]).repeat(2, 3)
    importance = torch.ones(12)
    importance[::4] = 1e-6
    importance[4] = 1e6
    levels = qlib.quantize(weight, "int2-g4-mse", importance).parts["scale"]
    assert levels[0, 0] == levels[0, 2] < levels[0, 1] == 7
    assert torch.equal(levels[0], levels[1])


def test_mse_error_is_not_above_absmax():
    """With float32 scales, so that storing them adds nothing."""
    weight = random_weight((4, 256))
    for bits in (2, 3, 4, 8):
        pair = [qlib.format(f"int{bits}-g32{end}") for end in ("", "-mse")]
        pair = [dataclasses.replace(x, scale=torch.float32).quantize(weight) for x in pair]
        plain, best = ((x.dequantize() - weight).square().sum().item() for x in pair)
        assert best <= plain * (1 + 1e-6)


def test_double_quantization():
    """QLoRA's second level: scales minus an offset on 8 bits, blocks of 256."""
    inner = Scheme(grid.GRIDS["uint8"], 256, fit.minmax, torch.float32, torch.float32)
    double = Scheme(grid.NF4, 64, fit.absmax, scale=inner)
    weight = random_weight((4, 64 * 256))
    q = double.quantize(weight)
    assert q.bits_per_weight == 4 + 8 / 64 + 64 / (64 * 256)
    once = qlib.quantize(weight, "nf4")
    assert 0.999 < snr_db(weight, q.dequantize()) / snr_db(weight, once.dequantize()) < 1


def test_learned_grid_is_counted():
    own = grid.Grid("mine", torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0]))
    q = Scheme(own, "tensor", fit.absmax).quantize(random_weight((8, 16)))
    assert q.bits_per_weight == 3 + (16 + 5 * 32) / 128
    allowed = (own.points * q.parts["scale"]).view(-1).tolist()
    assert set(q.dequantize().unique().tolist()) <= set(allowed)
