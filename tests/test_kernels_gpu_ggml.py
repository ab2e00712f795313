"""ggml's blocks: exact tiles and products by the interpreter, and what the kernels compile to."""

from __future__ import annotations

import re

import gguf
import numpy as np
import pytest
import torch
from triton_child import CAPABILITIES, TENSOR_CORE, WIDE_LOAD, compiled, interpreted, spilled_bytes

import qlib
from qlib.ggml import FORMATS, kquants
from qlib.kernels.gpu import ggml
from qlib.qtensor import QTensor

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

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


def flipped(q: QTensor, byte: int, mask: int) -> QTensor:
    raw = q.parts["blocks"].clone()
    raw[0, byte] ^= mask
    return qtensor(q.format.kind.name, raw)


@triton.jit
def tile_kernel(
    weight, y, outputs, inputs,
    DECODE: tl.constexpr, OPTIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K
    values = DECODE(weight, n, outputs, k, OPTIONS, BLOCK_K)
    at = k + tl.arange(0, BLOCK_K)
    inside = (n < outputs)[:, None] & (at < inputs)[None, :]
    tl.store(y + n[:, None] * inputs + at[None, :], values, inside)


def tiles(q: QTensor, block: int) -> torch.Tensor:
    """The weight as the device function decodes it, in tiles of 8 rows and `block` inputs."""
    weight, y = ggml.packed(q), torch.full(q.shape, torch.nan)
    grid = (triton.cdiv(q.shape[0], 8), triton.cdiv(q.shape[1], block))
    tile_kernel[grid](weight.parts, y, *q.shape, weight.decode, weight.options, 8, block)
    return y


def decoded() -> dict[str, list[int]]:
    """Values that differ from the oracle's: none, and some as soon as a bit is turned over."""
    found = {}
    for name in HALVES:
        small = qtensor(name, random_blocks(name, 5, 3 * FORMATS[name.lower()].kind.block))
        # Every 6-bit scale and min.
        large = qtensor(name, random_blocks(name, 8, 2048))
        found |= {f"{name} {block}": unequal(tiles(small, block), small) for block in TILES}
        found[f"{name} large"] = unequal(tiles(large, 256), large)
        found[f"{name} flipped"] = [
            unequal(tiles(flipped(large, *flip), 256), large) for flip in FLIPS[name]
        ]
    return found


def unequal(values: torch.Tensor, q: QTensor) -> int:
    kind = gguf.GGMLQuantizationType[q.format.kind.name]
    oracle = torch.from_numpy(gguf.quants.dequantize(q.parts["blocks"].numpy(), kind))
    assert torch.equal(oracle, q.dequantize())
    return int((values != oracle).sum())


def products() -> dict[str, list]:
    """For each case: the kernel's error, its errors after each flip, and twice torch's error."""
    return {f"{name} {case}": measure(name, *case) for name in HALVES for case in CASES}


def measure(name: str, rung: str, outputs: int, blocks: int, rows: int) -> list:
    from qlib.kernels.gpu import product

    torch.manual_seed(0)
    columns = blocks * FORMATS[name.lower()].kind.block
    weight, x = torch.randn(outputs, columns), torch.randn(64, columns).half()
    weight[0, 0], x[0, 0] = 1.5, 4
    q = qlib.quantize(weight, name.lower())
    exact = x.double() @ q.dequantize().double().T
    budget = 2 * (product.reference(x, q) - exact).abs().max().item()
    x, exact = x[:rows], exact[:rows]

    def error(q: QTensor) -> float:
        return (getattr(product, rung)(x, ggml.packed(q)) - exact).abs().max().item()

    flips = FLIPS[name] if outputs < 8 else FLIPS[name][:1]
    return [error(q), [error(flipped(q, *flip)) for flip in flips], budget]


@pytest.fixture(scope="module")
def tile_errors():
    return interpreted(decoded)


@pytest.fixture(scope="module")
def product_errors():
    return interpreted(products)


@pytest.mark.parametrize("case", [*TILES, "large"])
@pytest.mark.parametrize("name", HALVES)
def test_tiles_of_random_bytes_equal_gguf(tile_errors, name, case):
    assert tile_errors[f"{name} {case}"] == 0


@pytest.mark.parametrize("name", HALVES)
def test_one_bit_changes_a_tile(tile_errors, name):
    assert len(tile_errors[f"{name} flipped"]) == len(FLIPS[name])
    assert min(tile_errors[f"{name} flipped"]) > 0


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", HALVES)
def test_products(product_errors, name, case):
    error, flips, budget = product_errors[f"{name} {case}"]
    assert error <= budget
    assert min(flips) > budget


# (type, rung, rows, dtype, capability) for a weight of 4096 x 4096.
TARGETS = [("Q4_K", "gemv", 1, "float16", cc) for cc in CAPABILITIES]
TARGETS += [("Q4_K", "gemm", 16, "bfloat16", cc) for cc in (80, 90, 100, 120)]
TARGETS += [("Q6_K", "gemv", 1, "bfloat16", cc) for cc in (75, 89, 120)]
TARGETS += [("Q6_K", "gemm", 16, "float16", cc) for cc in (80, 90, 100)]
TARGETS += [("Q4_K", "gemm", 512, "float16", 89), ("Q5_K", "gemm", 16, "float16", 80)]
TARGETS += [(name, "gemv", 1, "float16", 90) for name in ("Q4_0", "Q8_0", "TQ2_0", "Q5_K")]


def assembled(targets: list) -> dict[str, dict]:
    """What is in the machine code of each target."""
    from qlib.kernels.gpu import product

    found = {}
    for target in targets:
        name, rung, rows, dtype, capability = target
        blocks = FORMATS[name.lower()].layout((4096, 4096))["blocks"][1]
        weight = ggml.packed(qtensor(name, torch.zeros(blocks, dtype=torch.uint8)))
        x = torch.zeros(rows, 4096, dtype=getattr(torch, dtype))
        ptx = product.launch(rung, x, weight)[0].compiled(capability)["ptx"]
        found[str(tuple(target))] = {
            "target": f".target sm_{capability}" in ptx,
            "wide": len(re.findall(WIDE_LOAD, ptx)),
            "bytes": len(re.findall(r"ld\.global\.b8", ptx)),
            "pairs": len(re.findall(r"ld\.global\.b16", ptx)),
            "tensor cores": len(re.findall(TENSOR_CORE, ptx)),
            "spilled": spilled_bytes(ptx) + (".local" in ptx),
        }
    return found


@pytest.fixture(scope="module")
def code():
    return compiled(assembled, TARGETS)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_machine_code(code, target):
    name, rung, *_ = target
    found = code[str(target)]
    assert found["target"]
    assert found["spilled"] == 0
    assert (found["tensor cores"] > 0) == (rung == "gemm")
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
