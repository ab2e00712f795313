"""Where a model keeps its decoder blocks and their linear layers, found by structure."""

from __future__ import annotations

from torch import nn

from .errors import require_model
from .linear import QLinear


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The name and the list of the model's decoder blocks.

    They are the longest outermost ModuleList that contains linear layers (a list of experts lies
    inside a block), so any Hugging Face causal LM works.
    Raises ValueError if there is no such list, or if all of its layers are quantized already.
    """
    require_model(model)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(map(_is_linear, module.modules()))
    }
    if not lists and any(isinstance(module, QLinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is quantized already; load it again to start over"
        )
    if not lists:
        raise ValueError(f"{type(model).__name__} has no decoder blocks with unquantized nn.Linear")
    outermost = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    prefix = max(outermost, key=lambda name: len(lists[name]))
    return prefix, lists[prefix]


def decoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the model's decoder blocks, by name.

    Embeddings and the output head are not among them. Raises ValueError as `decoder_blocks` does.
    """
    prefix, blocks = decoder_blocks(model)
    return {f"{prefix}.{name}": module for name, module in linears(blocks).items()}


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside `module`, by their names in it."""
    return {name: child for name, child in module.named_modules() if _is_linear(child)}


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)
