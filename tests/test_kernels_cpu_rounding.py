"""The rounding of new tokens, byte for byte: against the format itself, and against numpy."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib import fit, grid
from qlib.cache import QuantizedCache, kv_format
from qlib.cache.packed import Packed
from qlib.kernels.cpu import rounding
from qlib.kernels.cpu.rounding import rounded
from qlib.scheme import Scheme

FORMATS = {name: kv_format(name).keys for name in ("int4", "int8", "int4-g64", "int8-g96")}


def rows(n: int, cols: int, seed: int = 0, scale: float = 1.0, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, cols, generator=generator) * scale + mean


def differences(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> int:
    """Bytes that differ."""
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a)
    pairs = ((a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)
    return sum(int((x != y).sum()) for x, y in pairs)


@given(
    name=st.sampled_from(sorted(FORMATS)),
    n=st.integers(1, 40),
    blocks=st.integers(1, 4),
    scale=st.sampled_from([1e-9, 1e-6, 1e-3, 1.0, 50.0, 1e3]),
    mean=st.sampled_from([0.0, 1e-7, -3.0, 200.0]),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_bytes_are_those_of_the_format(name, n, blocks, scale, mean, seed):
    form = FORMATS[name]
    x = rows(n, blocks * form.block, seed, scale, mean)
    assert differences(rounded(x, form), form.quantize(x).parts) == 0


@pytest.mark.parametrize("name", FORMATS)
def test_ties_zeros_and_equal_values(name):
    form = FORMATS[name]
    size, steps = form.block, 2**form.grid.bits - 1
    x = torch.zeros(6, size)
    x[1] = 3.0
    # Half steps between whole ones are ties, and go to the even code.
    x[2] = torch.arange(size) % (2 * steps + 1) / 2
    x[3, 0], x[4, 0], x[5, 0] = 1e-9, -1e-9, 60000
    parts = rounded(x, form)
    assert differences(parts, form.quantize(x).parts) == 0
    assert parts["offset"][1] == 3
    assert parts["scale"][:2].tolist() == [[0], [0]]
    # What is not zero never becomes a scale of zero.
    assert parts["scale"].view(torch.int16)[3].tolist() == [1]


def in_numpy(x: np.ndarray, size: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """KIVI, section 2.1, with float16 scale and minimum."""
    blocks = x.reshape(len(x), -1, size)
    low, high = blocks.min(2), blocks.max(2)
    scale = ((high - low) / np.float32(2**bits - 1)).astype(np.float16)
    low = low.astype(np.float16)
    steps = (blocks - low[..., None].astype(np.float32)) / scale[..., None].astype(np.float32)
    return np.rint(steps.clip(0, 2**bits - 1)).astype(np.uint8).reshape(x.shape), scale, low


@pytest.mark.parametrize("name", FORMATS)
def test_bytes_are_those_of_numpy(name):
    form = FORMATS[name]
    x = rows(50, 2 * form.block, seed=3, mean=0.3)
    codes, scale, low = in_numpy(x.numpy(), form.block, form.grid.bits)
    parts = rounded(x, form)
    found = parts["codes"].numpy()
    if form.grid.bits == 4:
        found = np.stack([found & 15, found >> 4], axis=-1).reshape(x.shape)
    assert np.array_equal(found, codes)
    assert np.array_equal(parts["scale"].numpy(), scale)
    assert np.array_equal(parts["offset"].numpy(), low)
    # Another value in one place is another code, or another range.
    x[7, 5] = 9.0
    assert not np.array_equal(in_numpy(x.numpy(), form.block, form.grid.bits)[1], scale)
    assert differences(rounded(x, form), parts) > 0


def test_what_overflows_is_left_to_the_format_which_says_so():
    form = FORMATS["int4"]
    for worst in (2e6, -7e4):
        x = rows(3, 64)
        x[1, 40] = worst
        assert rounded(x, form) is None
    wide = replace(kv_format("int4"), dtype=torch.float32)
    k = rows(1, 64).view(1, 1, 1, 64)
    k[..., 3] = -7e4
    message = "layer 2: keys: an offset of 7e+04 overflows float16; store it as torch.float32"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        QuantizedCache(wide).update(k, k, layer=2)


@pytest.mark.parametrize(
    "form",
    [
        kv_format("int3").keys,
        kv_format("fp8-token").keys,
        Scheme(grid.GRIDS["uint4"], 32, fit.minmax, offset=torch.float16),
        Scheme(grid.GRIDS["int4"], 32, fit.own_range, offset=torch.float16),
        Scheme(grid.GRIDS["uint4"], 32, fit.own_range, offset=torch.float32),
    ],
    ids=["int3", "fp8", "minmax", "signed", "float32"],
)
def test_other_formats_are_left_to_themselves(form):
    assert rounded(rows(2, 64), form) is None


def test_activations_of_any_dtype_and_strides():
    form, x = FORMATS["int4"], rows(4, 64, seed=1)
    for other in (x.half(), x.bfloat16(), x.double(), x.repeat(1, 2)[:, ::2], torch._neg_view(x)):
        assert differences(rounded(other, form), form.quantize(other).parts) == 0
    assert differences(rounded(torch._neg_view(x), form), rounded(x, form)) > 0
    empty = rounded(x[:0], form)
    assert [list(part.shape) for part in empty.values()] == [[0, 32], [0, 2], [0, 2]]


def test_what_has_no_rows_of_floats_is_left_to_the_format():
    form, x = FORMATS["int4"], rows(4, 64)
    for other in (x[0], x.view(2, 2, 64), x.int(), x[:, :0], x[:, :40], x.to(torch.complex64)):
        assert rounded(other, form) is None
    with pytest.raises(ValueError, match=r"^machine code reads the CPU's memory, not meta's$"):
        rounded(x.to("meta"), form)


@pytest.mark.parametrize("name", ["int4", "int8"])
@pytest.mark.parametrize("at", [0, 5, 31, 63])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_left_to_the_format_which_says_so(name, at, bad):
    x = rows(4, 64)
    assert rounded(x, FORMATS[name]) is not None
    x[1, at] = bad
    assert rounded(x, FORMATS[name]) is None
    with pytest.raises(ValueError, match=r"holds 1 NaN or infinite values; repair them first$"):
        FORMATS[name].quantize(x)


@pytest.mark.parametrize("axis", ["token", "channel"])
def test_a_store_rounds_with_it(axis, monkeypatch):
    """And what it keeps is the same without it."""
    calls, x = [], rows(6 * 64, 64, seed=5).view(2, 3, 64, 64)
    form = FORMATS["int4"]

    def counted(*given):
        calls.append(given)
        return rounded(*given)

    monkeypatch.setattr(rounding, "rounded", counted)
    with_kernel = Packed(form, axis, x)
    with_kernel.append(with_kernel.rounded(x))
    assert len(calls) == 1
    monkeypatch.setattr(rounding, "rounded", lambda *_: None)
    without = Packed(form, axis, x)
    without.append(without.rounded(x))
    assert differences(with_kernel.parts, without.parts) == 0
    without.append(without.rounded(x + 1))
    assert len(without) == 2 * len(with_kernel) == 128
