"""Which kernel multiplies activations by a quantized weight, and why not a faster one.

The kernels of the device that holds the activations are asked in order; what none of them takes is
dequantized a few rows at a time, and the product left to torch. All of them compute
`x @ q.dequantize().T`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from qlib.qtensor import Format, QTensor

from . import dequantize

# Up to this many rows of activations, unpacking a weight again for every four costs less than
# writing it out once: `make bench` shows both.
CPU_GEMV_ROWS = 8
DTYPES = {"cpu": (torch.float32, torch.float16, torch.bfloat16)}
DTYPES["gpu"] = (torch.float16, torch.bfloat16)


class SlowKernelWarning(UserWarning):
    """A weight has no kernel here, so every product dequantizes it first."""


@dataclass(frozen=True)
class Kernel:
    """A file of kernels: its name in `qlib.kernels`, the formats that it multiplies, and what of
    this machine it lacks, or None."""

    name: str
    formats: str
    missing: str | None

    def __str__(self) -> str:
        status = f"not here: {self.missing}" if self.missing else "available"
        return f"{self.name}: {self.formats} ({status})"


# The weight-only kernels of each device. Codebooks come last of those that look up or compute:
# they would take other grids of 16 values as well.
FORMATS = {
    "gpu.integer": "integers of 2 to 8 bits, act-order too",
    "gpu.minifloat": "small floats: mxfp4, nvfp4, fp8, mxfp8",
    "gpu.codebook": "up to 16 values: nf4, fp4_bnb, lloyd4, learned",
    "gpu.ggml": "ggml's Q4_0, Q8_0, Q4_K, Q5_K, Q6_K and TQ2_0",
    "gpu.ternary": "ternary",
    "cpu.nibbles": "codes of 4 bits: int4, nf4, mxfp4, nvfp4, lloyd4, learned",
    "cpu.bitstream": "codes of 1 to 8 bits: integers, fp8, mxfp8, mxfp6, nf3, lloyd3, learned",
    "cpu.ggml": "ggml's Q4_K, Q6_K and Q8_0",
    "cpu.ternary": "ternary",
}
NEEDS = {"gpu": "triton", "cpu": "numba"}


def available() -> list[Kernel]:
    """All kernels for packed weights, and for each what of this machine it lacks.

    >>> import qlib
    >>> for kernel in qlib.kernels.available():
    ...     print(kernel)                                                       # doctest: +SKIP
    """
    return [Kernel(name, formats, missing(name[:3])) for name, formats in FORMATS.items()]


def missing(device: str) -> str | None:
    """What this machine lacks for kernels on "cpu" or "gpu", or None."""
    if not _installed(NEEDS[device]):
        return f"{NEEDS[device]} is not installed"
    return "no CUDA device" if device == "gpu" and not torch.cuda.is_available() else None


def matmul(x: Float[Tensor, "*batch in"] | QTensor, q: QTensor) -> Float[Tensor, "*batch out"]:
    """The product `x @ q.dequantize().T` in the dtype of `x`, by the fastest kernel that fits.

    Args:
        x: activations, floating point, on the device of `q`; or quantized ones [rows, in], whose
            product with `q` is float32 (`qlib.kernels.activations`).
        q: weight [out, in].

    Raises ValueError if shapes, dtype or devices do not match. Only the fallback has a gradient
    for `x`, so it runs where one is needed. Where it runs for one row, as in decoding, because
    the format has no kernel, a SlowKernelWarning says so once.

    >>> import qlib
    >>> q = qlib.quantize(torch.eye(2), "int8")
    >>> qlib.kernels.matmul(torch.tensor([3.0, 5.0]), q).round()
    tensor([3., 5.])
    """
    if isinstance(x, QTensor):
        from . import activations

        return activations.product(x, q)
    return Product(q)(x)


class Product:
    """`matmul` again and again with the same weight: what depends on it alone is done once.

    Args:
        q: weight [out, in]; its stored tensors must stay as they are.
    """

    def __init__(self, q: QTensor):
        self.q, self._kernels = q, {}

    def __call__(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if x.ndim == 0 or x.shape[-1] != self.q.shape[-1]:
            _check(x, self.q)
        rows = x.reshape(-1, x.shape[-1])
        key = (x.dtype, x.device, _rows_class(len(rows)), _needs_gradient(x))
        kernel = self._kernels.get(key) or self._choose(rows, key)
        return kernel(rows).view(*x.shape[:-1], self.q.shape[0])

    def _choose(self, rows: Tensor, key: tuple) -> Callable[[Tensor], Tensor]:
        _check(rows, self.q)
        why_not = _why_not_any(rows)
        candidates = () if why_not else _candidates(rows, self.q)
        name = next((name for name, reason in candidates if reason is None), None)
        if name is None:
            if why_not is None and len(rows) == 1:
                _warn(self.q.format, rows.device.type)
            return lambda rows: dequantize.gemm(rows, self.q)
        module = _module(name)
        # A file has rungs of its own, or says only how its weights are packed.
        own = hasattr(module, _rung(rows))
        weight = self.q if own else module.packed(self.q)
        rung = getattr(module if own else _module(f"{name[:3]}.product"), _rung(rows))
        self._kernels[key] = kernel = lambda rows: rung(rows, weight)
        return kernel


def explain(x: Float[Tensor, "*batch in"] | QTensor, q: QTensor) -> str:
    """The kernel that `matmul(x, q)` would run, and for each one before it why it does not apply.

    >>> import qlib
    >>> print(qlib.kernels.explain(torch.ones(2, 64), qlib.quantize(torch.ones(8, 64), "int8")))
    cpu.bitstream.gemv, 2 rows of activations
    not gpu: x is on the CPU
    not cpu.nibbles: the grid int8 does not have codes of 4 bits
    """
    if isinstance(x, QTensor):
        from . import activations

        return activations.explain(x, q)
    _check(x, q)
    rows, device = x.reshape(-1, x.shape[-1]), device_of(x.device)
    why_not, chosen, skipped = _why_not_any(rows), "dequantize.gemm", []
    for name, reason in () if why_not else _candidates(rows, q):
        if reason is None:
            chosen = f"{name}.{_rung(rows)}"
            break
        skipped.append(f"not {name}: {reason}")
    other = "not cpu: x is on the GPU" if device == "gpu" else "not gpu: x is on the CPU"
    if device in NEEDS:
        skipped = [other, *([f"not {device}: {why_not}"] if why_not else []), *skipped]
    else:
        skipped = [f"not gpu, not cpu: {why_not}"]
    count = f"{len(rows)} row{'s' * (len(rows) != 1)} of activations"
    return "\n".join([f"{chosen}, {count}", *skipped])


def device_of(device: torch.device) -> str:
    """Whose kernels run there: "cpu", "gpu", or a device that has none."""
    return {"cpu": "cpu", "cuda": "gpu"}.get(device.type, device.type)


def _needs_gradient(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


def _rows_class(rows: int) -> int:
    """Numbers of rows that run the same kernel have the same class, on every device."""
    return min(rows, CPU_GEMV_ROWS + 1)


def _rung(rows: Tensor) -> str:
    return (
        "gemv" if len(rows) <= (1 if device_of(rows.device) == "gpu" else CPU_GEMV_ROWS) else "gemm"
    )


def _candidates(rows: Tensor, q: QTensor) -> Iterator[tuple[str, str | None]]:
    """(name, why it does not take `q`) of the kernels on the device of the activations."""
    for name in FORMATS:
        if name.startswith(device_of(rows.device)):
            yield name, _module(name).why_not(q)


def _why_not_any(rows: Tensor) -> str | None:
    """Why no kernel of the device of the activations takes them, whatever the weight."""
    device = device_of(rows.device)
    if device not in NEEDS:
        return f"x is on {rows.device}"
    if not _installed(NEEDS[device]):
        return f"{NEEDS[device]} is not installed"
    if rows.dtype not in DTYPES[device]:
        *most, last = map(_name, DTYPES[device])
        return f"x is {_name(rows.dtype)}, they take {', '.join(most)} or {last}"
    if _needs_gradient(rows):
        return "x needs a gradient"
    if device == "gpu" and len(rows) > 1:
        major, minor = torch.cuda.get_device_capability(rows.device)
        # Triton would compile the product for older ones without tensor cores.
        if major < 8:
            return f"the product needs tensor cores of cc 8.0, this is {major}.{minor}"
    return None if len(rows) else "x has no rows"


@cache
def _module(name: str):
    return import_module(f".{name}", __package__)


@lru_cache(maxsize=256)
def _warn(format: Format, device: str) -> None:
    message = f"no kernel on {device} for {format}: every product dequantizes the weight first"
    hint = "qlib.kernels.explain(x, q) says why, qlib.kernels.available() what there is"
    warnings.warn(f"{message}; {hint}", SlowKernelWarning, stacklevel=5)


def _check(x: Tensor, q: QTensor) -> None:
    shape = list(q.shape)
    if len(shape) != 2:
        raise ValueError(f"matmul: weight is {shape}, need [out, in]")
    if x.ndim == 0 or x.shape[-1] != shape[1]:
        features = f"{x.shape[-1]} input features" if x.ndim else "no dimensions"
        raise ValueError(f"matmul: x has {features}, weight is {shape}")
    if not x.is_floating_point():
        raise ValueError(f"matmul: x is {_name(x.dtype)}, need floating point")
    check_parts(q, x.device)


def check_parts(q: QTensor, device: torch.device) -> None:
    """Raise ValueError unless `q` has exactly the stored tensors of its format, on that device."""
    shape, layout = list(q.shape), _layout(q.format, tuple(q.shape))
    if q.parts.keys() != layout.keys():
        have, need = sorted(q.parts), sorted(layout)
        raise ValueError(f"matmul: a weight of {shape} has the parts {need}, got {have}")
    for name, (dtype, size) in layout.items():
        part = q.parts[name]
        # Compiled code checks no bounds: a part of another size must not reach it.
        if part.dtype != dtype or part.shape != size:
            stored, need = f"{_name(part.dtype)} {list(part.shape)}", f"{_name(dtype)} {list(size)}"
            raise ValueError(f"matmul: {name} is {stored}, a weight of {shape} has {need}")
        if part.device != device:
            raise ValueError(f"matmul: x is on {device}, {name} is on {part.device}")


@lru_cache(maxsize=256)
def _layout(format: Format, shape: tuple[int, ...]) -> dict:
    return format.layout(shape)


@cache
def _installed(name: str) -> bool:
    return find_spec(name) is not None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
