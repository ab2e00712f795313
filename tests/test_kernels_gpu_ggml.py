"""ggml's blocks: exact tiles and products by the interpreter, and what the kernels compile to."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from triton_child import CAPABILITIES, compiled, interpreted
from weight_kernels import errors, flipped, layer_facts, products_of, tiles, weight

import qlib
from qlib.ggml import FORMATS, kquants
from qlib.kernels.gpu import ggml
from qlib.qtensor import QTensor

# Where the float16 numbers of a block are, and bits to turn over, (byte, mask): the high bit of the
# code of value 0, the sign of d, a high bit of the first scale or min.
HALVES = {"Q4_0": [0], "Q8_0": [0], "TQ2_0": [64], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
FLIPS = {
    "Q4_0": [(2, 8), (1, 128)],
    "Q8_0": [(2, 64), (1, 128)],
    "TQ2_0": [(0, 2), (65, 128)],
    "Q4_K": [(16, 8), (1, 128), (3, 128), (4, 32), (8, 32)],
    "Q5_K": [(48, 8), (16, 1), (1, 128), (3, 128), (4, 32), (8, 32)],
    "Q6_K": [(0, 8), (128, 2), (209, 128), (192, 128)],
}
TILES = (32, 64, 128, 256)
# Outputs, blocks in a row, rows of activations.
CASES = [("gemv", 3, 1, 1), ("gemv", 33, 3, 2), ("gemm", 3, 1, 1), ("gemm", 70, 3, 17)]


def random_blocks(name: str, rows: int, columns: int) -> torch.Tensor:
    """uint8 [rows, bytes]: anything, but scales that are NaN or infinite."""
    kind = FORMATS[name.lower()].kind
    rng = np.random.default_rng(rows)
    raw = rng.integers(0, 256, (rows, columns // kind.block, kind.size), dtype=np.uint8)
    for at in HALVES[name]:
        raw[:, :, at + 1] &= 0b11111011
    if name in ("Q4_K", "Q5_K") and raw.shape[:2] == (8, 8):
        p, j = np.arange(64, dtype=np.uint8)[:, None], np.arange(8, dtype=np.uint8)
        six = kquants.to_six_bits((p + 8 * j + 5) % 64, (5 * p + 3 * j + 7) % 64)
        raw[:, :, 4:16] = six.reshape(8, 8, 12)
    return torch.from_numpy(raw.reshape(rows, -1))


def qtensor(name: str, raw: torch.Tensor) -> QTensor:
    format = FORMATS[name.lower()]
    columns = raw.shape[1] // format.kind.size * format.kind.block
    return QTensor(format, (len(raw), columns), {"blocks": raw})


def twins(q: QTensor) -> list[QTensor]:
    return [flipped(q, "blocks", mask, byte) for byte, mask in FLIPS[q.format.kind.name]]


def decoded() -> dict[str, int | list[int]]:
    """Values that differ from the oracle's: none, and some as soon as a bit is turned over."""
    found = {}
    for name in HALVES:
        small = qtensor(name, random_blocks(name, 5, 3 * FORMATS[name.lower()].kind.block))
        # Every 6-bit scale and min.
        large = qtensor(name, random_blocks(name, 8, 2048))
        found |= {f"{name} {block}": unequal(small, small, block) for block in TILES}
        found[f"{name} large"] = unequal(large, large)
        found[f"{name} flipped"] = [unequal(twin, small) for twin in twins(small)]
    return found


def unequal(q: QTensor, wanted: QTensor, block: int = 256) -> int:
    """Values of `q` in tiles of 8 rows and `block` inputs that differ from the oracle's."""
    kind = gguf.GGMLQuantizationType[wanted.format.kind.name]
    oracle = torch.from_numpy(gguf.quants.dequantize(wanted.parts["blocks"].numpy(), kind))
    assert torch.equal(oracle, wanted.dequantize())
    return int((tiles(ggml.packed(q), 8, block) != oracle).sum())


def measure(name: str, rung: str, outputs: int, blocks: int, rows: int) -> list:
    q = weight(name.lower(), outputs, blocks * FORMATS[name.lower()].kind.block)
    # With more outputs the error that is allowed is larger: a scale among many may pass.
    wrong = twins(q) if rung == "gemv" and outputs < 8 else twins(q)[:1]
    return errors(products_of(ggml, rung), q, rows, wrong)


def everything() -> dict[str, list]:
    return decoded() | {f"{name} {case}": measure(name, *case) for name in HALVES for case in CASES}


@pytest.fixture(scope="module")
def measured():
    return interpreted(everything)


@pytest.mark.parametrize("case", [*TILES, "large"])
@pytest.mark.parametrize("name", HALVES)
def test_tiles_of_random_bytes_equal_gguf(measured, name, case):
    assert measured[f"{name} {case}"] == 0


@pytest.mark.parametrize("name", HALVES)
def test_one_bit_changes_a_tile(measured, name):
    assert len(measured[f"{name} flipped"]) == len(FLIPS[name])
    assert min(measured[f"{name} flipped"]) > 0


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_products(measured, name, case):
    error, flips, budget = measured[f"{name} {case}"]
    assert error <= budget
    assert min(flips) > budget


# (type, rung, rows of activations, dtype, capability).
TARGETS = [("Q4_K", "gemv", 1, "float16", cc) for cc in CAPABILITIES]
TARGETS += [("Q4_K", "gemm", 16, "bfloat16", cc) for cc in CAPABILITIES[1:]]
TARGETS += [("Q6_K", "gemv", 1, "bfloat16", cc) for cc in (75, 120)]
TARGETS += [("Q6_K", "gemm", 16, "float16", 100), ("Q5_K", "gemm", 16, "float16", 80)]
TARGETS += [(name, "gemv", 1, "float16", 90) for name in ("Q4_0", "Q8_0", "TQ2_0", "Q5_K")]


def assembled() -> dict[str, dict]:
    formats = {name: name.lower() for name in HALVES}
    loads = {"bytes": r"ld\.global\.b8", "pairs": r"ld\.global\.b16"}
    return layer_facts(ggml, TARGETS, formats, **loads)


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_machine_code(code, target):
    name, rung, *_ = target
    found = code[str(target)]
    assert found["stack"] == 0
    assert bool(found["tensor cores"]) == (rung == "gemm")
    if name in ("Q4_K", "Q5_K"):
        assert found["wide"] > 0
        assert found["bytes"] == 0
    else:
        # Codes come two bytes at a time; single bytes are scales.
        assert found["pairs"] > 4 * found["bytes"]


@pytest.mark.parametrize(
    ("format", "reason"),
    [
        *((name.lower(), None) for name in HALVES),
        ("q3_k", "Q3_K is not one of ggml's Q4_0, Q8_0, TQ2_0, Q4_K, Q5_K, Q6_K"),
        (
            "int4-g32",
            "int4, block 32, absmax, scale float16 is not one of ggml's Q4_0, Q8_0, TQ2_0, "
            "Q4_K, Q5_K, Q6_K",
        ),
    ],
)
def test_why_not(format, reason):
    assert ggml.why_not(qlib.quantize(torch.randn(2, 256), format)) == reason


def test_packed_shares_the_memory_of_the_blocks():
    q = qlib.quantize(torch.randn(3, 512), "q6_k")
    tensors = [part for part in ggml.packed(q).parts if isinstance(part, torch.Tensor)]
    assert {part.data_ptr() for part in tensors} == {q.parts["blocks"].data_ptr()}
