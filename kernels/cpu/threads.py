"""Work on the rows of a weight, shared out among as many threads as torch uses."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

# Less work than this, in weights, is done before another thread has woken up.
WORTH_A_THREAD = 1 << 19


def by_rows(work: Callable[[int, int], None], rows: int, weights: int) -> None:
    """Call `work(start, stop)` until all `rows` are done; it has to let go of the interpreter.

    Args:
        weights: the size of the whole work, which decides how many threads are worth waking.
    """
    threads = max(1, min(torch.get_num_threads(), weights // WORTH_A_THREAD, rows))
    bounds = [rows * i // threads for i in range(threads + 1)]
    others = [_pool().submit(work, *part) for part in zip(bounds[1:-1], bounds[2:])]
    work(0, bounds[1])
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


# Threads do not survive a fork: the child makes its own.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)
