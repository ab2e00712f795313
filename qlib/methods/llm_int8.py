"""LLM.int8(): the few input channels that hold large values are multiplied at full width.

All other channels are multiplied in eight bits, with a scale for each token and each row of the
weight, which is kept in eight bits as a whole: the columns that outliers meet are decoded when they
are met. Codes and scales are those of bitsandbytes, which rounds float16.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from .. import fit
from ..activations import Inputs
from ..calibrate import Calibration
from ..grid import int_grid
from ..kernels import activations
from ..kernels.dispatch import Product
from ..linear import read_by
from ..qtensor import QTensor
from ..scheme import Scheme
from ..structure import decoder_linears

Rows = Float[Tensor, "rows in"]
# What bitsandbytes stores, and what its container is read as.
INT8 = Scheme(int_grid(8), "row", fit.absmax, scale=torch.float32)
STEP = torch.tensor(1 / 127)


@dataclass(frozen=True)
class LLMInt8(Inputs):
    """Inputs in eight bits for each token, but for the channels that reach the threshold.

    Args:
        threshold: a channel in which any token of the call has |x| >= threshold is an outlier;
            infinity leaves every channel in eight bits.

    Raises ValueError unless the threshold is positive, and from its methods for NaN.

    Source: Dettmers et al., arXiv 2208.07339, section 3.2, equation 8.

    >>> LLMInt8().rounded(torch.tensor([[1.0, 9.0, 0.3], [2.0, 0.7, 0.0]]))
    tensor([[1.0000, 9.0000, 0.2992],
            [2.0000, 0.7000, 0.0000]])
    """

    threshold: float = 6.0

    def __post_init__(self):
        if not self.threshold > 0:
            message = f"threshold must be positive, got {self.threshold}"
            raise ValueError(f"{message}; infinity leaves every channel in eight bits")

    def outliers(self, x: Rows) -> Bool[Tensor, " in"]:
        """Which channels are multiplied at full width."""
        return _largest(_as_float16(x), dim=0) >= self._level

    def split(self, x: Rows) -> tuple[QTensor, Int[Tensor, " outliers"]]:
        """The codes of `x`, zero in the channels of outliers, and the indices of these channels.

        As in bitsandbytes, the scale of a token counts what it has in these channels below the
        threshold.
        """
        wide = _as_float16(x)
        outliers = (_largest(wide, dim=0) >= self._level).nonzero().flatten()
        held = wide[:, outliers]
        wide[:, outliers] = held.masked_fill_(held.abs() >= self._level, 0)
        q = _rounded(wide)
        q.parts["codes"][:, outliers] = 128
        return q, outliers

    def rounded(self, x: Rows) -> Rows:
        if not x.numel():
            return x.clone()
        q, outliers = self.split(x)
        values = q.dequantize().to(x.dtype)
        values[:, outliers] = x[:, outliers]
        return values

    def product(self, x: Rows, weight: Product) -> Float[Tensor, "rows out"]:
        if not x.numel():
            return weight(x)
        q, outliers = self.split(x)
        if activations.multiplies_codes(q, weight.q):
            y = activations.product(q, weight.q, x.dtype)
        else:
            y = weight(q.dequantize().to(x.dtype))
        if not len(outliers):
            return y
        return y.addmm(x[:, outliers], columns(weight.q, outliers).to(x.dtype).T)

    @property
    def _level(self) -> float:
        """The threshold in float16, in which magnitudes are compared with it."""
        return torch.tensor(self.threshold).half().item()

    def __str__(self) -> str:
        return f"int8 for each token, channels from {self.threshold:g} at full width"


def quantize(x: Rows, format: Scheme = INT8) -> QTensor:
    """Every row in eight bits by its largest magnitude: round(x * 127 / max|x|), of float16.

    Args:
        x: a weight [out, in] or activations [rows, in].
        format: `INT8`, as methods are called.

    Raises ValueError for another format, and for NaN or infinity in float16.

    >>> q = quantize(torch.tensor([[1.0, -2.0, 0.5, 0.0]]))
    >>> (q.parts["codes"].int() - 128).tolist(), q.parts["scale"] * 127
    ([[64, -127, 32, 0]], tensor([[2.]]))
    """
    if format != INT8:
        raise ValueError(f"LLM.int8() keeps weights as {INT8}, got {format}; use method='rtn'")
    return _rounded(_as_float16(x))


def _as_float16(x: Rows) -> Rows:
    """A new float32 tensor with the values that `x` has in float16."""
    return x.detach().half().float()


def _largest(wide: Rows, dim: int) -> Tensor:
    # aminmax and vector_norm need no copy, but take ten times as long on a CPU.
    return wide.abs().amax(dim)


def _rounded(wide: Rows) -> QTensor:
    """`quantize` of float16 values; they are overwritten."""
    amax = _largest(wide, dim=1).unsqueeze(1)
    if not bool(amax.isfinite().all()):
        bad = int((~amax.isfinite()).sum())
        raise ValueError(f"{list(wide.shape)}: {bad} rows hold NaN or what float16 cannot")
    codes = wide.mul_((127 / amax).masked_fill_(amax == 0, 0)).round_()
    parts = {"codes": codes.add_(128).to(torch.uint8), "scale": amax * STEP.to(amax.device)}
    return QTensor(INT8, tuple(wide.shape), parts)


def columns(q: QTensor, which: Int[Tensor, " some"]) -> Float[Tensor, "out some"]:
    """`q.dequantize()[:, which]`; where bytes are codes, nothing else is decoded."""
    format = q.format
    if not isinstance(format, Scheme) or format.grid.bits != 8 or type(format.block) is int:
        return q.dequantize()[:, which]
    parts = q.parts | {"codes": q.parts["codes"][:, which]}
    return QTensor(format, (q.shape[0], len(which)), parts).dequantize()


@torch.no_grad()
def outlier_shares(
    model: nn.Module, calibration: Calibration, inputs: LLMInt8 = LLMInt8()
) -> dict[str, float]:
    """The share of input channels that are outliers, for every linear layer of the decoder blocks.

    It is the mean over the calibration's windows, each in a call of its own. The model is one that
    is not quantized yet.
    """
    shares: dict[str, list[float]] = {}

    def see(name: str, layer: nn.Module, args: tuple) -> None:
        outliers = inputs.outliers(read_by(layer, args[0]).flatten(0, -2))
        shares.setdefault(name, []).append(outliers.float().mean().item())

    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: see(name, layer, args))
        for name, layer in decoder_linears(model).items()
    ]
    try:
        device = next(model.parameters()).device
        for window in calibration.windows:
            model(window.unsqueeze(0).to(device))
    finally:
        for handle in handles:
            handle.remove()
    return {name: fmean(found) for name, found in shares.items()}
