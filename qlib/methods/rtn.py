"""Round to nearest: every weight on its own, no data."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

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
