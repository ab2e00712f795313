"""GPTQ: round one column at a time, and let the later columns make up for each error."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from ..calibrate import Stats
from ..presets import format as named_format
from ..qtensor import Format, QTensor
from ..scheme import Scheme
from .rtn import check_stats

Scale = tuple[Tensor, Tensor | None]  # the (scale, offset) of one group of columns, [out, 1] each


def gptq(
    weight: Float[Tensor, "out in"], format: str | Format, stats: Stats, act_order: bool = False,
    static_groups: bool = True, damping: float = 0.01, block: int = 128,
) -> QTensor:  # fmt: skip
    """Choose codes of a small output error tr(E H E^T), never above round-to-nearest's.

    Frantar et al., arXiv 2210.17323, algorithm 1: Optimal Brain Quantization (arXiv 2208.11580)
    with one order of the columns for all rows. LDLQ (QuIP, arXiv 2307.13304, section 3) is the same
    algorithm: with H = M D M^T and M unit upper triangular, what is rounded in column j is
    w_j + sum_{i<j} (w_i - q_i) M_ij. Rows that do not gain keep round-to-nearest's codes.

    Args:
        weight: [out, in].
        format: a name or a Scheme. Fits that search ("-mse") count each error by the Hessian. What
            is fed back are the errors under the scale as stored.
        stats: what the layer read in calibration (`Stats.of`).
        act_order: take the columns by falling H_jj. Implies `static_groups`: no order is stored.
        static_groups: fit all scales to the original weight first. False is the paper's way: a
            block's scale is fitted to the updated weights when its first column is reached. Blocks
            "row" and "tensor", and scales that are stored by a Scheme, need all weights at once and
            are always static.
        damping: added to the diagonal of H, as a share of its mean; ten times as much, at most
            three times, while H is not positive definite. 0.01 is the paper's.
        block: columns whose updates of later columns are made together; the codes do not depend
            on it, but for ties in float32.

    Raises ValueError for a format that is not a Scheme, for statistics of no tokens or of another
    layer, for a Hessian that damping does not help, and for what `Scheme.quantize` refuses.

    >>> from qlib.metrics import proxy_loss
    >>> generator = torch.Generator().manual_seed(0)
    >>> weight, mix = torch.randn(2, 32, 32, generator=generator)
    >>> stats = Stats.of(torch.randn(256, 32, generator=generator) @ mix)
    >>> both = named_format("int3-g16").quantize(weight), gptq(weight, "int3-g16", stats)
    >>> [f"{proxy_loss(weight, q.dequantize(), stats.hessian):.3f}" for q in both]
    ['0.046', '0.023']
    """
    scheme = _check(weight, format, stats, damping, block)
    rtn, original = scheme.quantize(weight), weight.detach().float()
    hessian = stats.hessian.to(original)
    order = torch.arange(len(hessian), device=weight.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    upper = inverse_cholesky(hessian[order[:, None], order], damping)
    importance = _importance(hessian, upper, order, damping)

    size = scheme.block if type(scheme.block) is int else len(order)
    static = static_groups or act_order or type(scheme.block) is str
    # Scales that are themselves quantized need all scales at once.
    static |= any(hasattr(storage, "layout") for storage in (scheme.scale, scheme.offset))
    groups = _fit(scheme, original, importance) if static else []
    codes: list[Tensor | None] = [None] * len(order)
    # Transposed: a column of the paper is a contiguous row of w.
    w, columns = original.T[order].contiguous(), order.tolist()
    for start, stop in _batches(len(w), 1 if static else size, block):
        errors = torch.empty_like(w[start:stop])
        for i in range(start, stop):
            if not static and i % size == 0:
                groups += _fit(scheme, w[i : i + size].T, importance[i : i + size])
            _, scale = groups[columns[i] // size]
            codes[columns[i]] = scheme.round(w[i, :, None], *scale)
            rounded = scheme.values(codes[columns[i]], *scale)[:, 0]
            errors[i - start] = (w[i] - rounded) / upper[i, i]
            w[i + 1 : stop].addr_(upper[i, i + 1 : stop], errors[i - start], alpha=-1)
        w[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    q = _assemble(scheme, weight.shape, torch.cat(codes, dim=1), groups)
    return _keep_better(q, rtn, original, hessian)


def inverse_cholesky(
    hessian: Float[Tensor, "in in"], damping: float = 0.01
) -> Float[Tensor, "in in"]:
    """The upper triangular U with U^T U = (H + damping * mean(diagonal) * I)^-1, float32.

    A channel that was always zero has only the damping on its diagonal and no neighbors: its
    weights are rounded as they are. The original code sets them to zero instead, but a text outside
    the calibration may use the channel.

    The damping is raised tenfold, at most three times, while that is not positive definite; then
    ValueError is raised.
    """
    # H = R R^T with R upper triangular, so U = R^-1. R is the Cholesky factor of H with its order
    # reversed: unlike a Cholesky of the inverse, this does not square the condition number.
    reverse, mean = hessian.flip(0, 1), hessian.diagonal().mean().item() or 1.0
    shares = [damping * 10**k for k in range(4)]
    for share, dtype in itertools.product(shares, (torch.float32, torch.float64)):
        damped = reverse.to(dtype, copy=True)
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            one = torch.eye(len(damped), dtype=dtype, device=damped.device)
            return torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True).float()
    raise ValueError(
        f"the Hessian {list(hessian.shape)} is not positive definite with damping {share:g}: "
        "use damping=0.01, and a Hessian that is a mean of x x^T (Stats.of)"
    )


def _check(weight: Tensor, format: str | Format, stats: Stats, damping: float, block: int):
    """The format as a Scheme, if everything else fits too."""
    scheme = named_format(format) if isinstance(format, str) else format
    if not isinstance(scheme, Scheme):
        raise ValueError(f"gptq needs a Scheme, such as 'int4-g128', got {scheme}: use rtn")
    if not (damping >= 0 and block >= 1):
        raise ValueError(f"damping must be at least 0 and block at least 1, got {damping}, {block}")
    check_stats(weight, stats)
    return scheme


def _importance(hessian: Tensor, upper: Tensor, order: Tensor, damping: float) -> Tensor:
    """How much a squared error in each column counts when a scale is searched, [in].

    An error that stays where it is costs H_jj; one that the later columns make up for as well as
    they can costs only 1 / U_jj^2. Fits see neither: their geometric mean lowers the final error
    about as much as the better of the two, whatever the bits and the order of the columns.
    """
    diagonal = hessian.diagonal()
    importance = (diagonal + damping * diagonal.mean()).sqrt()
    importance[order] /= upper.diagonal()
    return importance


def _fit(scheme: Scheme, w: Tensor, importance: Tensor) -> list[tuple[Scale, Scale]]:
    """The scale of each block of `w` [out, cols]: as fitted, and as it will be read back."""
    fitted = scheme.fit_blocks(scheme.rows(w), scheme.rows(importance.expand(w.shape)))
    stored = scheme.read(scheme.store(*fitted), w.shape)
    # One scale of the whole tensor is the scale of every row.
    stored = (x if x is None else x.expand(len(w), -1) for x in stored)
    return list(zip(_groups(*fitted), _groups(*stored)))


def _groups(scale: Tensor, offset: Tensor | None) -> Iterator[Scale]:
    offsets = itertools.repeat(None) if offset is None else offset.split(1, dim=1)
    return zip(scale.split(1, dim=1), offsets)


def _batches(columns: int, size: int, block: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of about `block` columns: whole groups, or parts of one.

    Groups must not be cut by batches that start elsewhere: when the first column of a group is
    reached, all of its columns have to have seen every earlier error.
    """
    step = block // size * size or block
    for group in range(0, columns, max(size, step)):
        end = min(group + max(size, step), columns)
        yield from ((start, min(start + step, end)) for start in range(group, end, step))


