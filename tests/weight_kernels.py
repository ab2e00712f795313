"""What tests of GPU kernels for weights share: weights and wrong weights, a kernel that only
decodes, and errors of products. Kernels run in the child process of `triton_child`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_child import facts

import qlib
from qlib.kernels.gpu.product import Packed, gemm, gemv, launch, reference
from qlib.qtensor import Format, QTensor

RUNGS = {"gemv": gemv, "gemm": gemm}
# The sides of a layer whose products are compiled.
LAYER = (4096, 4096)


def weight(format: Format | str, outputs: int, inputs: int) -> QTensor:
    """Random numbers, but for a first one that is large, so that a wrong code or scale shows."""
    values = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(0))
    values[0, 0] = 2
    return qlib.quantize(values, format)


def zeros(format: Format | str, *shape: int) -> QTensor:
    """A weight to compile for: zeros in all stored tensors."""
    format = qlib.format(format) if isinstance(format, str) else format
    layout = format.layout(shape).items()
    return QTensor(
        format, shape, {part: torch.zeros(size, dtype=dtype) for part, (dtype, size) in layout}
    )


def flipped(q: QTensor, name: str, mask: int, byte: int | None = None) -> QTensor:
    """`q` with bits of one byte of a part turned over: by default the last of its first element."""
    part = q.parts[name].clone()
    part.view(-1).view(torch.uint8)[part.element_size() - 1 if byte is None else byte] ^= mask
    return QTensor(q.format, q.shape, q.parts | {name: part})


def twins(q: QTensor) -> list[QTensor]:
    """`q` with another high bit of the first code, and of each part of its scale or zero point."""
    others = [part for part in q.parts if part.startswith(("scale", "zero_point"))]
    sign = flipped(q, "codes", 2 ** (q.format.grid.bits - 1))
    return [sign, *(flipped(q, part, 4) for part in others)]


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


def tiles(weight: Packed, rows: int = 64, block: int = 64) -> torch.Tensor:
    """The weight as the kernels decode it, in tiles of `rows` outputs and `block` inputs."""
    outputs, inputs = weight.shape
    y = torch.full(weight.shape, 7e7)
    grid = (triton.cdiv(outputs, rows), triton.cdiv(inputs, block))
    tile_kernel[grid](weight.parts, y, outputs, inputs, weight.decode, weight.options, rows, block)
    return y


Product = Callable[[torch.Tensor, QTensor], torch.Tensor]


def errors(product: Product, q: QTensor, rows: int, twins: list[QTensor] = ()) -> list:
    """[the error of a product with `rows` rows, with each wrong weight, twice torch's own]."""
    x = torch.randn(max(64, rows), q.shape[1], generator=torch.Generator().manual_seed(1)).half()
    # What is wrong in a twin is in the first block of the first row.
    x[0, 0] = 8
    exact = x.double() @ q.dequantize().double().T
    budget = 2 * (reference(x, q) - exact).abs().max().item()
    x, exact = x[:rows], exact[:rows]
    found = [(product(x, weight) - exact).abs().max().item() for weight in (q, *twins)]
    return [found[0], found[1:], budget]


def products_of(module: ModuleType, rung: str) -> Product:
    return lambda x, q: RUNGS[rung](x, module.packed(q))


def both_rungs(module: ModuleType, cases: list, formats: Mapping[str, Format]) -> dict[str, list]:
    """`errors` of both rungs for cases (format, outputs, inputs, rows of activations).

    "gemv" does the same for every row: up to 2 of them.
    """
    found = {}
    for case in cases:
        name, outputs, inputs, rows = case
        q = weight(formats.get(name, name), outputs, inputs)
        for rung, few in {"gemv": min(rows, 2), "gemm": rows}.items():
            found[f"{rung} {case}"] = errors(products_of(module, rung), q, few, twins(q))
    return found


def drawn(
    product: Product, names: list[str], examples: int = 10, sides: int = 90, rows: int = 64
) -> int:
    """How many products of random shapes were within their budgets: all that were tried.

    Outputs and inputs are up to `sides`, rows of activations up to `rows`.
    """
    tried = []

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.sampled_from(names), *2 * [st.integers(1, sides)], st.integers(1, rows))
    def one(name, outputs, inputs, rows):
        error, _, budget = errors(product, weight(name, outputs, inputs), rows)
        assert error <= budget
        tried.append(name)

    one()
    return len(tried)


def layer_facts(
    module: ModuleType, targets: list, formats: Mapping[str, Format], **patterns: str
) -> dict[str, dict]:
    """`facts` of the products with a whole layer.

    Args:
        targets: (format, rung, rows of activations, dtype, capability).
    """
    found = {}
    for target in targets:
        name, rung, rows, dtype, capability = target
        x = torch.zeros(rows, LAYER[1], dtype=getattr(torch, dtype))
        q = zeros(formats.get(name, name), *LAYER)
        launched = launch(rung, x, module.packed(q))[0]
        found[str(target)] = facts(launched.compiled(capability), **patterns)
    return found
