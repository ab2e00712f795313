"""Work on the rows of a weight, shared out among torch's own threads.

torch's threads wait for their next work awake, so that they start at once, and a processor that
they keep busy with waiting is lost to any other thread. So this work goes to them: torch has loaded
OpenMP, and its entry point can be called like any other function. Where there is none by that name
(GNU's, which is Linux), ordinary threads do the work.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import count

import torch

# Less work than this, in weights, is done before another thread has begun.
WORTH_A_THREAD = 1 << 20

_jobs: dict[int, Callable[[int, int], None]] = {}
_numbers = count(1)
# The threads of OpenMP do not survive a fork, and it does not notice: a child works alone.
_alone = False


def by_rows(work: Callable[[int, int], None], rows: int, weights: int) -> None:
    """Call `work(start, stop)` until all `rows` are done; it has to let go of the interpreter.

    Args:
        weights: the size of the whole work, which decides how many threads it is worth.
    """
    threads = max(1, min(torch.get_num_threads(), weights // WORTH_A_THREAD, rows))
    if threads == 1 or _alone:
        work(0, rows)
        return
    bounds = [rows * i // threads for i in range(threads + 1)]
    failures: list[BaseException] = []

    def some(first: int, step: int) -> None:
        try:
            for i in range(first, threads, step):
                work(bounds[i], bounds[i + 1])
        except BaseException as failure:
            failures.append(failure)

    (_in_openmp if _openmp() else _in_a_pool)(some, threads)
    if failures:
        raise failures[0]


def _in_openmp(some: Callable[[int, int], None], threads: int) -> None:
    number = next(_numbers)
    _jobs[number] = some
    _openmp().GOMP_parallel(_enter, number, threads, 0)
    del _jobs[number]


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _enter(number: int) -> None:
    """What every thread of a team runs; there may be fewer of them than asked for."""
    openmp = _openmp()
    _jobs[number](openmp.omp_get_thread_num(), openmp.omp_get_num_threads())


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch has loaded for all, or None."""
    try:
        library = ctypes.CDLL(None)
        library.GOMP_parallel.argtypes = [
            type(_enter),
            ctypes.c_void_p,
            ctypes.c_uint,
            ctypes.c_uint,
        ]
        library.GOMP_parallel.restype = None
        return library if library.omp_get_num_threads() else None
    except (AttributeError, OSError, TypeError):
        return None


def _in_a_pool(some: Callable[[int, int], None], threads: int) -> None:
    others = [_pool().submit(some, i, threads) for i in range(1, threads)]
    some(0, threads)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _forked() -> None:
    global _alone
    _alone = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
