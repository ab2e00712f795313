"""Eight bits times eight bits on the CPU: integers are exact, whatever the processor."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlib
from qlib import fit, grid
from qlib.kernels.cpu import w8a8
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

SHAPES = [(1, 1, 1), (1, 5, 1), (4, 1, 1), (3, 1, 2), (3, 33, 77), (16, 16, 16), (17, 130, 1030)]
SHAPES += [(1, 3, 3000), (2, 2, 70000)]
KINDS = {"random": None, "highest": (127, 255), "lowest": (-128, 0), "opposite": (-128, 255)}


def codes(rows: int, outputs: int, inputs: int, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "random":
        generator = torch.Generator().manual_seed(rows * outputs * inputs)
        x = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, generator=generator)
        return x, torch.randint(0, 256, (outputs, inputs), dtype=torch.uint8, generator=generator)
    x, w = KINDS[kind]
    weight = torch.full((outputs, inputs), w, dtype=torch.uint8)
    return torch.full((rows, inputs), x, dtype=torch.int8), weight


def exact(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x.long() @ (w.long() - 128).T


@pytest.fixture(params=["int_mm", "float32"])
def path(request, monkeypatch):
    if request.param == "float32":
        monkeypatch.setattr(w8a8, "int_mm_is_exact", lambda: False)
    elif not w8a8.int_mm_is_exact():
        pytest.skip("torch._int_mm saturates on this processor")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("path")
def test_codes_are_multiplied_exactly(shape, kind):
    x, w = codes(*shape, kind)
    product = w8a8.code_product(x, w)
    assert torch.equal(product.long(), exact(x, w))
    x[0, -1] ^= 1
    if int(w[0, -1]) != 128:
        assert not torch.equal(product.long(), exact(x, w))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3000), st.sampled_from(list(KINDS)))
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, outputs, inputs, kind):
    x, w = codes(rows, outputs, inputs, kind)
    assert torch.equal(w8a8.code_product(x, w).long(), exact(x, w))


@pytest.mark.usefixtures("path")
def test_any_strides():
    x, w = codes(6, 10, 128, "random")
    for a, b in ((x.T.contiguous().T, w), (x, w.T.contiguous().T), (x[::2, ::2], w[::3, ::2])):
        assert torch.equal(w8a8.code_product(a, b).long(), exact(a, b))
    # A single row may have any stride, zero too.
    a, b = x[:1].as_strided((1, 128), (0, 1)), w[:1].as_strided((1, 128), (0, 1))
    assert torch.equal(w8a8.code_product(a, b).long(), exact(a, b))


def test_codes_of_other_kinds_are_refused():
    x, w = codes(2, 3, 64, "random")
    for a, b in ((x, w.view(torch.int8)), (x.float(), w), (x, w[:, :32]), (x[0], w), (x[None], w)):
        got = f"got {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}"
        message = f"code_product: {got}, need int8 [rows, in] and uint8 [out, in]"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            w8a8.code_product(a, b)
    assert w8a8.code_product(x[:0], w).shape == (0, 3)
    assert w8a8.code_product(x[:, :0], w[:, :0]).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_one_input_is_what_int_mm_gets_wrong():
    """pytorch issue 195066: why `code_product` does not ask it there."""
    x, w = codes(3, 5, 1, "random")
    assert torch.equal(w8a8.code_product(x, w).long(), exact(x, w))
    assert (w8a8.code_product(x, w) == 0).sum() < 15


PROBE = """if True:
    import json, torch
    from qlib.kernels.cpu import w8a8
    x = torch.full((16, 512), 127, dtype=torch.int8)
    w = torch.full((16, 512), 255, dtype=torch.uint8)
    plain = bool((torch._int_mm(w, x.T) == 512 * 127 * 255).all())
    ours = bool((w8a8.code_product(x, w) == 512 * 127 * 127).all())
    print(json.dumps([w8a8.int_mm_is_exact(), plain, ours]))"""


@pytest.mark.parametrize("instructions", ["AVX512_CORE", "AVX2"])
def test_processors_without_bytes_summed_in_32_bits(instructions):
    """oneDNN made to believe that it is on an older processor: the probe knows, sums are exact."""
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    run = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    probed, plain, ours = json.loads(run.stdout)
    assert probed == plain
    assert ours


# -- With scales -----------------------------------------------------------------------------------

SIDES = [("int8-row", "int8-row"), ("int8-tensor", "int8-row"), ("int8", "int8-tensor")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", SIDES, ids=str)
@pytest.mark.usefixtures("path")
def test_int8_products(names, dtype):
    x, w = (qlib.quantize(torch.randn(n, 77), name) for n, name in zip((5, 33), names))
    y = w8a8.scaled_product(x, w, dtype)
    assert y.dtype == dtype
    wanted = x.dequantize().double() @ w.dequantize().double().T
    # Rounded to float32 twice, sum and product, and once to the result.
    bound = (torch.finfo(dtype).eps / 2 + 2**-23) * wanted.abs() + 1e-7
    assert ((y - wanted).abs() <= bound).all()
    for part, bit in (("codes", 128), ("scale", 1)):
        stored = w.parts[part].clone()
        stored.view(torch.uint8)[0, 0 if part == "codes" else 1] ^= bit
        other = w8a8.scaled_product(x, QTensor(w.format, w.shape, w.parts | {part: stored}), dtype)
        assert not ((other - wanted).abs() <= bound).all()


def test_int8_products_are_those_of_int64():
    x, w = (qlib.quantize(torch.randn(n, 300), "int8") for n in (9, 14))
    sums = exact((x.parts["codes"].int() - 128), w.parts["codes"])
    wanted = sums.float() * (x.parts["scale"].float() * w.parts["scale"].float().T)
    assert torch.equal(w8a8.scaled_product(x, w, torch.float32), wanted)
    assert not torch.equal(w8a8.scaled_product(x, w, torch.float32), wanted.nextafter(wanted * 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_e4m3_products_agree_with_torchs(dtype):
    x, w = (qlib.quantize(torch.randn(n, 96), "fp8_e4m3") for n in (5, 33))
    stored = [q.parts["codes"].view(torch.float8_e4m3fn) for q in (x, w)]
    scales = x.parts["scale"], w.parts["scale"].T
    wanted = torch._scaled_mm(stored[0], stored[1].T, *scales, out_dtype=torch.float32)
    y = w8a8.scaled_product(x, w, dtype)
    assert y.dtype == dtype
    bound = torch.finfo(dtype).eps * wanted.abs() + 1e-5
    assert ((y - wanted).abs() <= bound).all()
    w.parts["codes"][0, w.dequantize()[0].abs().argmax()] ^= 128
    assert not ((w8a8.scaled_product(x, w, dtype) - wanted).abs() <= bound).all()


# -- What it does not take -------------------------------------------------------------------------

E8M0 = dataclasses.replace(qlib.format("int8"), scale=grid.E8M0)
STATIC = Scheme(grid.E4M3, "tensor", fit.absmax, scale=torch.float32)
REASONS = [
    (("int8", "int8-tensor"), None),
    ((STATIC, "fp8_e4m3"), None),
    (("fp8_e4m3", "int8"), "x has e4m3 codes, the weight int8"),
    (("q8_0", "int8"), "x is BlockFormat, not a Scheme"),
    (
        ("int8", "int8-asym"),
        "the weight is uint8, block row, minmax, scale float16, zero point uint8: not int8 or e4m3 "
        "without an offset",
    ),
    (
        ("int8-g32", "int8"),
        "x is int8, block 32, absmax, scale float16: not one floating-point scale for a row or the "
        "tensor",
    ),
    (
        ("int8", E8M0),
        "the weight is int8, block row, absmax, scale e8m0: not one floating-point scale for a row "
        "or the tensor",
    ),
]


@pytest.mark.parametrize(("names", "reason"), REASONS, ids=range(len(REASONS)))
def test_why_not(names, reason):
    formats = [qlib.format(name) if isinstance(name, str) else name for name in names]
    x, w = (format.quantize(torch.ones(2, 64)) for format in formats)
    assert w8a8.why_not(x, w) == reason
    if reason:
        with pytest.raises(ValueError, match=f"^scaled_product: {re.escape(reason)}$"):
            w8a8.scaled_product(x, w, torch.float16)
    else:
        assert w8a8.scaled_product(x, w, torch.float16).shape == (2, 2)


def test_why_not_these_shapes():
    x, w = qlib.quantize(torch.ones(2, 64), "int8"), qlib.quantize(torch.ones(3, 32), "int8")
    assert w8a8.why_not(x, w) == "x is [2, 64], the weight [3, 32]: inputs differ"
