"""Text to tokens for tools/train_own_model.py: documents, tokenizer, token streams, batches."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

BOS, EOS = 0, 1
SPECIAL = ["<|bos|>", "<|eos|>"]


def documents(path: Path) -> list[str]:
    """Return the documents of an .xz text file, which lines of ``<|end|>`` separate."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        parts = file.read().split("\n<|end|>\n")
    return [part.strip() for part in parts if part.strip()]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE in which every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def prepare(corpus: Path, out: Path, vocab_size: int) -> None:
    """Write tokenizer.json and the token streams train.npy and val.npy to ``out``, once."""
    # val.npy is written last, so its presence means that all three files are whole.
    if (out / "val.npy").exists():
        return
    out.mkdir(parents=True, exist_ok=True)
    texts = {split: documents(corpus / f"{split}.txt.xz") for split in ("train", "val")}
    tokenizer = train_tokenizer(texts["train"], vocab_size)
    tokenizer.save(str(out / "tokenizer.json"))
    for split, parts in texts.items():
        stream: list[int] = []
        for encoding in tokenizer.encode_batch(parts):
            stream += [BOS, *encoding.ids, EOS]
        np.save(out / f".{split}.npy", np.array(stream, dtype=np.uint16))
        (out / f".{split}.npy").replace(out / f"{split}.npy")


def windows(stream: np.ndarray, starts: np.ndarray, length: int) -> Tensor:
    """Return the windows [len(starts), length] of the stream as int64 tokens."""
    return torch.from_numpy(np.stack([stream[s : s + length] for s in starts]).astype(np.int64))


def batch_at(stream: np.ndarray, step: int, batch: int, context: int, seed: int) -> Tensor:
    """Return the token windows [batch, context + 1] of one step: a function of step and seed.

    An epoch cuts the stream into windows at a random offset and visits them in a random order.
    Half of the windows get <|bos|> as first token, so that the model knows both kinds of start.
    """
    per_epoch = (len(stream) - 2 * context) // context // batch
    epoch, place = divmod(step, per_epoch)
    rng = np.random.default_rng([seed, epoch])
    offset = rng.integers(context)
    order = rng.permutation(per_epoch * batch)[place * batch : (place + 1) * batch]
    tokens = windows(stream, offset + order * context, context + 1)
    tokens[: batch // 2, 0] = BOS
    return tokens
