"""The same cache for transformers: `model.generate(..., past_key_values=HFCache("kivi2"))`.

transformers asks a cache for the keys and values of all tokens and attends by itself, so here they
are dequantized at every step. Needs transformers 5.
"""

from __future__ import annotations

import torch
import transformers.cache_utils as hf
from torch import Tensor

from . import QuantizedCache
from .format import KVFormat


class HFCache(hf.Cache):
    """A drop-in cache for causal language models of transformers with full attention.

    Args:
        format: a KVFormat, or a name that `qlib.cache.names.kv_format` knows.

    `own` is the QuantizedCache that holds the bytes: `own.nbytes`, `own.bytes_per_token`.
    """

    def __init__(self, format: str | KVFormat):
        super().__init__(layers=[])
        self.own = QuantizedCache(format)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        """Append to one layer; return the keys and values of all its tokens."""
        while len(self.layers) <= layer_idx:
            self.layers.append(_Layer(self.own, len(self.layers)))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class _Layer(hf.CacheLayerMixin):
    """One layer's stores, in the words of transformers."""

    supports_early_init = False

    def __init__(self, own: QuantizedCache, index: int):
        super().__init__()
        self.own, self.index = own, index

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Stores make themselves when the first tokens arrive."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append; return the keys and values of all tokens."""
        return self.own.update(key_states, value_states, self.index)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return len(self.own.stores[self.index][0]) if self.index in self.own.stores else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the new tokens see, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.own.stores.pop(self.index, None)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the sequences of the beams that live on."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences of the batch."""
        for store in self.own.stores.get(self.index, ()):
            store.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        if self.get_seq_length():
            for store in self.own.stores[self.index]:
                rows = torch.arange(store.recent.data.shape[0])
                store.select(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises NotImplementedError: a group that is packed cannot give a token back."""
        if tokens_to_remove:
            raise NotImplementedError("a quantized cache cannot forget its newest tokens")
