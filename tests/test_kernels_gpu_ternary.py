"""The ternary kernels: all bytes, products by the interpreter, and what they compile to."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_child import CAPABILITIES, TENSOR_CORE, WIDE_LOAD, compiled, interpreted, spilled_bytes

import qlib
from qlib import fit, grid
from qlib.kernels.gpu import ternary
from qlib.pack import pack_trits, unpack_trits
from qlib.qtensor import QTensor

pytest.importorskip("triton")

ROWS = qlib.Scheme(grid.TERNARY, "row", fit.absmean, torch.float32)
# Rung, format, outputs, inputs, rows of activations, tiles.
CASES = [
    ("gemv", "ternary", 1, 1, 1, {}),
    ("gemv", "ternary", 33, 77, 3, {}),
    ("gemv", "row", 5, 330, 2, {}),
    ("gemv", "ternary", 40, 1600, 1, {"SPLIT": 3, "BLOCK_J": 32}),
    ("gemm", "ternary", 3, 33, 1, {}),
    ("gemm", "row", 70, 130, 17, {}),
    ("gemm", "ternary", 66, 1604, 33, {"SPLIT": 4}),
]


def formatted(name: str) -> qlib.Scheme:
    return ROWS if name == "row" else qlib.format(name)


def with_trit(q: QTensor, trit: int) -> QTensor:
    """`q` with another first weight."""
    codes = unpack_trits(q.parts["codes"], q.shape[1]).clone()
    codes[0, 0] = trit
    return QTensor(q.format, q.shape, {**q.parts, "codes": pack_trits(codes)})


def with_scale_bit(q: QTensor) -> QTensor:
    """`q` with one bit of the exponent of its first scale turned over."""
    scale = q.parts["scale"].clone()
    scale[0] *= 2
    return QTensor(q.format, q.shape, {**q.parts, "scale": scale})


def product(rung: str, x: torch.Tensor, q: QTensor, tiles: dict) -> torch.Tensor:
    launched, partial = ternary.launch(rung, x, q, **tiles)
    launched.run()
    return partial.sum(0).to(x.dtype)


def measure(rung: str, name: str, outputs: int, inputs: int, rows: int, tiles: dict) -> list:
    """The error, that with wrong weights, and twice the error of torch."""
    torch.manual_seed(inputs)
    weight, x = torch.randn(outputs, inputs), torch.randn(rows, inputs).half()
    weight[0, 0], x[0, 0] = 3, 4
    q = qlib.quantize(weight, formatted(name))
    exact = x.double() @ q.dequantize().double().T
    # Torch's error in a single product can be 0, so that of one unit of rounding is granted.
    rounding = exact.abs().max().item() * torch.finfo(x.dtype).eps
    budget = max(2 * (ternary.reference(x, q) - exact).abs().max().item(), rounding)

    def error(q: QTensor) -> float:
        return (product(rung, x, q, tiles) - exact).abs().max().item()

    wrong = [error(with_trit(q, 0)), error(with_trit(q, 1)), error(with_scale_bit(q))]
    return [error(q), wrong, budget]


def products() -> list:
    return [measure(*case) for case in CASES]


def drawn() -> list:
    found = []

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(["gemv", "gemm"]), *(st.integers(1, top) for top in (40, 90, 4)))
    def draw(rung, outputs, inputs, rows):
        found.append(measure(rung, "ternary", outputs, inputs, rows, {}))

    draw()
    return found


def all_bytes() -> list[int]:
    """Trits of the 243 bytes that the kernels read otherwise than `unpack_trits` does."""
    every = torch.arange(243, dtype=torch.uint8)[:, None]
    q = QTensor(
        qlib.format("ternary"),
        (243, 5),
        {"codes": every, "scale": torch.ones(1, 1, dtype=torch.float16)},
    )
    expected = unpack_trits(every, 5).T.float() - 1
    x = torch.eye(5).half()
    return [int((getattr(ternary, rung)(x, q) != expected).sum()) for rung in ("gemv", "gemm")]


@pytest.fixture(scope="module")
def measured():
    return interpreted(products)


@pytest.mark.parametrize("i", range(len(CASES)), ids=lambda i: str(CASES[i]))
def test_products(measured, i):
    error, wrong, budget = measured[i]
    assert error <= budget
    assert min(wrong) > budget


def test_drawn_shapes():
    found = interpreted(drawn)
    assert len(found) == 12
    assert all(error <= budget for error, _, budget in found)
    assert all(min(wrong) > budget for _, wrong, budget in found)


def test_every_byte_gives_its_five_trits():
    assert interpreted(all_bytes) == [0, 0]


def test_multiplication_and_overflow_give_the_trits_of_every_byte():
    """The arithmetic of the kernels in plain integers, with the last trit leading."""
    unit, third, two_thirds = (
        number.value for number in (ternary.ONE_243RD, ternary.ONE_THIRD, ternary.TWO_THIRDS)
    )
    for byte in range(243):
        fraction, trits = byte * unit, []
        assert fraction < 2**32
        for _ in range(5):
            trits.append((fraction >= third) + (fraction >= two_thirds))
            fraction = fraction * 3 % 2**32
        assert trits == [byte // 3**i % 3 for i in (4, 3, 2, 1, 0)]
    # One less than a 243rd, rounded up, is not enough.
    assert 81 * (unit - 1) < third


# Rung, rows, dtype, inputs of 4096 outputs, capability. A row of 5120 is 1024 bytes, a multiple of
# 16; a row of 4096 is 820 bytes, a multiple of 4; a row of 8192 is 1639.
TARGETS = [("gemv", 1, "float16", 5120, cc) for cc in CAPABILITIES]
TARGETS += [("gemv", 1, "bfloat16", inputs, 90) for inputs in (4096, 8192)]
TARGETS += [("gemm", 16, "float16", 4096, cc) for cc in CAPABILITIES]
TARGETS += [("gemm", 64, "bfloat16", 5120, 80), ("gemm", 512, "float16", 4096, 89)]
TARGETS += [("gemm", 512, "bfloat16", 4096, cc) for cc in (90, 100)]
# Bytes of shared memory of a program.
SHARED = {75: 65536, 80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def assembled(targets: list) -> dict[str, dict]:
    import triton

    found, kernels, compile = {}, [], triton.compile
    # Launch keeps the assembly alone; shared memory is in the metadata.
    triton.compile = lambda *a, **options: kernels.append(compile(*a, **options)) or kernels[-1]
    for rung, rows, dtype, inputs, capability in targets:
        layout = qlib.format("ternary").layout((4096, inputs))
        parts = {name: torch.zeros(size, dtype=kind) for name, (kind, size) in layout.items()}
        q = QTensor(qlib.format("ternary"), (4096, inputs), parts)
        x = torch.zeros(rows, inputs, dtype=getattr(torch, dtype))
        ptx = ternary.launch(rung, x, q)[0].compiled(capability)["ptx"]
        found[str((rung, rows, dtype, inputs, capability))] = {
            "wide": len(re.findall(WIDE_LOAD, ptx)),
            "tensor cores": len(re.findall(TENSOR_CORE, ptx)),
            "divisions": len(re.findall(r"\b(?:div|rem)\.", ptx)),
            "products": len(re.findall(r"fma\.rn\.f32|mul\.f32", ptx)),
            "spilled": spilled_bytes(ptx) + (".local" in ptx),
            "shared": kernels[-1].metadata.shared,
        }
    return found


@pytest.fixture(scope="module")
def code():
    return compiled(assembled, TARGETS)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_machine_code(code, target):
    rung, _, _, inputs, capability = target
    found = code[str(target)]
    assert found["spilled"] == 0
    assert found["shared"] <= SHARED[capability]
    assert found["divisions"] == 0
    assert (found["tensor cores"] > 0) == (rung == "gemm" and capability >= 80)
    if rung == "gemv":
        # Only the scale multiplies: at most 16 outputs of a thread, that has 80 weights of a tile.
        assert 0 < found["products"] <= 16
        if inputs == 5120:
            assert found["wide"] > 0


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        ("ternary", None),
        (ROWS, None),
        ("int4-g32", "the grid int4 is not ternary"),
        ("q4_0", "BlockFormat is not a Scheme"),
        (dataclasses.replace(ROWS, block=32), "a block of 32 is neither a row nor the tensor"),
        (
            dataclasses.replace(ROWS, scale=grid.E8M0),
            "the scale is not float16, bfloat16 or float32",
        ),
    ],
    ids=str,
)
def test_why_not(format, reason):
    assert ternary.why_not(qlib.quantize(torch.randn(3, 64), format)) == reason
