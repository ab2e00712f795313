"""Calibration: run text through a model block by block.

Only one block's inputs exist at a time. A block's inputs come from the blocks before it as they are
by then, so when each block is quantized before the next is asked for, later blocks see, and can
make up for, the errors of earlier ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor, nn

from .block import Block, Call, Stats
from .protocol import encoded
from .structure import decoder_blocks

__all__ = ["Block", "Calibration", "Call", "Stats", "calibrated_blocks"]

CONTEXT = 256
BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Calibration:
    """The tokens that a model is calibrated on, as windows that it reads one by one.

    Args:
        windows: token ids, [time] each; windows may differ in length, and none is ever padded.
        bos: the token that every window starts with, or None.

    >>> Calibration.of(torch.arange(600), context=256)
    600 tokens in 3 windows of up to 256, all used
    """

    windows: tuple[Int[Tensor, " time"], ...]
    bos: int | None = None

    @classmethod
    def text(
        cls, tokenizer, text: str = "calibration", tokens: int | None = 8192,
        context: int = CONTEXT,
    ) -> Calibration:  # fmt: skip
        """The first `tokens` tokens of a text that `qlib.texts` knows, or of a file.

        Every window starts with the tokenizer's BOS, as it does when quality is measured. Raises
        ValueError if the text has fewer tokens than asked for.
        """
        ids = encoded(tokenizer, text)
        if tokens is not None and len(ids) < tokens:
            raise ValueError(f"text {text!r} has {len(ids):,} tokens, {tokens:,} were asked for")
        return cls.of(torch.tensor(ids[:tokens]), context, tokenizer.bos_id)

    @classmethod
    def of(cls, tokens, context: int = CONTEXT, bos: int | None = None) -> Calibration:
        """Cut tokens into windows of `context`; the rest at the end is a shorter window.

        Args:
            tokens: ids [n] of one long text; several texts, as a list of such; or a tokenizer's
                output with `input_ids` [n, time] and `attention_mask` (its padding is removed).
            bos: id of a token to put before every window; it is one of the `context`.

        Raises ValueError if there are fewer tokens than one context.
        """
        if isinstance(tokens, Calibration):
            return tokens
        if isinstance(tokens, str):
            raise ValueError("calibration is token ids; for text: Calibration.text(tokenizer, ...)")
        samples = [torch.as_tensor(sample) for sample in _samples(tokens)]
        for sample in samples:
            if sample.ndim != 1 or sample.is_floating_point():
                found = f"{sample.dtype} {list(sample.shape)}"
                raise ValueError(f"calibration tokens are integer ids [n], got {found}")
        total = sum(map(len, samples))
        if total < context:
            remedy = f"give more text, or Calibration.of(tokens, context={max(1, total)})"
            raise ValueError(
                f"calibration has {total} tokens, fewer than one context of {context}: {remedy}"
            )
        head = torch.tensor([] if bos is None else [bos], dtype=torch.long)
        pieces = (w for s in samples for w in s.long().split(context - len(head)) if len(w))
        return cls(tuple(torch.cat([head, piece]) for piece in pieces), bos)

    @property
    def tokens(self) -> int:
        """How many tokens were given; what stands before the windows is not counted."""
        return sum(len(window) - (self.bos is not None) for window in self.windows)

    def batches(self, size: int | None = None) -> Iterator[Int[Tensor, "batch time"]]:
        """Windows of one length stacked, `size` at most (default: 2,048 tokens a batch)."""
        for length in sorted({len(window) for window in self.windows}, reverse=True):
            same = [window for window in self.windows if len(window) == length]
            step = size or max(1, BATCH_TOKENS // length)
            for start in range(0, len(same), step):
                yield torch.stack(same[start : start + step])

    def __str__(self) -> str:
        longest = max(map(len, self.windows), default=0)
        start = "" if self.bos is None else " with a BOS each"
        windows = f"{len(self.windows)} windows of up to {longest}{start}"
        return f"{self.tokens:,} tokens in {windows}, all used"

    __repr__ = __str__


def _samples(tokens) -> Sequence:
    if isinstance(tokens, Mapping):
        mask = tokens.get("attention_mask")
        ids = torch.as_tensor(tokens["input_ids"])
        keep = torch.ones_like(ids) if mask is None else torch.as_tensor(mask)
        return [row[kept.bool()] for row, kept in zip(ids, keep)]
    if isinstance(tokens, Tensor):
        return [tokens] if tokens.ndim == 1 else list(tokens)
    return [tokens] if len(tokens) and isinstance(tokens[0], int) else tokens


def calibrated_blocks(
    model: nn.Module, calibration: Calibration | None, batch: int | None = None,
    original_inputs: bool = False, targets: bool = False,
) -> Iterator[Block]:  # fmt: skip
    """The decoder blocks of a model in order, each with its inputs on the calibration text.

    Args:
        model: our Decoder or any Hugging Face causal LM.
        calibration: None gives blocks without inputs.
        batch: windows in a batch; it changes the time and the memory, not the result.
        original_inputs: every block's inputs come from the blocks before it as they were, instead
            of from what the caller has made of them.
        targets: also give every block what the original model has after it (`Block.targets`), for
            methods that make up for the errors of earlier blocks. One more pass over the text.

    Raises ValueError if the calibration does not fit the model's vocabulary or its context.
    """
    prefix, blocks = decoder_blocks(model)
    calls: list[list[Call]] = [[] for _ in blocks]
    if calibration is not None:
        _check(model, calibration)
        device = next(model.parameters()).device
        calls = _record(model, blocks, [b.to(device) for b in calibration.batches(batch)])
    hidden = original = [call.hidden for call in calls[0]]
    for i, module in enumerate(blocks):
        inputs = [Call(x, call.args, call.kwargs) for x, call in zip(hidden, calls[i])]
        block = Block(f"{prefix}.{i}", module, inputs)
        is_last = i + 1 == len(blocks)
        if targets:
            teacher = Block(
                block.name, module, [replace(c, hidden=x) for c, x in zip(inputs, original)]
            )
            block.targets = original = teacher.outputs()
        hidden = block.outputs() if original_inputs and not is_last else None
        yield block
        hidden = block.outputs() if hidden is None and not is_last else hidden


def _check(model: nn.Module, calibration: Calibration) -> None:
    config = getattr(model, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    ids = torch.cat(calibration.windows)
    if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        bad = int(ids.max()) if ids.max() >= vocabulary else int(ids.min())
        raise ValueError(
            f"calibration holds token {bad}; the model has a vocabulary of {vocabulary}: "
            "tokenize the text with the model's own tokenizer"
        )
    limit = getattr(config, "max_position_embeddings", None)
    longest = max(map(len, calibration.windows))
    if limit is not None and longest > limit:
        raise ValueError(
            f"calibration windows have {longest} tokens, the model reads {limit}: "
            f"use Calibration.of(tokens, context={limit})"
        )


class _Recorder(nn.Module):
    """Stands where a decoder block was, notes the call and passes the hidden states on."""

    def __init__(self, block: nn.Module, is_last: bool):
        super().__init__()
        self.block, self.is_last = block, is_last
        self.calls: list[Call] = []

    def __getattr__(self, name: str):
        # A model may read attributes of its blocks, such as the kind of their attention.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor:
        self.calls.append(Call(hidden, args, kwargs))
        if self.is_last:
            raise _AllRecorded
        return hidden


class _AllRecorded(Exception):
    """Raised by the last recorder: what follows the blocks need not run."""


@torch.no_grad()
def _record(model: nn.Module, blocks: nn.ModuleList, batches) -> list[list[Call]]:
    """The calls of every block, all with the hidden states of the first one."""
    originals = list(blocks)
    recorders = [_Recorder(block, block is originals[-1]) for block in originals]
    options = {"use_cache": False} if _has_cache(model) else {}
    try:
        for i, recorder in enumerate(recorders):
            blocks[i] = recorder
        for batch in batches:
            try:
                model(batch, **options)
            except _AllRecorded:
                continue
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
    return [recorder.calls for recorder in recorders]


def _has_cache(model: nn.Module) -> bool:
    return "use_cache" in inspect.signature(model.forward).parameters
