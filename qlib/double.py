"""DoubleQuant: scales in 8 bits each, as bitsandbytes stores them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from .grid import Grid
from .qtensor import QTensor


def dynamic_points() -> Float[Tensor, " 256"]:
    """The signed dynamic map: seven decades of magnitudes, twice as many in each as in the last.

    The decade up to 10^-k is cut into 2^(6-k) equal steps whose middles are the magnitudes; 0 and 1
    complete the 256. Dettmers, arXiv 1511.04561, section 2 (dynamic trees of 8 bits); Dettmers et
    al., arXiv 2110.02861, section 2.2.

    >>> dynamic_points()[[0, 127, 128, 254, 255]]
    tensor([-9.9297e-01,  0.0000e+00,  5.5000e-07,  9.9297e-01,  1.0000e+00])
    """
    decades = []
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2**i + 1)
        decades.append((ends[:-1] + ends[1:]) / 2 * 10 ** (i - 6))
    positive = torch.cat(decades)
    return torch.cat([-positive.flip(0), torch.zeros(1), positive, torch.ones(1)])


DYNAMIC = Grid("dynamic8", dynamic_points())
PLACES = 65535


@dataclass(frozen=True)
class DoubleQuant:
    """bitsandbytes' double quantization, how a Scheme may store its scales.

    The mean of all scales is subtracted; what remains is quantized in blocks that run over the
    flattened scales, on the signed dynamic map: scale = map[code] * block scale + mean. QLoRA,
    arXiv 2305.14314, section 3, which describes 8-bit floats; this is what its code does.

    Args:
        block: scales that share one float32 scale of their own.

    Weights are rounded under their scales as fitted, before these are compressed.

    >>> scales = torch.linspace(0.01, 0.02, 512).view(8, 64)
    >>> q = DoubleQuant().quantize(scales)
    >>> {name: list(part.shape) for name, part in q.parts.items()}
    {'codes': [8, 64], 'scale': [1, 2], 'offset': [1]}
    >>> bool((q.dequantize() / scales - 1).abs().max() < 0.01)
    True
    """

    block: int = 256

    def __post_init__(self):
        if type(self.block) is not int or self.block < 1:
            raise ValueError(f"block must be a positive int, got {self.block!r}")

    def __str__(self) -> str:
        return f"double quantization, block {self.block}"

    def quantize(self, scales: Float[Tensor, "rows blocks"]) -> QTensor:
        """The scales as they are stored. Raises ValueError if their float32 mean overflows."""
        mean = scales.reshape(-1).mean()
        if not bool(mean.isfinite()):
            worst = scales.abs().max().item()
            raise ValueError(f"scales up to {worst:.3g} overflow their float32 mean")
        blocks = self._blocks(scales - mean)
        scale = blocks.abs().amax(dim=1, keepdim=True)
        codes = _nearest_place(blocks / scale.masked_fill(scale == 0, 1))
        codes = codes.masked_fill(scale == 0, 0).view(-1)[: scales.numel()].view(scales.shape)
        parts = {"codes": codes, "scale": scale.view(1, -1), "offset": mean.view(1)}
        return QTensor(self, tuple(scales.shape), parts)

    def decode(self, parts: Mapping[str, Tensor], shape) -> Float[Tensor, "rows blocks"]:
        """The scales that `parts` mean, float32."""
        values = self._blocks(DYNAMIC.decode(parts["codes"]))
        values = values.mul_(parts["scale"].view(-1, 1)).view(-1)[: math.prod(shape)]
        return values.view(tuple(shape)) + parts["offset"]

    def layout(self, shape) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """dtype and shape of every tensor that scales of `shape` are stored as."""
        blocks = math.ceil(math.prod(shape) / self.block)
        return {
            "codes": (torch.uint8, tuple(shape)),
            "scale": (torch.float32, (1, blocks)),
            "offset": (torch.float32, (1,)),
        }

    def _blocks(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1)
        # A block of more scales than there are needs no padding.
        size = min(self.block, len(flat))
        return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _nearest_place(x: Tensor) -> Tensor:
    """Codes of `x` in [-1, 1], as bitsandbytes' CPU code finds them: in a table of 65536 places.

    Values within half a place, 7.6e-6, of the middle of two points may thus get the farther one.
    """
    places = ((x + 1) * 0.5 * PLACES + 0.5).floor()
    return DYNAMIC.round_finite((places.double() / PLACES * 2 - 1).float())
