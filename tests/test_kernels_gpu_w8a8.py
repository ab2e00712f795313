"""Eight bits times eight bits on the GPU, in Triton's interpreter and compiled."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from triton_child import compiled, facts, interpreted
from weight_kernels import flipped, zeros

import qlib
from qlib import fit, grid
from qlib.kernels.gpu import w8a8
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

# rows, outputs, inputs, and how the codes are made: tiles that end early in every direction.
SHAPES = [(3, 33, 77), (1, 1, 1), (16, 64, 256), (70, 130, 300), (5, 3, 1030), (130, 200, 130)]
SIDES = [("int8-row", "int8-row"), ("int8-tensor", "int8-row"), ("int8-row", "int8-tensor")]
INTEGER = [(x, w, *shape, "random") for x, w in SIDES for shape in SHAPES[: 6 if x == w else 2]]
# Every product is 2^14, or minus 128 * 127, or half of them each.
INTEGER += [("int8-row", "int8-row", 3, 33, 1030, kind) for kind in ("lowest", "opposite", "mixed")]
FLOAT = [("fp8_e4m3", "fp8_e4m3", *shape, "normal") for shape in SHAPES]
TENSOR = Scheme(grid.E4M3, "tensor", fit.absmax, scale=torch.float32)


def random(shape: tuple[int, int], seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def operands(x: str, w: str, rows: int, outputs: int, inputs: int, kind: str) -> list[QTensor]:
    sides = [(x, (rows, inputs)), (w, (outputs, inputs))]
    q = [qlib.quantize(random(shape, i), name) for i, (name, shape) in enumerate(sides)]
    generator = torch.Generator().manual_seed(2)
    for side, codes in enumerate(part.parts["codes"] for part in q):
        if kind == "random":
            codes.random_(0, 256, generator=generator)
        elif kind != "normal":
            codes.fill_(0 if side == 0 or kind == "lowest" else 255)
            codes[:, ::2] = 255 if kind == "mixed" and side else codes[:, ::2]
    return q


def exact(x: QTensor, w: QTensor, dtype: torch.dtype) -> torch.Tensor:
    """By torch's own integers."""
    codes = [q.parts["codes"].long() - 128 for q in (x, w)]
    scales = x.parts["scale"].float() * w.parts["scale"].float().T
    return ((codes[0] @ codes[1].T).float() * scales).to(dtype)


def everything() -> dict:
    """For each case the outputs that differ, or the error, and the same of two changed weights."""
    found = {}
    for case in INTEGER:
        x, w = operands(*case)
        for dtype in (torch.float32, torch.float16):
            wanted, twins = (
                exact(x, w, dtype),
                [flipped(w, "codes", 128), flipped(w, "scale", 2, 0)],
            )
            products = [w8a8.scaled_product(x, weight, dtype) for weight in (w, *twins)]
            assert {product.dtype for product in products} == {dtype}
            found[f"{case} {dtype}"] = [int((y != wanted).sum()) for y in products]
    for case in FLOAT:
        x, w = operands(*case)
        for name, pair in {"": (x, w), " tensor": (TENSOR.quantize(x.dequantize()), w)}.items():
            found[f"{case}{name}"] = float_errors(*pair)
    return found | {"fused": fused()}


def float_errors(x: QTensor, w: QTensor) -> list[float]:
    wanted = x.dequantize().double() @ w.dequantize().double().T
    plain = x.dequantize().half() @ w.dequantize().half().T
    largest = w.parts["codes"][0].view(torch.float8_e4m3fn).float().abs().argmax()
    # The sign of the largest code of a row, and the last bit of the exponent of its scale.
    twins = [flipped(w, "codes", 128, int(largest)), flipped(w, "scale", 128, 2)]
    products = [w8a8.scaled_product(x, weight, torch.float16) for weight in (w, *twins)]
    return [(y - wanted).abs().max().item() for y in (*products, plain)]


FUSED = {"int8-row": torch.float16, "int8-tensor": torch.bfloat16, "fp8_e4m3": torch.float16}


