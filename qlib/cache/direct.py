"""Attention of one new token to stores, where their tokens lie: packed ones are not written out.

A store has up to three parts, and each gives its share: torch multiplies by sinks and recent
tokens, `kernels/cpu/attention.py` by packed ones. One softmax joins the scores of all parts, and
its probabilities are then cut at the parts of the values, which need not be the parts of the keys.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..kernels.dispatch import missing
from ..qtensor import QTensor
from .buffer import Buffer, joined
from .packed import Packed
from .store import Store

Queries = Float[Tensor, "batch heads 1 head_dim"]
Grouped = Float[Tensor, "batch_groups heads _"]


def why_not(q: Queries, keys: Store, values: Store) -> str | None:
    """Why `attend` cannot take these queries once their own token was appended, or None."""
    if q.shape[2] != 1:
        return f"there are {q.shape[2]} new tokens"
    if q.device.type != "cpu" or q.dtype == torch.float64:
        return f"queries are {str(q.dtype).removeprefix('torch.')} on {q.device}"
    if q.requires_grad and torch.is_grad_enabled():
        return "q needs a gradient"
    if reason := missing("cpu"):
        return reason
    if not (keys.packed and values.packed):
        return "not both of keys and values have packed tokens"
    if (q.shape[0], q.shape[3]) != (keys.recent.data.shape[0], keys.packed.head_dim):
        return f"queries {list(q.shape)} do not fit {keys.label}"
    return _no_kernel(keys, values)


def _no_kernel(keys: Store, values: Store) -> str | None:
    from ..kernels.cpu import attention as cpu

    if values.axis != "token":
        return "values are packed by channel"
    if keys.completes(1):
        return "the new token completes a group, and still reads it in full precision"
    packed = (keys.packed, values.packed)
    return next(filter(None, (cpu.why_not(p.format, p.group or p.head_dim) for p in packed)), None)


def attend(q: Queries, keys: Store, values: Store) -> Queries:
    """softmax(q @ keys.T / sqrt(head_dim)) @ values over all tokens of the stores, in float32.

    A group of consecutive query heads shares one key and value head, and one reading of it.
    """
    batch, heads, _, head_dim = q.shape
    groups = keys.recent.data.shape[1]
    x = q.reshape(batch * groups, -1, head_dim).float() / math.sqrt(head_dim)
    scores = joined([_products(x, part) for part in keys.parts], -1)
    pieces = scores.softmax(-1).split([len(part) for part in values.parts], dim=-1)
    y = sum(_mixed(p, part) for p, part in zip(pieces, values.parts))
    return y.view(batch, heads, 1, -1).to(q.dtype)


def _products(x: Grouped, part: Buffer | Packed) -> Grouped:
    """Queries times the tokens of one part."""
    if isinstance(part, Buffer):
        return x @ part.view.flatten(0, 1).float().mT
    from ..kernels.cpu import attention as cpu

    # By channel, a row has one channel of a group of tokens, and a group one row of each channel.
    q, rows = _matrices(part)
    return cpu.mix(x, q, rows, part.head_dim) if part.group else cpu.dot(x, q, rows)


def _mixed(p: Grouped, part: Buffer | Packed) -> Grouped:
    """The tokens of one part times their probabilities, added up."""
    if isinstance(part, Buffer):
        return p @ part.view.flatten(0, 1).float()
    from ..kernels.cpu import attention as cpu

    return cpu.mix(p, *_matrices(part))


def _matrices(part: Packed) -> tuple[QTensor, int]:
    """(a matrix for each head of each sequence, rows of it that are in use), without a copy."""
    parts = {k: buffer.data.flatten(0, 1).flatten(1, -2) for k, buffer in part.buffers.items()}
    count, room = next(iter(parts.values())).shape[:2]
    q = QTensor(part.format, (count, room, part.group or part.head_dim), parts)
    return q, len(part) // part.group * part.head_dim if part.group else len(part)
