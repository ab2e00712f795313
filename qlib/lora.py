"""LoRA and QLoRA: two thin trained matrices beside every frozen weight, packed or not.

LoRA (arXiv 2106.09685, eq. 3) learns the update of a weight as a product of rank r:
y = W x + (alpha / r) B A x. In QLoRA (arXiv 2305.14314, eq. 5) W stays in 4 bits and is dequantized
where it is used, forward and backward; gradients and optimizer state exist for A and B only.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .files import peft
from .finetune import train
from .linear import QLinear, dequantized, replace_layer

__all__ = ["LoRALinear", "adapters", "add_adapters", "merge", "train"]
__all__ += ["load_adapters", "save_adapters"]


class LoRALinear(nn.Module):
    """`base(x) + (alpha / rank) * x @ A.T @ B.T`, of which only A and B are trained.

    A is drawn from U(-1, 1) / sqrt(in) and B is zero, so that a new adapter changes nothing. Both
    are float32, whatever the base computes in, as in PEFT.

    Args:
        base: nn.Linear or QLinear; it is frozen.
        rank: rows of A [rank, in] and columns of B [out, rank].
        alpha: the numerator of the scale.
        generator: draws A.

    Raises ValueError if the rank is not positive.
    """

    def __init__(
        self, base: nn.Linear | QLinear, rank: int, alpha: float,
        generator: torch.Generator | None = None,
    ):  # fmt: skip
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank}: give 1 or more")
        self.base, self.rank, self.alpha = base.requires_grad_(False), rank, alpha
        device = next(iter(base.state_dict().values())).device
        a = torch.empty(rank, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
        self.lora_A = nn.Parameter(a.to(device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y = self.base(x)
        update = F.linear(F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return (y + update * (self.alpha / self.rank)).to(y.dtype)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}"


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """The adapters of a model, by the names of their layers."""
    return {n: module for n, module in model.named_modules() if isinstance(module, LoRALinear)}


def add_adapters(
    model: nn.Module, rank: int = 8, alpha: float = 16, targets: str | Sequence[str] = "all",
    seed: int = 0,
) -> list[nn.Parameter]:  # fmt: skip
    """Freeze a model and give its linear layers adapters, in place; returns what is to be trained.

    Args:
        model: our Decoder or any Hugging Face causal LM, before or after `quantize_model`.
        rank, alpha: of every adapter; the update is scaled by alpha / rank.
        targets: last parts of layer names, such as ("q_proj", "v_proj"), or "all" for every linear
            layer of the decoder blocks, which QLoRA needs to reach full fine-tuning (section 4).
        seed: of the initial A.

    Raises ValueError if a target matches no layer, or if the model has adapters already.

    >>> import qlib
    >>> model, _ = qlib.load("bpw-small")
    >>> _ = qlib.quantize_model(model, "nf4", progress=False)
    >>> sum(p.numel() for p in add_adapters(model))     # these layers have 1,769,472 weights
    98304
    """
    if adapters(model):
        raise ValueError("the model has adapters already: train those, or merge them first")
    layers = _block_linears(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no decoder blocks with linear layers")
    names = list(layers) if targets == "all" else _matching(layers, targets)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name in names:
        replace_layer(model, name, LoRALinear(layers[name], rank, alpha, generator))
    return _trained(model)


def merge(model: nn.Module, dequantize: bool = False) -> None:
    """Add every update to the weight of its layer, in place: `W + (alpha / rank) B A`, dense.

    A sum does not lie on the grid of a packed weight. With `dequantize` a packed layer becomes an
    ordinary float32 nn.Linear of the same function; quantizing it again rounds the update too.

    Raises ValueError if the model has no adapters, or if a base is packed and `dequantize` is off;
    then nothing has changed.
    """
    layers = adapters(model)
    if not layers:
        raise ValueError("the model has no adapters to merge")
    packed = [name for name, layer in layers.items() if isinstance(layer.base, QLinear)]
    if packed and not dequantize:
        base = layers[packed[0]].base
        where = f"{packed[0]} [{base.out_features}, {base.in_features}] is packed"
        raise ValueError(f"{where}: merge(model, dequantize=True) makes it a dense float32 layer")
    for name, layer in layers.items():
        dense = dequantized(layer.base) if isinstance(layer.base, QLinear) else layer.base
        update = layer.lora_B.detach() @ layer.lora_A.detach() * (layer.alpha / layer.rank)
        merged = (dense.weight + update).to(dense.weight.dtype)
        dense.weight = nn.Parameter(merged, requires_grad=False)
        replace_layer(model, name, dense)


def save_adapters(path: str | os.PathLike, model: nn.Module) -> None:
    """Write the adapters to a folder that `peft.PeftModel.from_pretrained` reads, atomically.

    Raises ValueError if there are none, or if they differ in rank or alpha.
    """
    layers = adapters(model)
    kinds = {(layer.rank, layer.alpha) for layer in layers.values()}
    if len(kinds) != 1:
        raise ValueError(f"need adapters of one rank and alpha, the model has {sorted(kinds)}")
    pairs = {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}
    peft.save(path, *kinds.pop(), pairs)


def load_adapters(path: str | os.PathLike, model: nn.Module) -> list[nn.Parameter]:
    """Give a model the adapters of a folder, in place of any it has; returns them as parameters.

    Raises FormatError, before the model is changed, if the folder does not hold plain LoRA
    adapters of linear layers that the model has.
    """
    layers = _linears(model)
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    rank, alpha, pairs = peft.load(path, shapes)
    for name, old in adapters(model).items():
        replace_layer(model, name, old.base)
    model.requires_grad_(False)
    for name, (a, b) in pairs.items():
        adapter = LoRALinear(layers[name], rank, alpha)
        adapter.lora_A.data, adapter.lora_B.data = (t.to(adapter.lora_A.device) for t in (a, b))
        replace_layer(model, name, adapter)
    return _trained(model)


def _linears(model: nn.Module) -> dict[str, nn.Linear | QLinear]:
    """All linear layers by name; the base of an adapter has the name of the adapter."""
    based = {f"{name}.base": name for name in adapters(model)}
    named = ((based.get(name, name), module) for name, module in model.named_modules())
    return {name: module for name, module in named if isinstance(module, nn.Linear | QLinear)}


def _block_linears(model: nn.Module) -> dict[str, nn.Linear | QLinear]:
    """All linear layers inside lists of blocks: embeddings and the output head are in none."""
    lists = [n for n, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    inside = tuple(f"{name}." for name in lists)
    return {name: layer for name, layer in _linears(model).items() if name.startswith(inside)}


def _matching(names: Iterable[str], targets: str | Sequence[str]) -> list[str]:
    ends = {t: f".{t}" for t in ([targets] if isinstance(targets, str) else targets)}
    for target, end in ends.items():
        if not any(f".{name}".endswith(end) for name in names):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
            raise ValueError(f"target {target!r} matches no layer; known are {known}, and 'all'")
    return [name for name in names if f".{name}".endswith(tuple(ends.values()))]


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for layer in adapters(model).values() for p in (layer.lora_A, layer.lora_B)]
