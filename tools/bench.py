"""Speed as a ratio to a peer measured in the same run: `make bench`.

Round-to-nearest of a 4096 x 4096 Gaussian matrix by qlib, bitsandbytes and optimum-quanto, with
the same number of threads; then the four-bit floats, one thread, to codes and back, beside
bitsandbytes (NF4) and torchao (MXFP4, NVFP4). Calls are interleaved and each contestant's fastest
one counts, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch

import qlib
from qlib.kernels.measure import fastest


def contestants(weight: torch.Tensor, group: int) -> dict[str, Callable[[], object]]:
    """Name -> a call that quantizes `weight` to 4 bits in groups of `group`."""
    import bitsandbytes.functional as bnb
    from optimum.quanto import MaxOptimizer, qint4
    from optimum.quanto.tensor import quantize_weight

    def quanto():
        scale, shift = MaxOptimizer()(weight, qtype=qint4, axis=0, group_size=group)
        return quantize_weight(weight, qint4, 0, scale, shift, group_size=group)

    nf4 = qlib.Scheme(qlib.format("nf4").grid, group, qlib.format("nf4").fit, torch.float32)
    return {
        "qlib int4 symmetric": lambda: qlib.quantize(weight, f"int4-g{group}"),
        "qlib int4 asymmetric": lambda: qlib.quantize(weight, f"int4-g{group}-asym"),
        "qlib nf4": lambda: qlib.quantize(weight, nf4),
        "bitsandbytes nf4": lambda: bnb.quantize_4bit(weight, blocksize=group, quant_type="nf4"),
        "quanto qint4": quanto,
    }


def four_bit_floats(weight: torch.Tensor) -> dict[str, tuple[Callable, Callable]]:
    """Name -> (qlib's call, its peer's) that encodes `weight` or decodes what was encoded."""
    import bitsandbytes.functional as bnb
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    def nf4():
        return bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    def mxfp4():
        return MXTensor.to_mx(weight, torch.float4_e2m1fn_x2, 32)

    def nvfp4():
        return NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=weight.abs().max() / 2688)

    calls = {}
    for name, peer in (("nf4", nf4), ("mxfp4", mxfp4), ("nvfp4", nvfp4)):
        ours, theirs = qlib.quantize(weight, name), peer()
        back = partial(bnb.dequantize_4bit, *theirs) if name == "nf4" else theirs.dequantize
        calls[f"{name} encode"] = (partial(qlib.quantize, weight, name), peer)
        calls[f"{name} decode"] = (ours.dequantize, back)
    return calls


def print_four_bit_floats(weight: torch.Tensor, rounds: int) -> None:
    pairs = four_bit_floats(weight)
    calls = {(name, i): call for name, pair in pairs.items() for i, call in enumerate(pair)}
    best = fastest(calls, rounds)
    print("four-bit floats, 4096 x 4096, 1 thread: M weights/s")
    print(f"{'':24}{'qlib':>12}{'peer':>16}{'qlib / peer':>14}")
    for name in pairs:
        ours, theirs = best[name, 0], best[name, 1]
        speeds = [weight.numel() / seconds / 1e6 for seconds in (ours, theirs)]
        print(f"{name:24}{speeds[0]:12.0f}{speeds[1]:16.0f}{theirs / ours:14.2f}")


CAPTURE = {"capture_output": True, "text": True, "check": True}
STARTS = """
import time
start = time.perf_counter(); import torch; torch_there = time.perf_counter()
import qlib; qlib_there = time.perf_counter()
qlib.load("smollm2-135m"); end = time.perf_counter()
print(torch_there - start, qlib_there - torch_there, end - qlib_there)
"""


def print_starts(rounds: int) -> None:
    """Seconds until qlib and then its larger model are there, in a fresh process."""
    runs = [subprocess.run([sys.executable, "-c", STARTS], **CAPTURE) for _ in range(rounds)]
    times = [min(column) for column in zip(*(map(float, run.stdout.split()) for run in runs))]
    for name, seconds in zip(("import torch", "import qlib after it", "load smollm2-135m"), times):
        print(f"{name:24}{seconds:10.2f} s{seconds / times[0]:10.2f} x import torch")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    print_starts(arguments.rounds)
    torch.set_num_threads(arguments.threads)
    weight = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    for group in (128, 32):
        best = fastest(contestants(weight, group), arguments.rounds)
        print(f"round-to-nearest, 4096 x 4096, group {group}, {arguments.threads} threads")
        print(f"{'':24}{'M weights/s':>12}{'/ bitsandbytes':>16}{'/ quanto':>10}")
        for name, seconds in best.items():
            ratios = [best[peer] / seconds for peer in ("bitsandbytes nf4", "quanto qint4")]
            speed = weight.numel() / seconds / 1e6
            print(f"{name:24}{speed:12.0f}{ratios[0]:16.2f}{ratios[1]:10.2f}")
    torch.set_num_threads(1)
    print_four_bit_floats(weight, arguments.rounds)


if __name__ == "__main__":
    main()
