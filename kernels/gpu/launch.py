"""Launch: a Triton kernel with its arguments, to be run here or compiled for another GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

# Asked for by name, because Triton's default is changing: a * b + c in one rounding.
FUSED = {"enable_fp_fusion": True}
TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
}


@dataclass(frozen=True)
class Launch:
    """One call of a kernel, ready to go.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis.
        args: its run-time arguments in order: tensors, numbers, and tuples of them.
        constants: its `tl.constexpr` arguments by name.
        options: num_warps, num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    args: tuple
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)

    def run(self) -> None:
        """Start the kernel on the device of its first tensor."""
        with torch.cuda.device_of(next(a for a in self.args if isinstance(a, Tensor))):
            self.kernel[self.grid](*self.args, **self.constants, **self.options, **FUSED)

    def compiled(self, capability: int) -> dict[str, Any]:
        """What Triton makes of it for a GPU that need not be there: "ttgir", "ptx", "cubin".

        Args:
            capability: compute capability times ten: 75, 80, 89, 90, 100, 120.

        The machine code is made as well, so an instruction that the GPU lacks raises an error.
        """
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature = dict(zip(self.kernel.arg_names, map(_type, self.args)))
        signature |= dict.fromkeys(self.constants, "constexpr")
        signature = {name: signature[name] for name in self.kernel.arg_names}
        aligned = {path: [["tt.divisibility", 16]] for path in _aligned(self.args)}
        source = ASTSource(self.kernel, signature, self.constants, aligned)
        target, options = GPUTarget("cuda", capability, 32), self.options | FUSED
        return triton.compile(source, target=target, options=options).asm


def _type(argument: Any) -> Any:
    if isinstance(argument, tuple):
        return tuple(map(_type, argument))
    if isinstance(argument, Tensor):
        return f"*{TYPES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def _aligned(arguments: tuple, prefix: tuple = ()):
    """Paths of what a launch finds to be a multiple of 16: addresses and sizes."""
    for i, argument in enumerate(arguments):
        if isinstance(argument, tuple):
            yield from _aligned(argument, (*prefix, i))
        elif isinstance(argument, Tensor) or (type(argument) is int and argument % 16 == 0):
            yield (*prefix, i)
