"""How fast a call is, and what the memory allows: measured in one run, side by side.

The least of several times counts, since whatever else the machine does only adds to one. A weight
that is multiplied again and again stays in a cache, but one layer of many does not: `in_rotation`
takes another copy every time, so many that together no cache holds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Bytes to read for a bandwidth, unless the last-level cache might hold that many.
BYTES = 1 << 28
# A GPU's times cover at least so many seconds, so that a launch does not count.
SPAN = 4e-3
# Calls of a graph. The time of one by itself says little if it is less than SLOW: Python's.
CALLS, SLOW = 64, 5e-4


def fastest(calls: dict[Any, Callable[[], object]], rounds: int = 7) -> dict[Any, float]:
    """Seconds of each call's fastest round; the rounds are interleaved.

    A machine that is busy for a while slows all of them alike, and the least of the times is the
    one that was disturbed least. Waits for the GPU where there is one.
    """
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            best[name] = min(best[name], _seconds(call))
    return best


def replayed(calls: dict[Any, Callable[[], object]], rounds: int = 5) -> dict[Any, float]:
    """Seconds of each call on the GPU alone: what Python and a launch cost is left out.

    A CUDA graph holds many calls, one after the other, and is replayed between two events. The
    rounds are interleaved, and the least of the times counts. A call must not wait for the GPU.
    """
    graphs = {name: _captured(call) for name, call in calls.items()}
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, (graph, count) in graphs.items():
            best[name] = min(best[name], _per_replay(graph) / count)
    return best


def in_rotation(call: Callable[[Any], object], operands: Sequence[Any]) -> Callable[[], object]:
    """A call that takes the next of `operands` every time, so that caches do not know it yet."""
    turn = cycle(operands)
    return lambda: call(next(turn))


def copies(size: int, device: str | torch.device = "cpu") -> int:
    """How many operands of `size` bytes are twice what a cache could hold, so that it has none."""
    return 2 + 2 * cache_size(device) // size


def cache_size(device: str | torch.device = "cpu") -> int:
    """Bytes of the last cache before memory; 64 MiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(file.read_text().strip("K\n")) << 10 for file in files), default=1 << 26)


def bandwidth(device: str | torch.device = "cpu", rounds: int = 7) -> dict[str, float]:
    """Bytes per second of memory: "read" (a sum) and "copy" (what is read plus what is written)."""
    on_gpu = torch.device(device).type == "cuda"
    size = max(BYTES, (8 if on_gpu else 2) * cache_size(device))
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    calls = {"read": source.sum, "copy": lambda: target.copy_(source)}
    best = (replayed if on_gpu else fastest)(calls, rounds)
    size = source.numel() * 4
    return {"read": size / best["read"], "copy": 2 * size / best["copy"]}


def share_of_budget(
    y: Float[Tensor, "rows out"], x: Float[Tensor, "rows in"], weight: Float[Tensor, "out in"]
) -> float:
    """The largest error of `y` over twice that of torch's own product in the dtype of `x`.

    Both are errors against the product in float64; at most 1 is right. torch adds up in another
    order if the two factors change places: the larger of the two errors counts.
    """
    exact, weight = x.double() @ weight.double().T, weight.to(x.dtype)
    both = (x @ weight.T, (weight @ x.T).T)
    theirs = max((own - exact).abs().max().item() for own in both)
    return (y - exact).abs().max().item() / (2 * theirs)


def _captured(call: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of calls, and how many: CALLS, or fewer that take SPAN together."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    # What a first call compiles or allocates for good cannot be captured.
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
        seconds = _seconds(call)
    torch.cuda.current_stream().wait_stream(side)
    count = max(1, min(CALLS, int(SPAN / seconds))) if seconds > SLOW else CALLS
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    return graph, count


def _per_replay(graph: torch.cuda.CUDAGraph) -> float:
    """Seconds of a replay. One that nobody times comes first: while it runs, the others queue."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    count, seconds = 1, 0.0
    while seconds < SPAN:
        graph.replay()
        start.record()
        for _ in range(count):
            graph.replay()
        stop.record()
        stop.synchronize()
        seconds = start.elapsed_time(stop) / 1e3
        average, count = seconds / count, 2 * max(count, int(count * SPAN / max(seconds, 1e-6)))
    return average


def _seconds(call: Callable[[], object]) -> float:
    _wait()
    start = time.perf_counter()
    call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
