"""Speed of the block formats as a ratio to ggml's C (libgguf) in the same run.

A 4096 x 4096 Gaussian matrix. libgguf starts a thread for each processor that the process may use,
so the process is confined to as many processors as qlib gets threads. Calls are interleaved and the
fastest of each counts.
"""

from __future__ import annotations

import argparse
import json
import os

import libgguf
import numpy as np
import torch

from qlib import ggml
from qlib.kernels.measure import fastest


def measure(name: str, x: np.ndarray, importance, rounds: int) -> dict[str, object]:
    """Millions of weights per second, ours and theirs."""
    block_format = ggml.FORMATS[name]
    kind = block_format.kind.id
    weight = torch.from_numpy(x)
    given = None if importance is None else torch.from_numpy(importance)
    # The first call compiles.
    block_format.quantize(weight[:1], given)
    calls = {
        "qlib": lambda: block_format.quantize(weight, given),
        "libgguf": lambda: libgguf.quantize_rows(x, kind, imatrix=importance),
    }
    best = fastest(calls, rounds)
    speeds = {who: round(x.size / seconds / 1e6, 1) for who, seconds in best.items()}
    ratio = round(best["libgguf"] / best["qlib"], 2)
    return {"format": name, "importance": importance is not None, **speeds, "ratio": ratio}


def shared_formats() -> list[str]:
    """The formats that libgguf writes too."""
    kinds = {name: chosen.kind for name, chosen in ggml.FORMATS.items()}
    return [name for name, kind in kinds.items() if libgguf.row_size(kind.id, kind.block)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("formats", nargs="*", help="default: all that libgguf has")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4096)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.threads])
    torch.set_num_threads(arguments.threads)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((arguments.rows, 4096)).astype(np.float32)
    importance = rng.standard_normal(4096).astype(np.float32) ** 2
    results = []
    print(f"{arguments.rows} x 4096, {arguments.threads} threads, M weights/s")
    print(f"{'format':10}{'importance':>12}{'qlib':>10}{'libgguf':>10}{'ratio':>8}")
    for name in arguments.formats or shared_formats():
        for given in (None, importance)[ggml.FORMATS[name].needs_importance :]:
            row = measure(name, x, given, arguments.rounds)
            results.append(row)
            with_it = "yes" if row["importance"] else "no"
            print(f"{name:10}{with_it:>12}{row['qlib']:>10}{row['libgguf']:>10}{row['ratio']:>8}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
