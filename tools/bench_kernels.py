"""Products with packed weights on the CPU, and generation with them: `make bench`.

    .venv/bin/python tools/bench_kernels.py --json            # as measured for the book
    .venv/bin/python tools/bench_kernels.py --size 1024 --rounds 2 --no-generation

Activations of 1, 4, 16 and 512 rows times a 4096 x 4096 weight: torch's own products, ours as
`kernels.matmul` chooses them, and for each of ours the fallback, which dequantizes the weight
first. Of each weight there are so many copies that no cache holds them, and every call takes the
next. Calls are interleaved, six formats at a time beside float32, and the fastest of each counts.

No kernel may be chosen that loses to the fallback: if one does, the exit status is 1. It is 1 too
if a result is further from the exact product than twice torch's own error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import tables
import torch
from torch import Tensor

import qlib
from qlib.kernels import dequantize, dispatch, explain, measure
from qlib.kernels.cpu import ternary
from qlib.qtensor import QTensor

FORMATS = (
    "int4-g128 int4-g128-asym int4-g32 nf4 mxfp4 nvfp4 int8-row int8-g128 q4_k "
    "int2-g128 int3-g128 int6-g128 fp8_e4m3 mxfp8_e4m3 ternary".split()
)
ROWS = (1, 4, 16, 512)
# More rows than these take longer to multiply than their weight to arrive: two copies do.
FEW_ROWS = 64
# The fallback is slow, and compared with what is fast: fewer rounds do.
FALLBACK_ROUNDS = 3
# Formats that race at a time, beside float32: the copies of all would not fit into 16 GB.
AT_ONCE = 6
INT4_GROUP = 128


@dataclass(frozen=True)
class Contestant:
    """One way to multiply: `call(x, operand)` with activations of `dtype`.

    Args:
        operands: copies of the weight, as the call takes it; `nbytes` is the size of one.
        q: what the result is compared with; None for products that are not ours.
    """

    name: str
    kernel: str
    dtype: torch.dtype
    call: Callable[[Tensor, Any], Tensor]
    operands: list
    nbytes: int
    q: QTensor | None = None


def torch_products(weight: Tensor, rows: int) -> Iterator[Contestant]:
    """torch's own: at full width, and its operators for packed weights on this processor."""
    for dtype in (torch.float32, torch.bfloat16):
        dense = _copies(weight.to(dtype), rows)
        yield Contestant(_name(dtype), "torch.matmul", dtype, _matmul, *dense)
    if weight.shape[1] % INT4_GROUP == 0:
        yield _torch_int4(qlib.quantize(weight, f"int4-g{INT4_GROUP}"), rows)
    scale = (weight.abs().amax(1) / 127).bfloat16()
    int8 = (weight / scale.float()[:, None]).round().clamp(-128, 127).to(torch.int8)
    call = partial(_swapped, torch.ops.aten._weight_int8pack_mm, scale)
    operands = _copies(int8, rows)
    yield Contestant("torch int8", "_weight_int8pack_mm", torch.bfloat16, call, *operands)


def _torch_int4(q: QTensor, rows: int) -> Contestant:
    codes = q.format.unpack(q.parts["codes"], q.shape).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale = q.parts["scale"].bfloat16().T.contiguous()
    # (code - 8) * scale + zero
    pairs = torch.stack((scale, torch.zeros_like(scale)), dim=-1).contiguous()
    name, product = "_weight_int4pack_mm_for_cpu", torch.ops.aten._weight_int4pack_mm_for_cpu
    operands, nbytes = _copies(packed, rows)
    call, nbytes = partial(_int4, product, pairs), nbytes + pairs.nbytes
    return Contestant(f"torch int4-g{INT4_GROUP}", name, torch.bfloat16, call, operands, nbytes)


def _int4(product: Callable, pairs: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight, INT4_GROUP, pairs)


def _swapped(product: Callable, scale: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return product(x, weight, scale)


def _matmul(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.T


def _fallback(x: Tensor, product: dispatch.Product) -> Tensor:
    return dequantize.gemm(x, product.q)


def _run(x: Tensor, product: dispatch.Product) -> Tensor:
    return product(x)


def _copies(tensor: Tensor, rows: int) -> tuple[list[Tensor], int]:
    """(tensors with memory of their own, bytes of one)."""
    return [tensor.clone() for _ in range(_count(tensor.nbytes, rows))], tensor.nbytes


def _count(nbytes: int, rows: int) -> int:
    return measure.copies(nbytes) if rows < FEW_ROWS else 2


def our_products(weights: dict[str, QTensor], rows: int) -> Iterator[Contestant]:
    """What `kernels.matmul` runs for each format."""
    for name, q in weights.items():
        x = torch.ones(rows, q.shape[1])
        kernel = explain(x, q).partition(",")[0]
        copies = [_copy(q) for _ in range(_count(q.nbytes, rows))]
        ready = [dispatch.Product(copy) for copy in copies]
        yield Contestant(name, kernel, torch.float32, _run, ready, q.nbytes, q)
        if name == "ternary":
            packed = [ternary.packed(copy) for copy in copies]
            name, kernel = "ternary, added up", "cpu.ternary.additions"
            yield Contestant(name, kernel, x.dtype, ternary.additions, packed, q.nbytes, q)


def _copy(q: QTensor) -> QTensor:
    return QTensor(q.format, q.shape, {name: part.clone() for name, part in q.parts.items()})


def measured(
    weight: Tensor, weights: dict[str, QTensor], rows: int, rounds: int, read: float
) -> list[dict[str, Any]]:
    """Rows of the table for so many rows of activations.

    Args:
        weights: `weight` in each format.
        read: bytes a second that memory gives.
    """
    x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows))
    dense, names, found = [*torch_products(weight, rows)], list(weights), {}
    for first in range(0, len(names), AT_ONCE):
        some = {name: weights[name] for name in names[first : first + AT_ONCE]}
        for row in _race([*dense, *our_products(some, rows)], x, rounds, read):
            found.setdefault(row["name"], row)
        dense = dense[:1]
    return list(found.values())


