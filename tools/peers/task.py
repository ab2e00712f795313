"""What every runner shares: the task it is given, the clock, and what it leaves behind.

A runner is called with the path of a task.json and writes, beside it, result.json and
weights.safetensors: all tensors of the quantized model, dequantized to float32.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file, save_file

PATH = Path(sys.argv[1])
TASK = json.loads(PATH.read_text())
MEBIBYTE = 1 << 20
STATUS = Path("/proc/self/status")


def windows() -> torch.Tensor:
    """The calibration tokens, [windows, time]."""
    return load_file(TASK["windows.safetensors"])["tokens"]


def matrix() -> torch.Tensor | None:
    """A square Gaussian matrix, where the task is about speed alone."""
    size = TASK.get("matrix")
    return size and torch.randn(size, size, generator=torch.Generator().manual_seed(0))


def hf_model():
    """The model as an ordinary Hugging Face model in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TASK["model"], dtype=torch.float32).eval()


class Clock:
    """Wall and processor seconds of the `with` block; resident memory before it, and its peak."""

    def __enter__(self) -> Clock:
        self.loaded = psutil.Process().memory_info().rss / MEBIBYTE
        if STATUS.exists():
            # Forget the peak of imports and loading.
            STATUS.with_name("clear_refs").write_text("5")
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        self.peak = peak() / MEBIBYTE


def peak() -> int:
    """Bytes. On Linux, getrusage would count those of the parent process too."""
    if STATUS.exists():
        line = next(x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def finish(tensors: dict[str, torch.Tensor], clock: Clock, stores: str, *packages: str) -> None:
    """Write the weights and the measurements.

    Args:
        tensors: the whole state dict of the model; "<layer>.g_idx" [in] says which group an input
            channel belongs to, where groups are not consecutive channels.
        stores: how this tool keeps scales and zero points, in words.
        packages: whose versions go into the result.
    """
    kept = {
        name: (t.detach().float() if t.is_floating_point() else t).contiguous().clone()
        for name, t in tensors.items()
        if name.endswith((".weight", ".g_idx"))
    }
    save_file(kept, PATH.with_name("weights.safetensors"))
    result = {
        "seconds": clock.wall,
        "cpu_seconds": clock.cpu,
        "loaded_mib": clock.loaded,
        "peak_mib": clock.peak,
        "stores": stores,
        "versions": {name: metadata.version(name) for name in ("torch", *packages)},
    }
    PATH.with_name("result.json").write_text(json.dumps(result))
