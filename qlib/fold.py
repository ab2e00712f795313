"""Folds: places in a decoder block where channels can be rescaled without changing its function.

What a norm, a value projection or an up projection writes is read by linear layers only. Divide an
output channel of the one by s, multiply the input columns of the others by s, and every product is
what it was. AWQ and SmoothQuant choose s; the model stays an ordinary checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from .block import Block, Call

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
PRODUCERS_AND_CONSUMERS = (
    ("input_layernorm", QKV),
    ("self_attn.v_proj", ("self_attn.o_proj",)),
    # Where a block norms what attention wrote (Gemma 2), another norm stands before its MLP.
    ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
)
# A trial halves and doubles channels. A wrong fold moves what layers write by a third and more; a
# right one moves nothing, but for norms that store gain - 1: there by 2% in bfloat16.
TOLERANCE = 0.1


@dataclass(frozen=True, eq=False)
class Fold:
    """A producer of channels and all the linear layers of the block that read them.

    Args:
        module: the decoder block.
        producer: name in the block of a norm or a linear layer.
        consumers: names of the linear layers that read it.
        columns: the producer's channel that each input column of a consumer reads. Query heads of
            one group read the same value head, so a channel may be read by several columns.
        offset: a norm multiplies by `offset + weight`: 0, or 1 in Gemma's family.
    """

    module: nn.Module
    producer: str
    consumers: tuple[str, ...]
    columns: Int[Tensor, " in"]
    offset: int = 0

    @property
    def channels(self) -> int:
        """How many channels the producer writes: the number of scales."""
        return len(self.module.get_submodule(self.producer).weight)


@torch.no_grad()
def rescale(fold: Fold, scales: Float[Tensor, " channels"]) -> None:
    """Divide the producer's output by `scales` and multiply the columns that read it.

    The parameters are given new tensors, so whoever kept the old ones can put them back.

    Args:
        fold: from `folds`.
        scales: one positive factor for every channel of the producer.

    Raises ValueError unless there is one positive finite scale for every channel.
    """
    if scales.shape != (fold.channels,):
        need = f"{fold.producer} has {fold.channels} channels"
        raise ValueError(f"{need}, got scales {list(scales.shape)}: give one for every channel")
    if not bool((scales.isfinite() & (scales > 0)).all()):
        raise ValueError(f"{fold.producer}: scales must be positive and finite")
    producer = fold.module.get_submodule(fold.producer)
    shape = (-1,) + (1,) * (producer.weight.ndim - 1)
    _set(producer.weight, (_wide(producer.weight) + fold.offset) / scales.view(shape) - fold.offset)
    if getattr(producer, "bias", None) is not None:
        _set(producer.bias, _wide(producer.bias) / scales)
    for name in fold.consumers:
        weight = fold.module.get_submodule(name).weight
        _set(weight, _wide(weight) * scales[fold.columns])


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _set(parameter: Tensor, value: Tensor) -> None:
    parameter.data = value.to(parameter.dtype)


@torch.no_grad()
def folds(block: Block) -> list[Fold]:
    """The folds of a decoder block, each verified on the block's own calibration input.

    Candidates have the names of the Llama family. Names cannot say what a forward pass does, so
    the shortest recorded call is run with rescaled channels: a fold stays only if every linear
    layer and the block still write what they wrote. On unknown architectures the list is empty.

    Raises ValueError if the block has no calls to verify with.
    """
    if not block.calls:
        raise ValueError(f"{block.name}: folds are verified on calibration text; give calibration=")
    call = min(block.calls, key=lambda call: call.hidden.numel())
    before = _written(block, call)
    candidates = [f for f in _candidates(block.module) if before.keys() >= {*f.consumers}]
    if _preserve(candidates, block, call, before):
        return candidates
    return [fold for fold in candidates if _preserve([fold], block, call, before)]


def folds_before(block: Block, layers: Set[str], cannot: str, done: str) -> list[Fold]:
    """The folds that some of these layers read. Warns of the layers that read none of them.

    Args:
        cannot: what the caller cannot do to them, as in "awq cannot rescale".
        done: what it does instead, as in "rounded".
    """
    found = [fold for fold in folds(block) if not layers.isdisjoint(fold.consumers)]
    missed = sorted(layers - {name for fold in found for name in fold.consumers})
    if missed:
        where = f"these layers of {type(block.module).__name__}"
        more = f" and {len(missed) - 4} more" if len(missed) > 4 else ""
        names = f"{', '.join(missed[:4])}{more}; they are {done} as they are"
        warnings.warn(f"{cannot} what {where} read: {names}", stacklevel=3)
    return found


def _candidates(module: nn.Module) -> Iterator[Fold]:
    found = dict(module.named_modules())
    consumed: set[str] = set()
    for name, consumers in PRODUCERS_AND_CONSUMERS:
        producer = found.get(name)
        readers = [found.get(consumer) for consumer in consumers]
        is_dense = isinstance(getattr(producer, "weight", None), Tensor)
        if not is_dense or not all(isinstance(layer, nn.Linear) for layer in readers):
            continue
        columns = _columns(producer, readers[0], found[consumers[0].rpartition(".")[0]])
        offset = 0 if isinstance(producer, nn.Linear) else _gain_offset(producer)
        if columns is not None and offset is not None and not consumed & {*consumers}:
            consumed |= {*consumers}
            yield Fold(module, name, consumers, columns.to(producer.weight.device), offset)


def _columns(producer: nn.Module, reader: nn.Linear, parent: nn.Module) -> Tensor | None:
    """The producer's channel that every column of the reader reads, or None if unclear."""
    channels, columns = len(producer.weight), reader.in_features
    head_dim = getattr(parent, "head_dim", 0)
    if channels == columns:
        return torch.arange(columns)
    if not head_dim or columns % channels or channels % head_dim:
        return None
    # Grouped-query attention: consecutive query heads read one value head.
    heads = torch.arange(channels).view(-1, head_dim)
    return heads.repeat_interleave(columns // channels, dim=0).flatten()


def _gain_offset(norm: nn.Module) -> int | None:
    """0 or 1 for a norm whose gain is `weight` or `1 + weight`, None for anything else."""
    weight, bias = norm.weight, getattr(norm, "bias", None)
    if weight.ndim != 1:
        return None
    x = torch.linspace(-1, 1, 2 * len(weight)).view(2, -1).to(weight)
    scales = _trial_scales(len(weight)).to(weight)
    errors = {}
    for offset in (0, 1):
        changed = {"weight": (weight + offset) / scales - offset}
        if bias is not None:
            changed["bias"] = bias / scales
        errors[offset] = _distance(functional_call(norm, changed, (x,)) * scales, norm(x))
    best = min(errors, key=errors.__getitem__)
    return best if errors[best] < TOLERANCE else None


def _trial_scales(channels: int) -> Tensor:
    # Powers of two, so that the trial itself rounds nothing.
    generator = torch.Generator().manual_seed(0)
    return torch.exp2(2.0 * torch.randint(2, (channels,), generator=generator) - 1)


def _preserve(found: Iterable[Fold], block: Block, call: Call, before: dict[str, Tensor]) -> bool:
    """Whether the block computes the same with all of these folds' channels rescaled."""
    touched = {name for fold in found for name in (fold.producer, *fold.consumers)}
    tensors = [p for name in touched for p in block.module.get_submodule(name).parameters()]
    originals = [p.data for p in tensors]
    try:
        for fold in found:
            rescale(fold, _trial_scales(fold.channels).to(fold.columns.device))
        after = _written(block, call)
    finally:
        for parameter, original in zip(tensors, originals):
            parameter.data = original
    others = before.keys() - {fold.producer for fold in found}
    return all(_distance(after[name], before[name]) < TOLERANCE for name in others)


def _written(block: Block, call: Call) -> dict[str, Tensor]:
    """What every linear layer writes in one call, and at "" what the block does."""
    written: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, y, name=name: written.update({name: y}))
        for name, layer in block.linears.items()
    ]
    try:
        written[""] = block.run(call)
    finally:
        for handle in handles:
            handle.remove()
    return written


def _distance(after: Tensor, before: Tensor) -> float:
    """The median over channels of the relative error: one huge channel must not hide the others."""
    change, size = (x.float().flatten(0, -2).norm(dim=0) for x in (after - before, before))
    return (change / size.clamp(min=torch.finfo(size.dtype).tiny)).median().item()
