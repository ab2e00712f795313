"""The KV cache of a decoder: what attention remembers of earlier tokens, in full or fewer bits.

Every layer has two stores (`store.py`), of keys and of values, in one format (`format.py`, by name
`names.py`). A step appends the keys and values of its new tokens and attends to all, old and new.
What it reads of old tokens is what is stored, whether it is dequantized first or read in place
(`direct.py`): no path only simulates the rounding.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..errors import require_model
from . import direct
from .format import KVFormat
from .names import kv_format
from .store import New, Store, rotated

Queries = Float[Tensor, "batch heads time head_dim"]
Past = Float[Tensor, "batch groups _ head_dim"]


class Cache(Protocol):
    """What a decoder needs of its cache."""

    @property
    def length(self) -> int:
        """Tokens that every layer has seen."""

    def attend(self, q: Queries, k: Past, v: Past, layer: int) -> Queries:
        """Append the keys and values of new tokens, then attend to all tokens."""


def attention(q: Queries, k: Past, v: Past) -> Queries:
    """Causal attention of the newest `time` tokens to all, scaled by 1 / sqrt(head_dim).

    A group of consecutive query heads shares one key and value head (GQA, arXiv 2305.13245).
    """
    time, past = q.shape[2], k.shape[2] - q.shape[2]
    # is_causal aligns its mask to the first key, so new tokens after a past need their own.
    mask = None
    if past and time > 1:
        mask = torch.ones(time, past + time, dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=not past and time > 1, enable_gqa=True
    )


class QuantizedCache:
    """A cache whose keys and values are stored in a format.

    Args:
        format: a KVFormat, or a name that `kv_format` knows.

    >>> cache = QuantizedCache("int4")
    >>> q, k, v = torch.ones(1, 4, 10, 64), torch.ones(1, 2, 10, 64), torch.ones(1, 2, 10, 64)
    >>> cache.attend(q, k, v, layer=0).shape
    torch.Size([1, 4, 10, 64])
    >>> cache.bytes_per_token                # 2 heads x 2 x 64 values of 4 + 32 / 32 bits
    160.0
    """

    def __init__(self, format: str | KVFormat):
        self.format = kv_format(format)
        self.stores: dict[int, tuple[Store, Store]] = {}

    @property
    def length(self) -> int:
        """Tokens that every layer has seen; within a step, that some have."""
        return min((len(keys) for keys, _ in self.stores.values()), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes in use of all stored tensors; buffers reserve up to twice what was ever in use."""
        return sum(store.nbytes for pair in self.stores.values() for store in pair)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of all layers for one token of one sequence, on average so far."""
        filled = [keys for keys, _ in self.stores.values() if len(keys)]
        batch = filled[0].recent.data.shape[0] if filled else 1
        return self.nbytes / (max(1, self.length) * batch)

    def attend(self, q: Queries, k: Past, v: Past, layer: int) -> Queries:
        """Append the keys and values of new tokens, then attend to all tokens.

        Rotated keys are met by rotated queries, and rotated values are turned back in the output,
        so the past itself is not. One new token reads packed tokens where they lie, if there is a
        kernel for them. Raises ValueError, with the layer, for what cannot be stored; the cache is
        then as it was.
        """
        keys, values = self._stores(layer)
        k, v = self._rounded(k, v, layer)
        q = rotated(q).to(q.dtype) if self.format.rotate else q
        if direct.why_not(q, keys, values):
            # What a gradient of q still needs must not lie where a later token is written.
            copy = torch.is_grad_enabled() and q.requires_grad
            past = keys.extend(k), values.extend(v)
            y = attention(q, *(x.to(q.dtype, copy=copy) for x in past))
        else:
            keys.append(k)
            values.append(v)
            y = direct.attend(q, keys, values)
        return rotated(y, back=True).to(y.dtype) if self._turns_values else y

    def update(self, k: Past, v: Past, layer: int) -> tuple[Past, Past]:
        """Append the keys and values of new tokens; return those of all tokens, dequantized.

        They are in the dtype of `k` and `v` and in their basis, rotated or not. Under
        `torch.no_grad` they may be views of the cache: not to be changed, and valid until the next
        token comes. Raises what `attend` raises.
        """
        keys, values = map(Store.extend, self._stores(layer), self._rounded(k, v, layer))
        if self.format.rotate:
            keys = rotated(keys, back=True)
        if self._turns_values:
            values = rotated(values, back=True)
        copy = torch.is_grad_enabled()
        return keys.to(k.dtype, copy=copy), values.to(v.dtype, copy=copy)

    def select(self, rows: Tensor) -> None:
        """Keep these sequences of the batch, in this order (beam search)."""
        for pair in self.stores.values():
            for store in pair:
                store.select(rows)

    @property
    def _turns_values(self) -> bool:
        return self.format.rotate == "keys+values"

    def _rounded(self, k: Past, v: Past, layer: int) -> tuple[New, New]:
        """Keys and values as they will be stored: neither is, until both can be."""
        keys, values = self._stores(layer)
        new = keys.rounded(k), values.rounded(v)
        if k.shape[:3] != v.shape[:3]:
            found = f"keys {list(k.shape)} and values {list(v.shape)}"
            raise ValueError(f"layer {layer}: {found} differ in batch, heads or tokens")
        return new

    def _stores(self, layer: int) -> tuple[Store, Store]:
        if layer not in self.stores:
            form, at = self.format, f"layer {layer}:"
            shared, turns = (form.window, form.sinks, form.dtype), self._turns_values
            self.stores[layer] = (
                Store(form.keys, form.key_axis, *shared, f"{at} keys", bool(form.rotate)),
                Store(form.values, form.value_axis, *shared, f"{at} values", turns),
            )
        return self.stores[layer]


class DenseCache(QuantizedCache):
    """A cache that keeps every key and value as it comes, or in another dtype.

    >>> cache = DenseCache(torch.float16)
    >>> _ = cache.update(torch.ones(1, 2, 10, 64), torch.ones(1, 2, 10, 64), layer=0)
    >>> cache.bytes_per_token                # 2 heads x 2 x 64 values of 2 bytes
    512.0
    """

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__(KVFormat(dtype=dtype))


class _ThroughCache:
    def __init__(self, model, format: KVFormat, chunk: int):
        self.model, self.format, self.chunk = model, format, chunk
        self.config, self.head, self.parameters = model.config, model.head, model.parameters

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        cache = cache or QuantizedCache(self.format)
        parts = [self.model.hidden(part, cache) for part in tokens.split(self.chunk, dim=1)]
        return torch.cat(parts, dim=1)


def through_cache(model, format: str | KVFormat, chunk: int = 32):
    """A model as it predicts with a cache of this format, for `qlib.divergence` and `perplexity`.

    Args:
        model: a `qlib.model.Decoder`.
        format: a KVFormat, or a name of one.
        chunk: tokens that go through the model at once. Every window of tokens is read through a
            fresh cache, which packs and returns old tokens as it does when a text is generated.
            A window that slides depends on it: the first token of a chunk sees up to chunk - 1
            fewer tokens in full precision than if it had come alone. So do groups by channel:
            tokens of one chunk read each other as they came, so more than a group flatters them.

    Returns an object with `hidden`, `head`, `config` and `parameters`.
    """
    require_model(model)
    if chunk < 1:
        raise ValueError(f"chunk must be a positive number of tokens, got {chunk}")
    return _ThroughCache(model, kv_format(format), chunk)
