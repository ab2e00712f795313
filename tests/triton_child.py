"""Triton kernels without a GPU: run by the interpreter, or compiled ahead of time.

Triton reads TRITON_INTERPRET when it is imported, so both need a process of their own: `call` runs
a function of a test module in one, and brings back what it returns.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHILD = """if True:
    import importlib, json, sys
    sys.path.insert(0, sys.argv[1])
    function = getattr(importlib.import_module(sys.argv[2]), sys.argv[3])
    print(json.dumps(function(*json.loads(sys.argv[4]))))"""
CAPABILITIES = (75, 80, 89, 90, 100, 120)
# 16 bytes of one thread in one load.
WIDE_LOAD = r"ld\.global\.v4\.b32|cp\.async\.cg\.shared\.global"
TENSOR_CORE = r"mma\.sync\.aligned|wgmma\.mma_async|tcgen05\.mma"


def interpreted(function: Callable, *arguments) -> Any:
    """What `function` returns under Triton's interpreter. Arguments and result are JSON."""
    return _call(function, arguments, {"TRITON_INTERPRET": "1"})


def compiled(function: Callable, *arguments) -> Any:
    """What `function` returns where Triton compiles, with an empty cache: today's source."""
    with tempfile.TemporaryDirectory() as cache:
        return _call(function, arguments, {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache})


def _call(function: Callable, arguments: tuple, environment: dict[str, str]) -> Any:
    where = [str(Path(__file__).parent), function.__module__, function.__name__]
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *where, json.dumps(arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return json.loads(run.stdout)


def facts(code: dict[str, Any], **patterns: str) -> dict:
    """How often each pattern stands in the PTX of what `Launch.compiled` returns, and three more.

    These are how many loads are "wide", the names of the products on "tensor cores", and the bytes
    of a thread's "stack", where registers spill.
    """
    ptx = code["ptx"]
    found = {name: len(re.findall(pattern, ptx)) for name, pattern in patterns.items()}
    return found | {
        "wide": len(re.findall(WIDE_LOAD, ptx)),
        "tensor cores": sorted(set(re.findall(rf"(?:{TENSOR_CORE})[\w.:]*", ptx))),
        "stack": stack_bytes(code["cubin"]),
    }


def stack_bytes(cubin: bytes) -> int:
    """Bytes of local memory that machine code uses for each thread."""
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [program, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+).* LOCAL:(\d+)", report).groups()
    return int(stack) + int(local)
