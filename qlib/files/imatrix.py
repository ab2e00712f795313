"""The importance matrix of llama.cpp: for every input column of every matrix, the mean of x^2.

The file is a GGUF file of `general.type` "imatrix" (tools/imatrix/imatrix.cpp). Its metadata are
`imatrix.datasets` (strings; llama-quantize reads the first), `imatrix.chunk_count` and
`imatrix.chunk_size` (u32, tokens). For every matrix there are two F32 tensors: "<name>.in_sum2"
[columns], the sum of x^2 over all tokens, and "<name>.counts" [1], how many tokens that were.
llama-quantize divides one by the other, takes ones where the count is 0, and ignores tensors with
other endings (newer files also hold "<name>.in_sum"). Files of the older ".dat" kind are not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..calibrate import Calibration, calibrated_blocks
from ..errors import FormatError
from ..ggml import TYPES
from . import gguf, gguf_write
from .gguf_llama import gguf_name

SUMS, COUNTS = ".in_sum2", ".counts"
F32 = TYPES["F32"]


@dataclass(frozen=True, eq=False)
class Imatrix:
    """Sums of squared inputs by GGUF tensor name ("blk.0.attn_q.weight"), over so many tokens.

    Args:
        sums: float32 [columns] each.
        counts: tokens that reached the tensor.
        datasets: the texts that it was made from.
        chunk_count, chunk_size: how many windows of how many tokens those were.
    """

    sums: Mapping[str, Float[Tensor, " columns"]]
    counts: Mapping[str, int]
    datasets: tuple[str, ...] = ("calibration",)
    chunk_count: int = 0
    chunk_size: int = 0

    def get(self, name: str) -> Float[Tensor, " columns"] | None:
        """The importance of every column: the mean square, ones where no token came by, or None."""
        if name not in self.sums:
            return None
        count = self.counts[name]
        return self.sums[name] / count if count else torch.ones_like(self.sums[name])

    def __repr__(self) -> str:
        tokens = max(self.counts.values(), default=0)
        return f"Imatrix({len(self.sums)} tensors, {tokens:,} tokens of {', '.join(self.datasets)})"


def measure(model: nn.Module, calibration: Calibration, dataset: str = "calibration") -> Imatrix:
    """The importance matrix of a Decoder whose weights are still the original ones.

    Args:
        model: our Decoder, or a model whose layers have the names of a Llama's.
        calibration: the text; `dataset` is how the file will call it.

    Raises ValueError for inputs that are not finite, and for layers that a Llama has not.
    """
    sums, counts = {}, {}
    for block in calibrated_blocks(model, calibration):
        for layer, stats in block.stats().items():
            name = gguf_name(f"{block.name}.{layer}.weight")
            sums[name] = (stats.mean_square * stats.tokens).cpu()
            counts[name] = stats.tokens
    windows = calibration.windows
    return Imatrix(sums, counts, (dataset,), len(windows), max(map(len, windows), default=0))


def write(path: str | os.PathLike, imatrix: Imatrix) -> None:
    """Write the file that llama-quantize takes as `--imatrix`, atomically.

    Raises ValueError without a dataset, which llama-quantize would miss.
    """
    if not imatrix.datasets:
        raise ValueError("an imatrix file names at least one dataset")
    metadata = {
        "general.type": ("string", "imatrix"),
        "imatrix.datasets": ("string[]", list(imatrix.datasets)),
        "imatrix.chunk_count": ("u32", imatrix.chunk_count),
        "imatrix.chunk_size": ("u32", imatrix.chunk_size),
    }
    tensors = {}
    for name in sorted(imatrix.sums):
        sums, count = imatrix.sums[name], imatrix.counts[name]
        tensors[name + SUMS] = (F32, (len(sums),), sums.numpy().astype("<f4"))
        tensors[name + COUNTS] = (F32, (1,), np.array([count], "<f4"))
    gguf_write.write(path, metadata, tensors)


def read(path: str | os.PathLike) -> Imatrix:
    """Read an imatrix file, of llama-imatrix or of `write`.

    Raises FormatError if it is another kind of file, has experts, or if a tensor lacks its partner,
    is not F32, or is not finite and 0 or more.
    """
    file = gguf.read(path)
    found = file.metadata.get("general.type")
    # An array of numbers cannot be compared with a string.
    if type(found) is not str or found != "imatrix":
        raise FormatError(path, "general.type", f"is {found!r:.80}; need 'imatrix'")
    names = [name.removesuffix(SUMS) for name in file.tensors if name.endswith(SUMS)]
    orphans = {n.removesuffix(COUNTS) for n in file.tensors if n.endswith(COUNTS)} ^ set(names)
    if orphans:
        raise FormatError(path, min(orphans), f"has only one of {SUMS} and {COUNTS}")
    sums = {name: _numbers(file, name + SUMS) for name in names}
    counts = {name: _numbers(file, name + COUNTS) for name in names}
    for name, count in counts.items():
        if len(count) != 1:
            message = f"has {len(count)} experts; only dense models are read"
            raise FormatError(path, name, message)
    datasets = file.metadata.get("imatrix.datasets")
    datasets = tuple(datasets) if isinstance(datasets, list) else ()
    chunks = (_count(file, f"imatrix.{key}") for key in ("chunk_count", "chunk_size"))
    return Imatrix(sums, {name: int(count) for name, count in counts.items()}, datasets, *chunks)


def _numbers(file: gguf.Gguf, name: str) -> Float[Tensor, " n"]:
    """A tensor of one row, or of one number for every expert, flattened."""
    info = file.tensors[name]
    if info.kind != F32:
        raise FormatError(file.path, name, f"is {info.kind.name}; need F32", info.start)
    values = file.tensor(name).flatten()
    if not bool(values.isfinite().all()) or bool((values < 0).any()):
        message = "holds numbers that are negative or not finite"
        raise FormatError(file.path, name, message, info.start)
    return values


def _count(file: gguf.Gguf, key: str) -> int:
    value = file.metadata.get(key, 0)
    if type(value) is not int or value < 0:
        raise FormatError(file.path, key, f"is {value!r:.80}; need a count")
    return value
