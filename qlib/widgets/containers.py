"""One small weight in the bytes of six containers: which bits hold its code, scale and zero."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import traitlets
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import fit, grid
from ..files import awq, bnb, compressed_tensors, gptq, mlx
from ..ggml.schemes import to_blocks
from ..pack import pack
from ..presets import format as named_format
from ..qtensor import QTensor
from ..scheme import Scheme
from . import BookWidget

Stored = dict[str, Tensor]
Store = Callable[[QTensor], Stored]
SHAPE = (8, 64)
INT4, NF4 = named_format("int4-g32"), named_format("nf4")
UINT4 = grid.int_grid(4, signed=False)
# The same numbers with zero points of their own, to find where these are stored.
ASYMMETRIC = Scheme(UINT4, 32, fit.minmax, torch.float16, UINT4)

# Format, how a weight is stored, and where the zero point is: in a field, less so much; nowhere; or
# there is a bias, or a table of values, in the tensor of this name.
KINDS: dict[str, tuple[Scheme, Store, dict]] = {
    "GPTQ": (INT4, gptq.store, {"less": 1, "groups": "g_idx"}),
    "AWQ": (INT4, awq.store, {"less": 0}),
    "compressed-tensors": (INT4, compressed_tensors.store, {"known": 8}),
    "MLX": (INT4, mlx.store, {"bias": "biases"}),
    "GGUF Q4_0": (INT4, lambda q: {"blocks": to_blocks(q).parts["blocks"]}, {"known": 8}),
    "bitsandbytes NF4": (NF4, bnb.store, {"table": "weight.quant_map"}),
}


def joined(stored: Stored) -> np.ndarray:
    """The bytes of all tensors, one after another: uint8 [bytes]."""
    flat = [t.detach().contiguous().flatten().view(torch.uint8) for t in stored.values()]
    return torch.cat(flat).numpy()


def traced(
    store: Callable[[Bool[np.ndarray, " sources"]], Stored], sources: int
) -> Int[np.ndarray, " bits"]:
    """Of each stored bit, lowest of each byte first, the source that moves it; -1 if none does.

    Args:
        store: stores a weight some of whose sources are changed, and the others are not.
        sources: how many there are.

    In round r those sources change whose number, counted from 1, has bit r. So the rounds in which
    a stored bit moves spell the number of its source.
    """
    names = np.arange(1, sources + 1)

    def bits(chosen: np.ndarray) -> np.ndarray:
        return np.unpackbits(joined(store(chosen)), bitorder="little")

    before, spelled = bits(names < 0), 0
    for r in range(sources.bit_length()):
        spelled = spelled | (bits(names >> r & 1 > 0) != before).astype(int) << r
    return spelled - 1


def flipped(part: Tensor, bits: Bool[np.ndarray, " bits"]) -> Tensor:
    """The same tensor with some of its bits the other way round."""
    mask = torch.from_numpy(np.packbits(bits, bitorder="little"))
    return (part.contiguous().flatten().view(torch.uint8) ^ mask).view(part.dtype).view(part.shape)


def moved(store: Store, q: QTensor, part: str, width: int) -> Int[np.ndarray, " bits"]:
    """`traced` where every source is a run of `width` bits of one part of `q`."""

    def changed(chosen: np.ndarray) -> Stored:
        bits = np.repeat(chosen, width)
        return store(QTensor(q.format, q.shape, q.parts | {part: flipped(q.parts[part], bits)}))

    return traced(changed, 8 * q.parts[part].nbytes // width)


def starts(follows: Int[np.ndarray, " bits"], width: int) -> list[int]:
    """Of each source, the aligned run of `width` bits that holds all stored bits that follow it.

    Raises ValueError if there is more than one: the page could not show such a container.
    """
    at = np.flatnonzero(follows >= 0)
    pairs = np.unique(np.stack([follows[at], at // width * width]), axis=1)
    if not np.array_equal(pairs[0], np.arange(follows.max() + 1)):
        raise ValueError(f"a number is stored in more than one run of {width} bits")
    return pairs[1].tolist()


def container(name: str, weight: Float[Tensor, "out in"]) -> dict:
    """What the page needs to show `weight` in one container; positions are bits of `bytes`."""
    format, store, rule = KINDS[name]
    q = format.quantize(weight)
    stored, fields, end = store(q), [], 0
    for field, tensor in stored.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        fields.append([field, f"{kind} {list(tensor.shape)}", end, end := end + tensor.nbytes])
    code = moved(store, q, "codes", 4)
    width = 8 * q.parts["scale"].element_size()
    # Scales of 1 stay finite when all of their bits are changed.
    ones = QTensor(format, q.shape, q.parts | {"scale": torch.ones_like(q.parts["scale"])})
    scale, zero = moved(store, ones, "scale", width), None
    if "bias" in rule:
        # Of a bias too every bit follows a scale.
        split = 8 * next(first for field, _, first, _ in fields if field == rule["bias"])
        scale, zero = scale[:split], [split + at for at in starts(scale[split:], width)]
    if "less" in rule:
        zeros = pack(torch.full(q.parts["scale"].shape, 8, dtype=torch.uint8), 4)
        twin = QTensor(ASYMMETRIC, q.shape, q.parts | {"zero_point": zeros})
        zero = starts(moved(store, twin, "zero_point", 4), 4)
    return {
        "name": name, "block": format.block, "width": width, "rule": rule, "fields": fields,
        "bytes": joined(stored).tobytes().hex(),
        "code": starts(code, 4), "scale": starts(scale, width), "zero": zero,
    }  # fmt: skip


class Containers(BookWidget):
    """Choose a weight and see its bits in six containers; choose a byte and see whose it is.

    Args:
        weight: [8, 64].
        row, column: the weight that is chosen first.

    Raises ValueError for another shape, or a weight that does not exist.
    """

    shape = traitlets.List().tag(sync=True)
    containers = traitlets.List().tag(sync=True)
    chosen = traitlets.Int(0).tag(sync=True)
    at = traitlets.Int().tag(sync=True)

    def __init__(self, weight: Float[Tensor, "out in"], row: int = 0, column: int = 0):
        if weight.shape != SHAPE:
            need, found = list(SHAPE), list(weight.shape)
            raise ValueError(f"the containers widget shows a weight {need}, got {found}")
        if not (0 <= row < SHAPE[0] and 0 <= column < SHAPE[1]):
            raise ValueError(f"no weight [{row}, {column}] in {list(SHAPE)}, counted from 0")
        every = [container(name, weight.detach().float()) for name in KINDS]
        super().__init__(shape=list(SHAPE), containers=every, at=row * SHAPE[1] + column)
