"""A ladder of GPU kernels for 4-bit integer weights and 16-bit activations, in Triton.

1. `reference`: unpack the whole weight to memory, then multiply. Every weight is written and read
   again at full width.
2. `gemv`: each program unpacks a tile of weights in registers and multiplies it by one row of
   activations. Memory sees only packed bytes, but every row of activations reads them all again.
3. `gemm`: the unpacked tile serves many rows of activations, and tensor cores multiply.

All rungs read the stored bytes as they are: two codes to a byte, the lower half first, and value
(code - zero) * scale. They also run without a GPU: in the interpreter, if TRITON_INTERPRET=1 is set
before triton is imported, and `assembly` shows what they compile to.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from qlib.qtensor import QTensor

# Outputs that one program computes. The tile of codes is then OUTPUTS x BLOCK_K / 2 bytes.
OUTPUTS = {"gemv": 32, "gemm": 64}
# Asked for by name, because Triton's default is changing: a * b + c in one rounding.
OPTIONS = {"enable_fp_fusion": True}


def reference(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """Rung 1, in plain torch: what the other rungs have to agree with."""
    return x @ q.dequantize().to(x.dtype).T


def gemv(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """Rung 2: no unpacked weight is ever written; each row of `x` reads all packed bytes.

    Args:
        x: activations on the device of `q`, float16 or bfloat16; the sums are float32.
        q: weight [out, in] of 4-bit integer codes with one scale for the tensor, for a row, or for
            a block of a multiple of 16.
    """
    y = x.new_empty(len(x), q.shape[0])
    grid = (triton.cdiv(q.shape[0], OUTPUTS["gemv"]), len(x))
    with torch.cuda.device_of(x):
        gemv_kernel[grid](*_operands(x, q, y), **_constants(q, OUTPUTS["gemv"]), **OPTIONS)
    return y


def gemm(x: Float[Tensor, "rows in"], q: QTensor) -> Float[Tensor, "rows out"]:
    """Rung 3: a tile of weights is unpacked once for up to 64 rows of `x`. Arguments as `gemv`."""
    y = x.new_empty(len(x), q.shape[0])
    rows = min(64, max(16, triton.next_power_of_2(len(x))))
    grid = (triton.cdiv(q.shape[0], OUTPUTS["gemm"]), triton.cdiv(len(x), rows))
    constants = _constants(q, OUTPUTS["gemm"]) | {"BLOCK_M": rows}
    with torch.cuda.device_of(x):
        gemm_kernel[grid](*_operands(x, q, y), **constants, **OPTIONS)
    return y


@triton.jit
def gemv_kernel(
    x, codes, scale, zero, y, rows, outputs, inputs, row_bytes, scale_stride, zero_stride, block,
    ZERO: tl.constexpr, ASYMMETRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for k in range(0, inputs, BLOCK_K):
        s, z = _scale_and_zero(
            scale, zero, n, outputs, k // block, scale_stride, zero_stride, ZERO, ASYMMETRIC
        )
        low, high = _load_codes(codes, n, outputs, k // 2, row_bytes, BLOCK_K)
        even = k + 2 * tl.arange(0, BLOCK_K // 2)
        x_low = tl.load(x + m * inputs + even, even < inputs, other=0.0).to(tl.float32)
        x_high = tl.load(x + m * inputs + even + 1, even + 1 < inputs, other=0.0).to(tl.float32)
        low = (low.to(tl.float32) - z[:, None]) * x_low[None, :]
        high = (high.to(tl.float32) - z[:, None]) * x_high[None, :]
        total += tl.sum(low + high, axis=1) * s
    tl.store(y + m * outputs + n, total.to(y.dtype.element_ty), n < outputs)


@triton.jit
def gemm_kernel(
    x, codes, scale, zero, y, rows, outputs, inputs, row_bytes, scale_stride, zero_stride, block,
    ZERO: tl.constexpr, ASYMMETRIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inputs, BLOCK_K):
        s, z = _scale_and_zero(
            scale, zero, n, outputs, start // block, scale_stride, zero_stride, ZERO, ASYMMETRIC
        )
        low, high = _load_codes(codes, n, outputs, start // 2, row_bytes, BLOCK_K)
        # code - zero is a small integer, exact in every activation dtype; only the scaled sum is
        # rounded, in float32.
        values = tl.interleave(low.to(tl.float32), high.to(tl.float32)) - z[:, None]
        k = (start + tl.arange(0, BLOCK_K))[None, :]
        inside = (m < rows) & (k < inputs)
        activations = tl.load(x + m.to(tl.int64) * inputs + k, inside, other=0.0)
        weights = tl.trans(values.to(activations.dtype))
        total += tl.dot(activations, weights, input_precision="ieee") * s[None, :]
    at = y + m.to(tl.int64) * outputs + n[None, :]
    tl.store(at, total.to(y.dtype.element_ty), (m < rows) & (n[None, :] < outputs))


@triton.jit
def _load_codes(codes, n, outputs, first_byte, row_bytes, BLOCK_K: tl.constexpr):
    """Lower and upper half of BLOCK_K / 2 bytes of the weight rows `n`, [BLOCK_N, BLOCK_K / 2]."""
    j = first_byte + tl.arange(0, BLOCK_K // 2)
    inside = (n < outputs)[:, None] & (j < row_bytes)[None, :]
    byte = tl.load(codes + n.to(tl.int64)[:, None] * row_bytes + j[None, :], inside, other=0)
    return byte & 15, byte >> 4


@triton.jit
def _scale_and_zero(
    scale, zero, n, outputs, b, scale_stride, zero_stride,
    ZERO: tl.constexpr, ASYMMETRIC: tl.constexpr,
):  # fmt: skip
    """Scale and zero of block `b` of the weight rows `n`, float32 [BLOCK_N]."""
    s = tl.load(scale + n * scale_stride + b, n < outputs, other=0.0).to(tl.float32)
    z = tl.full(n.shape, ZERO, tl.float32)
    if ASYMMETRIC:
        byte = tl.load(zero + n * zero_stride + b // 2, n < outputs, other=0)
        z += (byte >> (b % 2 * 4) & 15).to(tl.float32)
    return s, z


def _operands(x: Tensor, q: QTensor, y: Tensor) -> tuple:
    codes, scale = q.parts["codes"], q.parts["scale"]
    zero = q.parts.get("zero_point", codes)
    # One scale for the whole tensor is the same address for every row.
    strides = (0 if len(part) == 1 else part.shape[1] for part in (scale, zero))
    block = q.format.block if type(q.format.block) is int else q.shape[1]
    tensors = (t.contiguous() for t in (x, codes, scale, zero))
    return (*tensors, y, len(x), *q.shape, codes.shape[1], *strides, block)


def _constants(q: QTensor, outputs: int) -> dict:
    """BLOCK_K never crosses a block, so that every step has one scale per weight row."""
    scheme = q.format
    zero = -scheme.grid.min
    if scheme.offset is not None:
        zero += scheme.offset.min
    whole = type(scheme.block) is not int or scheme.block >= q.shape[1]
    step = 128 if whole else min(128, scheme.block & -scheme.block)
    constants = {"ZERO": zero, "ASYMMETRIC": scheme.offset is not None}
    return constants | {"BLOCK_N": outputs, "BLOCK_K": step}


def assembly(rung: str, capability: int, dtype: str = "fp16", rows: int = 16) -> str:
    """The PTX of a rung ("gemv" or "gemm") for a GPU that need not be there.

    Args:
        rung: "gemv" or "gemm", compiled for asymmetric codes in blocks of 128.
        capability: compute capability times ten: 75, 80, 89, 90, 100, 120.
        dtype: Triton's name of the activation dtype: "fp16" or "bf16".
        rows: rows of activations in one program of the gemm.

    The machine code is made as well, so an instruction that the GPU lacks raises an error.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = {"gemv": gemv_kernel, "gemm": gemm_kernel}[rung]
    constants = {"ZERO": 0.0, "ASYMMETRIC": True, "BLOCK_N": OUTPUTS[rung], "BLOCK_K": 128}
    constants |= {"BLOCK_M": rows} if rung == "gemm" else {}
    pointers = {"x": f"*{dtype}", "codes": "*u8", "scale": "*fp16", "zero": "*u8", "y": f"*{dtype}"}
    types = pointers | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    # What a launch finds out for itself: these addresses and sizes are multiples of 16.
    aligned = [*pointers, "inputs", "row_bytes", "block"]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    target = GPUTarget("cuda", capability, 32)
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=OPTIONS).asm["ptx"]
