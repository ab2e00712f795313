"""One token of generation at a long context: append to the KV cache, then attend. `make bench`.

    .venv/bin/python tools/bench_attention.py --json            # as measured for the book
    .venv/bin/python tools/bench_attention.py --context 1024 --rounds 5

Each cache holds the keys and values of one layer, which stay in the processor's own cache: that
favors those with more bytes. Queries are float32, as a model on a CPU computes. A cache of 16 bits
has two ways: torch attends in its dtype, or it is converted first, and the faster one counts.
"Before" is the same cache if it dequantizes the whole past. Calls are interleaved, and the fastest
of each counts.

The exit status is 1 if a cache of 4 bits is slower than one of 16, if the kernel is slower than
without it, or if an error is more than twice that of torch's float32 attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import tables
import torch
from torch import Tensor

from qlib.cache import QuantizedCache, attention, direct
from qlib.kernels import measure

# Query heads, key and value heads, head_dim.
SHAPES = {"SmolLM2-135M": (9, 3, 64), "Llama-3-8B": (32, 8, 128)}
CACHES = "f16 bf16 f32 int4 int4-hadamard kivi4 int8".split()
FOUR, SIXTEEN = ("int4", "int4-hadamard", "kivi4"), ("f16", "bf16")
DENSE = (*SIXTEEN, "f32")
# What dequantizes is slow, and compared with what is fast: fewer rounds do.
BEFORE_ROUNDS = 5
Call = Callable[[], Tensor]


def measured(model: str, context: int, rounds: int) -> list[dict[str, Any]]:
    """Rows of the table for the shape of one model's layer."""
    heads, groups, dim = SHAPES[model]
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    past, new = normal(2, 1, groups, context, dim), normal(2, 1, groups, 1, dim)
    q = normal(1, heads, 1, dim)
    caches = {name: _filled(name, *past) for name in CACHES}
    ways = {key: call for name in CACHES for key, call in _ways(name, caches[name], q, new).items()}
    before = {name: _before(caches[name], q, new) for name in CACHES if name not in DENSE}
    errors = {name: _error(caches[name], q) for name in before}
    best = measure.fastest(ways, rounds)
    slow = measure.fastest(before, min(rounds, BEFORE_ROUNDS))
    found = []
    for name in CACHES:
        seconds, way = min((best[key], key[1]) for key in ways if key[0] == name)
        row = {"model": model, "cache": name, "way": way, "ms": seconds * 1e3}
        row |= {"bytes_per_token": caches[name].bytes_per_token}
        row |= {"before_ms": slow[name] * 1e3 if name in slow else None, "error": errors.get(name)}
        found.append(row)
    sixteen = min(row["ms"] for row in found if row["cache"] in SIXTEEN)
    return [row | {"to_16_bit": sixteen / row["ms"]} for row in found]


def _filled(name: str, k: Tensor, v: Tensor) -> QuantizedCache:
    cache = QuantizedCache(name)
    cache.update(k, v, layer=0)
    return cache


def _ways(name: str, cache: QuantizedCache, q: Tensor, new: Tensor) -> dict[tuple, Call]:
    """The ways to append a token and to attend, by (cache, way)."""
    if name not in DENSE:
        return {(name, "packed"): partial(cache.attend, q, *new, 0)}
    found = {}
    for dtype in (torch.float32, cache.format.dtype):
        way = str(dtype).removeprefix("torch.")
        found[name, way] = partial(_in_dtype, cache, dtype, q, new)
    return found


def _in_dtype(cache: QuantizedCache, dtype: torch.dtype, q: Tensor, new: Tensor) -> Tensor:
    return cache.attend(q.to(dtype), *new.to(dtype), 0).float()


def _before(cache: QuantizedCache, q: Tensor, new: Tensor) -> Call:
    def call() -> Tensor:
        with mock.patch.object(direct, "why_not", return_value="to compare"):
            return cache.attend(q, *new, 0)

    return call


def _error(cache: QuantizedCache, q: Tensor) -> float:
    """The largest error as a share of twice that of torch, on what the cache holds."""
    keys, values = (store.read().float() for store in cache.stores[0])
    exact = attention(q.double(), keys.double(), values.double())
    own = (direct.attend(q, *cache.stores[0]) - exact).abs().max()
    return (own / (2 * (attention(q, keys, values) - exact).abs().max())).item()


def failures(rows: list[dict[str, Any]]) -> list[str]:
    """What is wrong, in words."""
    found = []
    for row in rows:
        what = f"{row['model']}, {row['cache']}"
        if row["cache"] in FOUR and row["to_16_bit"] < 1:
            found.append(f"{what} is slower than 16 bits, {row['to_16_bit']:.2f} times its speed")
        if row["before_ms"] is not None and row["before_ms"] < row["ms"]:
            found.append(f"{what} is slower than if it is dequantized")
        if row["error"] is not None and not row["error"] <= 1:
            found.append(f"{what} has {row['error']:.2f} times the error that is allowed")
    return found


COLUMNS = {
    "layer of": tables.text("model"),
    "cache": tables.text("cache"),
    "attends to": tables.text("way"),
    "bytes per token": tables.number("bytes_per_token", 0),
    "ms": tables.number("ms", 2),
    "before, ms": tables.number("before_ms", 2),
    "x 16 bits": tables.number("to_16_bit", 2),
    "error / allowed": tables.number("error", 2),
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--context", type=int, default=8192, help="tokens of the past")
    parser.add_argument("--json", action="store_true", help="write book/results/attention_cpu.json")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    torch.set_num_threads(options.threads)
    print(f"{options.context} tokens, {options.threads} threads\n", flush=True)
    rows = []
    for model in SHAPES:
        found = measured(model, options.context, options.rounds)
        print(tables.markdown(found, COLUMNS), flush=True)
        rows += found
    if options.json:
        content = {"command": "tools/bench_attention.py --json"}
        content |= tables.environment("torch", "numba", "llvmlite")
        content |= {"context": options.context, "shapes": SHAPES, "rows": rows}
        tables.write(tables.RESULTS / "attention_cpu.json", content)
    wrong = failures(rows)
    print("\n".join(["", *wrong]) if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
