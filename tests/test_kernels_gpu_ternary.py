"""The ternary kernels: all bytes, products by the interpreter, and what they compile to."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton_child import CAPABILITIES, compiled, facts, interpreted
from weight_kernels import drawn, errors, flipped, weight, zeros

import qlib
from qlib import fit, grid
from qlib.kernels.gpu import ternary
from qlib.pack import pack_trits, unpack_trits
from qlib.qtensor import QTensor

ROWS = qlib.Scheme(grid.TERNARY, "row", fit.absmean, torch.float32)
RUNGS = ("gemv", "gemm")
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


FORMATS = {"row": ROWS}


def with_trit(q: QTensor, trit: int) -> QTensor:
    """`q` with another first weight."""
    codes = unpack_trits(q.parts["codes"], q.shape[1]).clone()
    codes[0, 0] = trit
    return QTensor(q.format, q.shape, {**q.parts, "codes": pack_trits(codes)})


def measure(rung: str, name: str, outputs: int, inputs: int, rows: int, tiles: dict) -> list:
    q = weight(FORMATS.get(name, name), outputs, inputs)

    def product(x: torch.Tensor, q: QTensor) -> torch.Tensor:
        launched, partial = ternary.launch(rung, x, q, **tiles)
        launched.run()
        return partial.sum(0).to(x.dtype)

    return errors(product, q, rows, [with_trit(q, 0), with_trit(q, 1), flipped(q, "scale", 4)])


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
    return [int((getattr(ternary, rung)(x, q) != expected).sum()) for rung in RUNGS]


def everything() -> dict:
    found = {str(case): measure(*case) for case in CASES} | {"bytes": all_bytes()}
    for rung, rows in {"gemv": 2, "gemm": 40}.items():
        found[f"any {rung}"] = drawn(getattr(ternary, rung), ["ternary"], examples=6, rows=rows)
    return found


@pytest.fixture(scope="module")
def measured():
    return interpreted(everything)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(measured, case):
    error, wrong, budget = measured[str(case)]
    assert error <= budget
    assert min(wrong) > budget


@pytest.mark.parametrize("rung", RUNGS)
def test_products_of_any_shape(measured, rung):
    assert measured[f"any {rung}"] >= 6


def test_every_byte_gives_its_five_trits(measured):
    assert measured["bytes"] == [0, 0]


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
TARGETS += [("gemv", 1, "bfloat16", 8192, 90)]
TARGETS += [("gemm", 16, "float16", 4096, cc) for cc in CAPABILITIES]
TARGETS += [("gemm", 512, "bfloat16", 4096, cc) for cc in (90, 100)]
# Bytes of shared memory of a program.
SHARED = {75: 65536, 80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}


def assembled() -> dict[str, dict]:
    import triton

    found, kernels, compile = {}, [], triton.compile
    # Launch keeps the assembly alone; shared memory is in the metadata.
    triton.compile = lambda *a, **options: kernels.append(compile(*a, **options)) or kernels[-1]
    patterns = {"divisions": r"\b(?:div|rem)\.", "products": r"fma\.rn\.f32|mul\.f32"}
    for target in TARGETS:
        rung, rows, dtype, inputs, capability = target
        x = torch.zeros(rows, inputs, dtype=getattr(torch, dtype))
        launched = ternary.launch(rung, x, zeros("ternary", 4096, inputs))[0]
        found[str(target)] = facts(launched.compiled(capability), **patterns)
        found[str(target)]["shared"] = kernels[-1].metadata.shared
    return found


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_machine_code(code, target):
    rung, _, _, inputs, capability = target
    found = code[str(target)]
    assert found["stack"] == 0
    assert found["shared"] <= SHARED[capability]
    assert found["divisions"] == 0
    assert bool(found["tensor cores"]) == (rung == "gemm" and capability >= 80)
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