def _race(found: list[Contestant], x: Tensor, rounds: int, read: float) -> Iterator[dict[str, Any]]:
    """A row of the table for each contestant, in turns; the first is what all are compared with."""
    calls = {c.name: _call(c, c.call, x) for c in found}
    slow = {c.name: _call(c, _fallback, x) for c in found if c.call is _run}
    errors = {c.name: _error(c, x) for c in found}
    least = measure.fastest(calls, rounds)
    fallback = measure.fastest(slow, min(rounds, FALLBACK_ROUNDS))
    for c in found:
        yield {
            "rows": len(x),
            "name": c.name,
            "kernel": c.kernel,
            "ms": least[c.name] * 1e3,
            "bytes": c.nbytes,
            "gb_per_s": c.nbytes / least[c.name] / 1e9,
            "of_read": c.nbytes / least[c.name] / read,
            "to_fp32": least["float32"] / least[c.name],
            "to_fallback": fallback[c.name] / least[c.name] if c.name in fallback else None,
            "error": errors[c.name],
        }


def _call(c: Contestant, call: Callable, x: Tensor) -> Callable[[], object]:
    return measure.in_rotation(partial(call, x.to(c.dtype)), c.operands)


def _error(c: Contestant, x: Tensor) -> float | None:
    """The largest error as a share of what is allowed; None for products that are not ours.

    All operands have their first call here, which may compile or prepare something.
    """
    x = x.to(c.dtype)
    for operand in c.operands:
        y = c.call(x, operand)
    return None if c.q is None else measure.share_of_budget(y, x, c.q.dequantize())


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the products, in words: kernels that lose, and results that are wrong."""
    found = []
    for row in rows:
        what = f"{row['name']}, {row['rows']} rows: {row['kernel']}"
        ratio, error = row["to_fallback"], row["error"]
        if ratio is not None and ratio < 1 and row["kernel"] != "dequantize.gemm":
            found.append(f"{what} loses to dequantize.gemm, {ratio:.2f} times its speed")
        if error is not None and not error <= 1:
            found.append(f"{what} has {error:.2f} times the error that is allowed")
    return found


COLUMNS = {
    "rows": tables.text("rows"),
    "weight": tables.text("name"),
    "kernel": tables.text("kernel"),
    "ms": tables.number("ms", 2),
    "GB/s": tables.number("gb_per_s", 1),
    "of read bandwidth": tables.number("of_read", 0, 100, "%"),
    "x float32": tables.number("to_fp32", 2),
    "x fallback": tables.number("to_fallback", 2),
    "error / allowed": tables.number("error", 2),
}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--size", type=int, default=4096, help="outputs and inputs of the weight")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--no-generation", action="store_true", help="products only")
    parser.add_argument("--json", action="store_true", help="write book/results/kernels_cpu.json")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(options.size, options.size, generator=generator)
    weights = {name: qlib.quantize(weight, name) for name in FORMATS}
    bandwidth = measure.bandwidth()
    header = f"{options.size} x {options.size}, {options.threads} threads"
    print(f"{header}, memory reads {bandwidth['read'] / 1e9:.1f} GB/s\n", flush=True)
    products = []
    for rows in options.rows:
        found = measured(weight, weights, rows, options.rounds, bandwidth["read"])
        print(tables.markdown(found, COLUMNS), flush=True)
        products += found
    generation = []
    if not options.no_generation:
        from bench_generation import COLUMNS as OF_GENERATION
        from bench_generation import generation_rows

        generation = generation_rows(options.threads, options.rounds)
        print("\n" + tables.markdown(generation, OF_GENERATION))
    if options.json:
        content = {"command": "tools/bench_kernels.py --json"}
        content |= tables.environment("torch", "numba", "llvmlite", "xllamacpp")
        content |= {"weight": [options.size] * 2, "bandwidth": bandwidth}
        content |= {"products": products, "generation": generation}
        tables.write(tables.RESULTS / "kernels_cpu.json", content)
    wrong = failures(products)
    print("\n".join(["", *wrong]) if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
