"""What `bench_gpu` measures: one Contestant for each way to compute one result.

A large weight is a slab of 128 rows, quantized on the CPU and repeated: its bytes lie at different
addresses, as those of any weight do, and one product of the slab in float64 tells what every
output has to be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

import qlib
from qlib.kernels import measure
from qlib.kernels.gpu import encode, hadamard, product, scaled, w8a8
from qlib.qtensor import QTensor

SLAB = 128
# Rows of activations, first and last, whose results are compared.
CHECKED = 32
MODULES = ("integer", "codebook", "minifloat", "ggml", "ternary")


class NotHere(Exception):
    """What a GPU of this architecture does not have."""


@dataclass(frozen=True)
class Setting:
    """Where and with what activations; without a GPU, kernels run in Triton's interpreter."""

    device: str
    dtype: torch.dtype
    capability: int

    def randn(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(shape, generator=generator).to(self.device, self.dtype)

    def copies(self, nbytes: int) -> int:
        """How many operands of so many bytes take turns."""
        return 2 if self.device == "cpu" else measure.copies(nbytes, self.device)


@dataclass(frozen=True)
class Contestant:
    """`call(operand)` computes the result; `operands` are so many that no cache holds them.

    Args:
        nbytes: what has to be read and written at least.
        error: the largest error of a result as a share of what is allowed.
    """

    name: str
    kernel: str
    call: Callable[[Any], Any]
    operands: list
    nbytes: int
    error: Callable[[Any], float]


def slab(outputs: int, inputs: int) -> Tensor:
    """Rows of which a weight [outputs, inputs] is made, float32."""
    return _slab(math.gcd(outputs, SLAB), inputs)


@lru_cache(maxsize=8)
def _slab(rows: int, inputs: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(0))


def _quantized_slab(name: str, outputs: int, inputs: int) -> QTensor:
    return _quantized(name, math.gcd(outputs, SLAB), inputs)


@lru_cache(maxsize=128)
def _quantized(name: str, rows: int, inputs: int) -> QTensor:
    return qlib.quantize(_slab(rows, inputs), name)


def weight(name: str, outputs: int, inputs: int, device: str) -> QTensor:
    """A weight in a format whose rows are independent, on `device`."""
    q = _quantized_slab(name, outputs, inputs)
    parts = {}
    for part, (_, size) in q.format.layout((outputs, inputs)).items():
        stored = q.parts[part].to(device)
        parts[part] = stored.repeat(size[0] // len(stored), 1)
    return QTensor(q.format, (outputs, inputs), parts)


def copied(q: QTensor) -> QTensor:
    return QTensor(q.format, q.shape, {name: part.clone() for name, part in q.parts.items()})


def copies(q: QTensor, setting: Setting) -> list[QTensor]:
    return [copied(q) for _ in range(setting.copies(q.nbytes))]


def check(x: Tensor, values: Tensor, dtype: torch.dtype) -> Callable[[Tensor], float]:
    """The error of x @ weight.T as a share of twice torch's own, where `values` is the slab."""
    some = torch.cat((x[:CHECKED], x[-CHECKED:])).float()
    values = values.to(x.device)
    exact = some.double() @ values.double().T
    own = some.to(dtype) @ values.to(dtype).T
    budget = 2 * (own - exact).abs().max()

    def error(y: Tensor) -> float:
        ends = torch.cat((y[:CHECKED], y[-CHECKED:])).double().unflatten(1, (-1, len(values)))
        return ((ends - exact[:, None]).abs().max() / budget).item()

    return error


def traffic(stored: int, x: Tensor, outputs: int) -> int:
    """Bytes of a weight, of activations and of the result."""
    return stored + x.nbytes + len(x) * outputs * x.element_size()


def dense(setting: Setting, outputs: int, inputs: int, rows: int) -> Contestant:
    """cuBLAS at full width: what all products are compared with."""
    values = slab(outputs, inputs).to(setting.device, setting.dtype)
    full = values.repeat(outputs // len(values), 1)
    x = setting.randn(rows, inputs)
    operands = [full.clone() for _ in range(setting.copies(full.nbytes))]
    error = check(x, values.float(), setting.dtype)
    size = traffic(full.nbytes, x, outputs)
    return Contestant("bf16", "torch.mm", lambda w: torch.mm(x, w.T), operands, size, error)


def module_of(q: QTensor) -> str:
    """The file of kernels in `kernels.gpu` that takes `q`. Raises ValueError with all reasons."""
    reasons = {}
    for name in MODULES:
        reasons[name] = import_module(f"qlib.kernels.gpu.{name}").why_not(q)
        if reasons[name] is None:
            return name
    raise ValueError(f"no kernel for {q.format}: {reasons}")


def weight_only(setting: Setting, name: str, outputs: int, inputs: int, rows: int) -> Contestant:
    """What `kernels.matmul` runs for a format."""
    q, x = weight(name, outputs, inputs, setting.device), setting.randn(rows, inputs)
    which, rung = module_of(q), "gemv" if rows == 1 else "gemm"
    module, operands = import_module(f"qlib.kernels.gpu.{which}"), copies(q, setting)
    # A file has rungs of its own, or says only how its weights are packed.
    own = hasattr(module, rung)
    operands = operands if own else list(map(module.packed, operands))
    error = check(x, _quantized_slab(name, outputs, inputs).dequantize(), setting.dtype)
    call = partial(getattr(module if own else product, rung), x)
    size = traffic(q.nbytes, x, outputs)
    return Contestant(name, f"gpu.{which}.{rung}", call, operands, size, error)


def eight_bits(
    setting: Setting, name: str, outputs: int, inputs: int, rows: int, alone: bool = False
) -> Contestant:
    """Activations and weights in eight bits; `alone` leaves out the rounding of activations."""
    q, x = weight(name, outputs, inputs, setting.device), setting.randn(rows, inputs)
    rounded = encode.encode(x, q.format)
    if reason := w8a8.why_not(rounded, q, setting.capability):
        raise NotHere(reason)
    values = _quantized_slab(name, outputs, inputs).dequantize()
    error = check(rounded.dequantize(), values, setting.dtype)
    title, size = f"w8a8 {name}", traffic(q.nbytes, x, outputs)
    call, kernel = partial(w8a8.w8a8, x), "gpu.w8a8.w8a8"
    if alone:
        call = partial(w8a8.scaled_product, rounded, dtype=setting.dtype)
        title, kernel = f"{title}, x rounded before", "gpu.w8a8.scaled_product"
    return Contestant(title, kernel, call, copies(q, setting), size, error)


def microscaled(setting: Setting, name: str, outputs: int, inputs: int, rows: int) -> Contestant:
    """Activations and weights both in a microscaling format; activations are rounded before."""
    q, x = weight(name, outputs, inputs, setting.device), setting.randn(rows, inputs)
    rounded = encode.encode(x, q.format)
    if reason := scaled.why_not(rounded, q, setting.capability):
        raise NotHere(reason)

    def call(w: QTensor) -> Tensor:
        launched, y = scaled.launch(rounded, w, setting.capability)
        launched.run()
        return y

    values = _quantized_slab(name, outputs, inputs).dequantize()
    error = check(rounded.dequantize(), values, setting.dtype)
    size, operands = traffic(q.nbytes, x, outputs), copies(q, setting)
    return Contestant(f"{name} x {name}", "gpu.scaled", call, operands, size, error)


def quantizer(setting: Setting, name: str, rows: int, inputs: int) -> Contestant:
    """Activations to a format, compared with the CPU bit for bit: any difference is too much."""
    x, format = setting.randn(rows, inputs), qlib.format(name)
    expected = qlib.quantize(x.cpu().float(), format)

    def error(q: QTensor) -> float:
        same = (torch.equal(q.parts[part].cpu(), bits) for part, bits in expected.parts.items())
        return 0.0 if all(same) else 2.0

    operands = [x.clone() for _ in range(setting.copies(x.nbytes))]
    call, size = partial(_encode, format), x.nbytes + expected.nbytes
    return Contestant(f"encode {name}", "gpu.encode", call, operands, size, error)


def _encode(format, x: Tensor) -> QTensor:
    return encode.encode(x, format)


def rotation(setting: Setting, rows: int, size: int) -> Contestant:
    """The fast Hadamard transform of rows of so many numbers."""
    x = setting.randn(rows, size)
    exact = hadamard.reference(x[:CHECKED].double())
    budget = 2 * (hadamard.reference(x[:CHECKED]) - exact).abs().max()

    def error(y: Tensor) -> float:
        return ((y[:CHECKED] - exact).abs().max() / budget).item()

    operands = [x.clone() for _ in range(setting.copies(x.nbytes))]
    call = hadamard.hadamard
    return Contestant(f"hadamard {size}", "gpu.hadamard", call, operands, 2 * x.nbytes, error)
