"""What tests of weight-only formats share: a kernel that only decodes, errors of products, and what
is in compiled code. All of it runs in the child process of `triton_child`."""

from __future__ import annotations

import re
from types import ModuleType

import torch
import triton
import triton.language as tl
from triton_child import TENSOR_CORE, WIDE_LOAD, spilled_bytes

from qlib.kernels.gpu.product import Packed, gemm, gemv, launch, reference
from qlib.qtensor import QTensor


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


def tiles(weight: Packed, block: int = 64) -> torch.Tensor:
    """The weight as the kernels decode it, in tiles of 64 rows and `block` inputs."""
    outputs, inputs = weight.shape
    y = torch.full(weight.shape, 7e7)
    grid = (triton.cdiv(outputs, 64), triton.cdiv(inputs, block))
    tile_kernel[grid](weight.parts, y, outputs, inputs, weight.decode, weight.options, 64, block)
    return y


def flipped(q: QTensor, name: str, bit: int) -> QTensor:
    """`q` with one bit of the last byte of the first element of a part turned over."""
    part = q.parts[name].clone()
    part.view(-1)[:1].view(torch.uint8)[-1] ^= bit
    return QTensor(q.format, q.shape, q.parts | {name: part})


def errors(module: ModuleType, q: QTensor, rung: str, rows: int, flips=()) -> list:
    """[the kernel's error, its error after each flip (part, bit), twice torch's]."""
    x = torch.randn(64, q.shape[1], generator=torch.Generator().manual_seed(1)).half()
    # What is flipped is in the first block of the first row.
    x[0, 0] = 8
    exact = x.double() @ q.dequantize().double().T
    budget = 2 * (reference(x, q) - exact).abs().max().item()
    x, exact = x[:rows], exact[:rows]

    def error(q: QTensor) -> float:
        y = {"gemv": gemv, "gemm": gemm}[rung](x, module.packed(q))
        return (y - exact).abs().max().item()

    return [error(q), [error(flipped(q, *flip)) for flip in flips], budget]


def facts(module: ModuleType, q: QTensor, rung: str, rows: int, dtype: str, capability: int):
    """What is in the code of `rung` for `rows` rows of activations."""
    x = torch.zeros(rows, q.shape[1], dtype=getattr(torch, dtype))
    ptx = launch(rung, x, module.packed(q))[0].compiled(capability)["ptx"]
    return {
        "wide": len(re.findall(WIDE_LOAD, ptx)),
        "tensor core": bool(re.search(TENSOR_CORE, ptx)),
        "spilled": spilled_bytes(ptx),
        "local": ".local" in ptx,
        "ftz": ".ftz" in ptx,
        "pairs": len(re.findall(r"ld\.global\.b64|cp\.async\.ca\.shared\.global[^;]*0x8, ", ptx)),
        "fp8": bool(re.search(r"e4m3x2|e5m2x2", ptx)),
    }