def _assemble(scheme: Scheme, shape, codes: Tensor, groups: list[tuple[Scale, Scale]]) -> QTensor:
    scale, offset = zip(*(fitted for fitted, _ in groups))
    offset = None if offset[0] is None else torch.cat(offset, dim=1)
    parts = scheme.store(torch.cat(scale, dim=1), offset)
    parts["codes"] = scheme.pack(codes, shape)
    return QTensor(scheme, tuple(shape), {name: parts[name] for name in scheme.layout(shape)})


def _keep_better(q: QTensor, rtn: QTensor, weight: Tensor, hessian: Tensor) -> QTensor:
    """`q`, with the rows of `rtn` where they have no larger error e H e^T."""
    ours, theirs = q.dequantize(), rtn.dequantize()
    # a^2 - b^2 = (a - b)(a + b): one product with the Hessian compares both errors of every row.
    change = (((theirs - ours) @ hessian) * ((weight - ours) + (weight - theirs))).sum(dim=1)
    parts = q.parts.items()
    if all(len(part) == len(weight) or torch.equal(part, rtn.parts[name]) for name, part in parts):
        worse = ~(change < 0)
        for name, part in parts:
            if len(part) == len(weight):
                part[worse] = rtn.parts[name][worse]
        return q
    # Rows that share a scale can only be chosen together.
    return q if change.sum() < 0 else rtn
