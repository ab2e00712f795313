"""Protocol: which tokens are predicted, and what a model sees when it predicts them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .texts import texts


def encoded(tokenizer, text: str) -> list[int]:
    """The tokens of a text that `qlib.texts` knows, or of a file.

    Raises TypeError if the first argument is no tokenizer.
    """
    if isinstance(tokenizer, str) or not hasattr(tokenizer, "encode"):
        kind = type(tokenizer).__name__
        raise TypeError(f"the tokenizer comes first, then the text; got a {kind}")
    return tokenizer.encode(texts(text))


@dataclass(frozen=True, eq=False)
class Protocol:
    """Everything besides the model that decides a perplexity.

    Args:
        text: name of the text, for the label.
        tokens: its token ids, [n].
        context: tokens that the model sees at once, the beginning-of-sequence token included.
        stride: tokens that a window adds to the score; fewer than `context` means overlap, so
            that more tokens are predicted from a long past.
        bos: id of the token put before every window, or None.
    """

    text: str
    tokens: Int[Tensor, " n"]
    context: int = 256
    stride: int = 256
    bos: int | None = None

    def __post_init__(self):
        if self.context < 2 or not 1 <= self.stride <= self.context:
            raise ValueError(
                f"need 2 <= context and 1 <= stride <= context, got {self.context}, {self.stride}"
            )
        if self.tokens.ndim != 1 or len(self.tokens) < 2:
            raise ValueError(f"a protocol needs 2 or more tokens, got {list(self.tokens.shape)}")

    @classmethod
    def of(
        cls, tokenizer, text: str = "evaluation", tokens: int | None = 2048, context: int = 256,
        stride: int | None = None, bos: bool = True,
    ) -> Protocol:  # fmt: skip
        """The first `tokens` tokens of a text that `qlib.texts` knows, or of a file.

        Raises ValueError if the text has fewer tokens than asked for.
        """
        ids = torch.tensor(encoded(tokenizer, text))
        if tokens is not None and len(ids) < tokens:
            raise ValueError(f"text {text!r} has {len(ids):,} tokens, {tokens:,} were asked for")
        start = tokenizer.bos_id if bos else None
        return cls(str(text), ids[:tokens], context, stride or context, start)

    def same(self, other: Protocol) -> bool:
        """Whether both score the same tokens in the same windows."""
        mine, theirs = (
            [(window.tolist(), score) for window, score in p.windows()] for p in (self, other)
        )
        return self is other or mine == theirs

    def __str__(self) -> str:
        start = "BOS" if self.bos is not None else "no BOS"
        sizes = f"{self.scored:,} tokens, context {self.context}, stride {self.stride}"
        return f"{self.text}, {sizes}, {start}"

    __repr__ = __str__

    @property
    def scored(self) -> int:
        """Tokens that are predicted: all, or all but the first where no BOS precedes it."""
        return sum(score for _, score in self.windows())

    def windows(self) -> Iterator[tuple[Int[Tensor, " time"], int]]:
        """(tokens of a window with the BOS, how many of its last tokens are scored)."""
        room = self.context + 1 - (self.bos is not None)
        head = torch.tensor([] if self.bos is None else [self.bos], dtype=torch.long)
        done = 0
        while done < len(self.tokens):
            stop = min(len(self.tokens), done + (self.stride if done else room))
            window = torch.cat([head, self.tokens[max(0, stop - room) : stop].long()])
            score = min(stop - done, len(window) - 1)
            if score:
                yield window, score
            done = stop
