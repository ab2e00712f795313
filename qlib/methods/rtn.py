"""Round to nearest: every weight on its own, with no data or with its channel's mean square."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ..calibrate import Stats
from ..presets import format as named_format
from ..qtensor import Format, QTensor


def rtn(
    weight: Float[Tensor, "out in"], format: str | Format, importance: Tensor | None = None
) -> QTensor:
    """Round every weight to the nearest value of its block's grid: the baseline of every method.

    Args:
        weight: [out, in]; format: a name or a format object.
        importance: weight of each squared error, for formats whose fit searches.
    """
    chosen = named_format(format) if isinstance(format, str) else format
    return chosen.quantize(weight, importance)


def imatrix(weight: Float[Tensor, "out in"], format: str | Format, stats: Stats) -> QTensor:
    """`rtn` with scales that weight each squared error by the mean square of its input channel.

    This is llama.cpp's importance matrix. It changes nothing in formats whose fit does not search.

    Args:
        weight: [out, in]; format: a name or a format object; stats: what the layer read.

    Raises ValueError for statistics of no tokens, of another layer, or not finite.
    """
    check_stats(weight, stats)
    return rtn(weight, format, stats.mean_square)


def check_stats(weight: Tensor, stats: Stats) -> None:
    """Raise ValueError if the statistics cannot be those of a layer with this weight."""
    shape, n = list(stats.hessian.shape), weight.shape[-1]
    if weight.ndim != 2 or shape != [n, n]:
        raise ValueError(
            f"weight {list(weight.shape)} and Hessian {shape} do not fit: a weight [out, in] needs "
            "a Hessian [in, in] of the same layer's inputs"
        )
    if stats.tokens == 0:
        raise ValueError("the statistics hold 0 tokens: run calibration text through the layer")
    if bad := int((~stats.hessian.isfinite()).sum()):
        raise ValueError(
            f"the Hessian {shape} holds {bad} NaN or infinite values: the layer's inputs overflow; "
            "calibrate in float32, or use rtn"
        )