def fused() -> dict[str, list[int]]:
    """Outputs that differ from the two steps by hand, and after one activation has changed."""
    found = {}
    for name, dtype in FUSED.items():
        w, x = qlib.quantize(random((33, 77), 1), name), random((5, 77), 0).to(dtype)
        per_row = dataclasses.replace(w.format, block="row")
        # The interpreter's results in bfloat16 are cut off, not rounded: what matters is the codes.
        wanted = w8a8.scaled_product(per_row.quantize(x), w, x.dtype)
        other = x.clone()
        other[0, 3] += 1
        found[name] = [int((w8a8.w8a8(y, w) != wanted).sum()) for y in (x, other)]
    return found


@pytest.fixture(scope="module")
def measured():
    return interpreted(everything)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", INTEGER, ids=str)
def test_integers_are_exact(measured, case, dtype):
    different, other_code, other_scale = measured[f"{case} {dtype}"]
    assert different == 0
    assert other_code > 0
    assert other_scale > 0


@pytest.mark.parametrize("scale", ["", " tensor"])
@pytest.mark.parametrize("case", FLOAT, ids=str)
def test_floats_are_within_twice_torchs_error(measured, case, scale):
    error, other_code, other_scale, torchs = measured[f"{case}{scale}"]
    assert error <= 2 * torchs or error < 1e-6
    assert other_code > 2 * torchs
    assert other_scale > 2 * torchs


@pytest.mark.parametrize("name", FUSED)
def test_activations_quantized_on_the_way(measured, name):
    same, other = measured["fused"][name]
    assert same == 0
    assert other > 0


@pytest.mark.parametrize("case", [INTEGER[0], INTEGER[6], INTEGER[-1], FLOAT[0]], ids=str)
def test_reference(case):
    """Against torch's scaled product of E4M3, and its integers."""
    x, w = operands(*case)
    if case in FLOAT:
        codes = [q.parts["codes"].view(torch.float8_e4m3fn) for q in (x, w)]
        scales = x.parts["scale"], w.parts["scale"].T
        wanted = torch._scaled_mm(codes[0], codes[1].T, *scales, out_dtype=torch.float32)
    else:
        wanted = exact(x, w, torch.float32)
    found = w8a8.reference(x, w, torch.float32)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, wanted.flip(0), rtol=1e-5, atol=1e-5)


# -- Compiled --------------------------------------------------------------------------------------

S8 = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"
E4M3 = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.e4m3\.e4m3\.f32"
BUILDS = {("int8-row", cc, 16): S8 for cc in (80, 89, 100, 120)}
BUILDS |= {("fp8_e4m3", cc, 16): E4M3 for cc in (89, 120)} | {("int8-row", 80, 4096): S8}
for rows, n in ((16, 16), (4096, 128)):
    BUILDS["int8-row", 90, rows] = rf"wgmma\.mma_async\.sync\.aligned\.m64n{n}k32\.s32\.s8\.s8"
    BUILDS["fp8_e4m3", 90, rows] = rf"wgmma\.mma_async\.sync\.aligned\.m64n{n}k32\.f32\.e4m3\.e4m3"
for rows in (16, 4096):
    BUILDS["fp8_e4m3", 100, rows] = r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4"


def assembled() -> dict:
    found = {}
    for name, cc, rows in BUILDS:
        x, w = zeros(name, rows, 4096), zeros(name, 4096, 4096)
        launched = w8a8.launch(x, w, torch.bfloat16 if cc == 80 else torch.float16)[0]
        additions = r"\badd(?:\.rn)?\.f32"
        found[f"{name} {cc} {rows}"] = facts(launched.compiled(cc), additions=additions)
    try:
        w8a8.launch(*[zeros("fp8_e4m3", 16, 64)] * 2, torch.float16)[0].compiled(80)
    except Exception as error:
        found["fp8_e4m3 80"] = type(error).__name__
    return found


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


