"""HQQ, half-quadratic quantization: a better offset for every block, without any data."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from ..columns import Columns
from ..grid import Grid
from ..presets import format as named_format
from ..qtensor import Format, QTensor
from ..scheme import Scheme, checked

# Weights in one update: its four temporaries of float32 fit a second-level cache of 2 MiB.
CHUNK_WEIGHTS = 1 << 17


def hqq(
    weight: Float[Tensor, "out in"], format: str | Format, axis: int = 1, iterations: int = 20,
    norm: float = 0.7, beta: float = 10.0, growth: float = 1.01,
) -> QTensor:  # fmt: skip
    """Move each block's offset so that sum |error|^norm falls; its scale stays as it was fitted.

    Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). As
    there, updates end when the mean |error| of the whole weight stops falling; it is never above
    round-to-nearest's. What helps are fractions of a step: with a zero point that is stored as an
    integer, the result is nearly always round-to-nearest's.

    Args:
        weight: [out, in]; format: a name or object that stores an offset, as "int4-g64-offset".
        axis: 1 for blocks along the input, 0 for blocks down the columns: `Columns(format)`.
        iterations: updates at most; 0 is round-to-nearest.
        norm: exponent p of the error, in (0, 1]; the smaller, the less outliers count.
        beta: weight of the split's quadratic penalty; errors above beta^(1 / (norm - 2)), 0.17 in
            units of the weight by default, count less; growth: factor on it after every update.

    Raises ValueError for formats without an offset, settings out of range, and bad weights.

    >>> import qlib
    >>> weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    >>> both = hqq(weight, "int3-g64-offset"), qlib.quantize(weight, "int3-g64-offset")
    >>> [f"{(q.dequantize() - weight).abs().mean():.3f}" for q in both]
    ['0.155', '0.161']
    """
    if axis not in (0, 1):
        raise ValueError(f"axis is {axis}; use 1 for blocks along the input, 0 down the columns")
    settings = (iterations, norm, beta, growth)
    if not (iterations >= 0 and 0 < norm <= 1 and beta > 0 and growth >= 1):
        raise ValueError(f"need iterations >= 0, 0 < norm <= 1, beta > 0, growth >= 1: {settings}")
    scheme, w = named_format(format) if isinstance(format, str) else format, checked(weight)
    if axis == 0 and not isinstance(scheme, Columns):
        scheme = Columns(scheme)
    if isinstance(scheme, Columns):
        return scheme.of(hqq(scheme.turn(w), scheme.scheme, 1, *settings))
    if getattr(scheme, "offset", None) is None:
        raise ValueError(f"{scheme} has no offset to move; hqq needs one, as in 'int4-g64-offset'")
    w, shape = scheme.rows(w), tuple(weight.shape)
    parts = _solve(scheme, w, shape, *settings)
    parts["codes"] = scheme.pack(scheme.round(w, *scheme.read(parts, shape)), shape)
    return QTensor(scheme, shape, {name: parts[name] for name in scheme.layout(shape)})


def _solve(scheme: Scheme, w: Tensor, shape, *settings) -> dict[str, Tensor]:
    """Scale and offset as stored: where the sum of |error| stops falling, at worst the first."""
    fitted, offset = scheme.fit_blocks(w)
    first = scheme.store(fitted, offset)
    scale, zero = _affine(scheme, first, shape)
    zeros, errors = _iterate(scheme, w, scale, zero, *settings)
    best = int((errors.diff() < 0).long().cumprod(0).sum())
    solved = scheme.store(fitted, -zeros[best] * scale)
    error = _iterate(scheme, w, *_affine(scheme, solved, shape), 0, *settings[1:])[1]
    return solved if error[0] < errors[0] else first


def _affine(scheme: Scheme, parts: dict[str, Tensor], shape) -> tuple[Tensor, Tensor]:
    """(scale, zero) as stored, where weight = (code - zero) * scale."""
    scale, offset = scheme.read(parts, shape)
    scale = scale.masked_fill(scale == 0, 1)
    return scale, offset if isinstance(scheme.offset, Grid) else -offset / scale


def _iterate(scheme: Scheme, w, scale, zero, iterations: int, norm, beta, growth):
    """Zeros [iterations + 1, rows, blocks], and the sum of |error| with each."""
    zeros = zero.repeat(iterations + 1, 1, 1)
    errors = torch.zeros(iterations + 1, dtype=torch.float64, device=w.device)
    rows = max(1, CHUNK_WEIGHTS // w.shape[1])
    for columns, blocks, size in scheme._pieces(w.shape[1]):
        for at in (slice(i, i + rows) for i in range(0, len(w), rows)):
            s, z = scale[at, blocks, None], zero[at, blocks, None]
            x = w[at, columns].unflatten(1, (-1, size)) / s
            for i in range(iterations + 1):
                zeros[i, at, blocks] = z.squeeze(-1)
                z, error = _update(x, s, z, scheme.grid, norm, beta * growth**i)
                errors[i] += error
    return zeros, errors


def _update(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid, norm: float, beta: float):
    """The next zeros of blocks x = w / scale, and the sum of |error| with the present ones.

    Of an error e, shrink(e) = sign(e) max(0, |e| - |e|^(norm-1) / beta) is the outlier part. The
    next zero is the mean of code - (w - shrink(e)) / scale: the present one less the mean of
    (e - shrink(e)) / scale, and e - shrink(e) = e max(1, |e| / limit)^(norm-2).
    """
    limit = beta ** (1 / (norm - 2))
    error = x + zero
    error -= _round(grid, error)
    relative = error.abs().mul_(scale.abs() / limit)
    total = relative.sum() * limit
    if relative.amax() > 1:
        # By way of log2, the power takes a third of the time.
        error *= relative.clamp_(min=1).log2_().mul_(norm - 2).exp2_()
    return zero - error.mean(-1, keepdim=True), total


def _round(grid: Grid, x: Tensor) -> Tensor:
    if grid.name.startswith("uint"):
        return x.round().clamp_(grid.min, grid.max)
    return grid.decode(grid.round_finite(x))
