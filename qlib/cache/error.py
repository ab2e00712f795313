"""How far attention is off when it reads a quantized cache, with everything before it exact."""

from __future__ import annotations

import math
from collections import defaultdict

import torch
from jaxtyping import Int
from torch import Tensor

from . import DenseCache, Past, QuantizedCache, Queries, through_cache
from .format import KVFormat


class Compared:
    """Gives a model exact attention, and notes what another cache would have given it.

    Args:
        format: of the other cache, as for `QuantizedCache`.
    """

    def __init__(self, format: str | KVFormat):
        self.exact, self.other = DenseCache(), QuantizedCache(format)
        self._squares: dict[int, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    @property
    def length(self) -> int:
        """Tokens that every layer has seen."""
        return self.exact.length

    @property
    def errors(self) -> list[float]:
        """|difference| / |exact output| over all tokens, for every layer."""
        return [math.sqrt(off / size) for off, size in self._squares.values()]

    def attend(self, q: Queries, k: Past, v: Past, layer: int) -> Queries:
        """Exact attention of the new tokens to all."""
        exact = self.exact.attend(q, k, v, layer)
        off = self.other.attend(q, k, v, layer) - exact
        squares = [x.double().square().sum() for x in (off, exact)]
        self._squares[layer] += torch.stack(squares).cpu()
        return exact


@torch.no_grad()
def attention_error(
    model, format: str | KVFormat, tokens: Int[Tensor, "batch time"], chunk: int = 32
) -> list[float]:
    """Relative error of every layer's attention output when it reads a cache of this format.

    Args:
        model: a `qlib.model.Decoder`.
        tokens: read `chunk` at a time, each chunk through the cache; queries, keys and values are
            those of the model without errors, so every layer is judged alone.

    Raises ValueError if there are no tokens, or `chunk` is not positive.

    >>> import qlib
    >>> model, tokenizer = qlib.load("bpw-small")
    >>> errors = attention_error(model, "int4", torch.arange(64).view(1, 64))
    >>> len(errors), all(0 < error < 0.2 for error in errors)
    (3, True)
    """
    if not tokens.numel():
        raise ValueError(f"an error of attention needs tokens, got {list(tokens.shape)}")
    cache = Compared(format)
    through_cache(model, format, chunk).hidden(tokens, cache)
    return cache.errors
