"""Text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import tokenizers


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer that adds nothing to the text: whoever wants a BOS token puts `bos_id` first.

    Args:
        backend: the Rust tokenizer that does the work.
        bos_id: id of the token that begins a document, or None.
        eos_id: id of the token that ends one, or None.
    """

    backend: tokenizers.Tokenizer
    bos_id: int | None = None
    eos_id: int | None = None

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Special tokens that are spelled out in it become their own ids."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids` (a list or a tensor of one dimension), special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)