@pytest.mark.parametrize("build", BUILDS, ids=lambda build: " ".join(map(str, build)))
def test_machine_code(code, build):
    found = code[" ".join(map(str, build))]
    assert found["tensor cores"]
    assert all(re.match(BUILDS[build], instruction) for instruction in found["tensor cores"])
    assert found["wide"] > 0
    assert found["stack"] == 0


@pytest.mark.parametrize("rows", [16, 4096])
def test_hopper_moves_its_sums_of_e4m3_to_float32(code, rows):
    """As often as `max_num_imprecise_acc` asks; sums of integers need no addition of floats."""
    additions = {name: code[f"{name} 90 {rows}"]["additions"] for name in ("int8-row", "fp8_e4m3")}
    assert additions["int8-row"] == 0
    # One for each sum of a thread: a tile of 64 or 128 outputs over 128 or 256 threads.
    assert additions["fp8_e4m3"] >= {16: 8, 4096: 64}[rows]


def test_e4m3_does_not_compile_below_89(code):
    assert code["fp8_e4m3 80"] == "CompilationError"


# -- What it does not take -------------------------------------------------------------------------

HALVES = dataclasses.replace(qlib.format("int8"), scale=grid.E8M0)
REASONS = [
    (("int8", "int8", 80), None),
    (("int8-tensor", "int8-tensor", 120), None),
    (("fp8_e4m3", "fp8_e4m3", 89), None),
    (("int8", "int8", 75), "tensor cores for int8 start at cc 8.0, this is 7.5"),
    (("fp8_e4m3", "fp8_e4m3", 80), "tensor cores for e4m3 start at cc 8.9, this is 8.0"),
    (("fp8_e4m3", "int8", 90), "x has e4m3 codes, the weight int8"),
    (("q8_0", "int8", 90), "x is BlockFormat, not a Scheme"),
    (
        ("int8", "nf4", 90),
        "the weight is nf4, block 64, absmax, scale float32: not int8 or e4m3 without an offset",
    ),
    (
        ("int8", "int8-g32", 90),
        "the weight is int8, block 32, absmax, scale float16: not one floating-point scale for a "
        "row or the tensor",
    ),
    (
        (HALVES, "int8", 90),
        "x is int8, block row, absmax, scale e8m0: not one floating-point scale for a row or the "
        "tensor",
    ),
]


@pytest.mark.parametrize(("case", "reason"), REASONS, ids=range(len(REASONS)))
def test_why_not(case, reason):
    *names, capability = case
    formats = [qlib.format(name) if isinstance(name, str) else name for name in names]
    x, w = (format.quantize(torch.ones(2, 64)) for format in formats)
    assert w8a8.why_not(x, w, capability) == reason
    if reason and "tensor cores" not in reason:
        with pytest.raises(ValueError, match=f"^scaled_product: {re.escape(reason)}$"):
            w8a8.scaled_product(x, w, torch.float16)


def test_why_not_these_shapes():
    x = qlib.quantize(torch.ones(2, 64), "int8")
    short = qlib.quantize(torch.ones(3, 32), "int8")
    reason = "x is [2, 64], the weight [3, 32]: inputs differ"
    assert w8a8.why_not(x, short, 90) == reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        w8a8.scaled_product(x, short, torch.float16)
    for inputs, reason in ((131071, None), (131072, "sums of 131072 products may leave int32")):
        long = zeros("int8", 1, inputs)
        assert w8a8.why_not(long, long, 90) == reason
    # The sum that would be one too large.
    assert 131071 * 2**14 < 2**31 == 131072 * 2**14


def test_candidates_are_launches():
    for rows in (16, 4096):
        x, w = zeros("int8", rows, 256), zeros("int8", 512, 256)
        chosen = w8a8.launch(x, w, torch.float16)[0]
        for tiles in w8a8.candidates(rows):
            launch = w8a8.launch(x, w, torch.float16, **tiles)[0]
            assert launch.constants.keys() == chosen.constants.keys()
            assert launch.options.keys() == chosen.options.keys()
            # What `max_num_imprecise_acc` counts has to fit into a tile.
            assert launch.constants["BLOCK_K"] % 128 == 0
