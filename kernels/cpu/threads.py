"""Work on the rows of a weight, shared out among torch's own threads.

torch's threads wait for their next work awake, so that they start at once, and a processor that
they keep busy with waiting is lost to any other thread. So this work goes to them: torch has loaded
OpenMP, and its entry point can be called like any other function. Where there is none by that name
(GNU's, which is Linux), ordinary threads do the work. `native` makes what the threads run.
"""

from __future__ import annotations

import ctypes
import os
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from .native import CALL, FAILURES, Argument, kind_of, machine_code, team_code, words

# Less work than this, in operations, is done before another thread has begun: measured with layers
# of 192 to 2,048 rows.
WORTH_A_THREAD = 1 << 17

# The threads of OpenMP do not survive a fork, and it does not notice: a child works alone.
_alone = False


def by_rows(function: Callable, arguments: tuple[Argument, ...], rows: int, work: int) -> None:
    """Call the compiled `function(*arguments, start, stop)` until all `rows` are done.

    Args:
        work: operations in all, such as products, which decide how many threads they are worth.

    Raises RuntimeError if the function raises an exception, whichever it is, and ValueError if a
    tensor is not on the CPU.
    """
    operands = words(*arguments)
    run(machine_code(function, tuple(map(kind_of, arguments))), operands, rows, work)


def run(code: int, arguments: list[int], rows: int, work: int) -> None:
    """`by_rows` of what `machine_code` and `words` have made."""
    if not rows:
        return
    block = array("q", [rows, 0, code, *arguments])
    address, openmp = block.buffer_info()[0], _openmp()
    threads = max(1, min(torch.get_num_threads(), work // WORTH_A_THREAD, rows))
    if threads == 1 or _alone:
        CALL(code)(address, 0, 1)
    elif openmp:
        openmp.GOMP_parallel(_team(), address, threads, 0)
    else:
        list(_pool().map(lambda i: CALL(code)(address, i, threads), range(threads)))
    if block[FAILURES]:
        # Machine code cannot hand over its exception. The kernels' own reason is np.empty.
        raise RuntimeError("a compiled function failed: perhaps there is no memory left")


@cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP that torch has loaded for all, or None."""
    try:
        library = ctypes.CDLL(None)
        address, number = ctypes.c_void_p, ctypes.c_uint
        library.GOMP_parallel.argtypes = [address, address, number, number]
        library.GOMP_parallel.restype = None
        return library if library.omp_get_num_threads() else None
    except (AttributeError, OSError, TypeError):
        return None


@cache
def _team() -> int:
    """What every thread of a team runs; there may be fewer of them than asked for."""
    library = _openmp()
    asked = (library.omp_get_thread_num, library.omp_get_num_threads)
    return team_code(*(ctypes.cast(function, ctypes.c_void_p).value for function in asked))


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count())


def _forked() -> None:
    global _alone
    _alone = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
