"""A byte-level BPE tokenizer as GGUF metadata: what `gguf_llama.read_tokenizer` reads back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from ..tokenizer import Tokenizer
from .gguf_llama import CONTROL, GPT2, SPLITS, USER_DEFINED
from .gguf_write import Metadata

NORMAL, UNUSED = 1, 5
# What llama.cpp leaves out of a tokenizer of that name: Qwen2 first composes characters.
LEFT_OUT = {"qwen2": "NFC"}
# Settings of a BPE model that llama.cpp does not know, with the values that leave them out.
PLAIN = {"dropout": (None, 0.0), "continuing_subword_prefix": (None, ""),
         "end_of_word_suffix": (None, ""), "byte_fallback": (False,)}  # fmt: skip


def metadata(tokenizer: Tokenizer, vocab_size: int, add_bos: bool) -> Metadata:
    """The keys tokenizer.ggml.*: tokens, their kinds, merges, pre-tokenizer, BOS and EOS.

    Args:
        tokenizer: byte-level BPE that cuts text as one of `gguf_llama.SPLITS` does.
        vocab_size: rows of the embedding; what the tokenizer lacks is filled with unused tokens.
        add_bos: whether llama.cpp is to put the BOS before a text.

    Raises ValueError, with the remedy, if llama.cpp would cut or merge text in another way (other
    than by not composing characters for a Qwen2, as no GGUF file of one does).
    """
    state = json.loads(tokenizer.backend.to_str())
    name = _pre_tokenizer(state)
    tokens, kinds = _tokens(tokenizer, state, vocab_size)
    merges = state["model"]["merges"]
    found: dict[str, tuple[str, Any]] = {
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", name),
        "tokenizer.ggml.tokens": ("string[]", tokens),
        "tokenizer.ggml.token_type": ("i32[]", kinds),
        "tokenizer.ggml.merges": (
            "string[]",
            [m if isinstance(m, str) else " ".join(m) for m in merges],
        ),
        "tokenizer.ggml.add_bos_token": ("bool", add_bos),
    }
    for which, token in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id)):
        if token is not None:
            found[f"tokenizer.ggml.{which}_token_id"] = ("u32", token)
    if add_bos and tokenizer.bos_id is None:
        raise _refusal("it has no BOS that could be added; say add_bos=False")
    return found


def _refusal(what: str) -> ValueError:
    remedy = "qlib.save(model, folder, tokenizer) keeps it as it is"
    return ValueError(f"this tokenizer cannot be written to a GGUF file: {what}; {remedy}")


def _pre_tokenizer(state: dict) -> str:
    """The name in `SPLITS` of the way in which text is cut, after everything else is checked."""
    model = state["model"]
    if model["type"] != "BPE":
        raise _refusal(f"its model is {model['type']}, not BPE")
    if (state["decoder"] or {}).get("type") != "ByteLevel":
        raise _refusal("it is not byte-level")
    for key, plain in PLAIN.items():
        if model.get(key, plain[0]) not in plain:
            raise _refusal(f"its {key} is {model[key]!r}")
    found = tuple(map(_canonical, _splits(state["pre_tokenizer"] or {"type": "none"})))
    for name, splits in SPLITS.items():
        # Llama 3 alone takes a piece that is a token without looking at the merges.
        whole = name == "llama-bpe"
        if found == tuple(map(_canonical, splits)) and model["ignore_merges"] == whole:
            normalizer = (state["normalizer"] or {"type": None})["type"]
            if normalizer not in (None, LEFT_OUT.get(name)):
                raise _refusal(f"it normalizes text ({normalizer})")
            return name
    raise _refusal(f"it cuts text in none of the ways that are known ({', '.join(SPLITS)})")


def _splits(pre: dict) -> Iterator[str]:
    """The regular expressions by which text is cut, one after the other."""
    kind = pre["type"]
    if kind == "Sequence":
        for part in pre["pretokenizers"]:
            yield from _splits(part)
    elif kind == "Digits" and pre["individual_digits"]:
        yield r"\p{N}"
    elif kind == "ByteLevel" and not pre["add_prefix_space"]:
        yield from [GPT2] if pre["use_regex"] else []
    elif kind == "Split" and pre["behavior"] == "Isolated" and not pre["invert"]:
        yield from pre["pattern"].values()
    else:
        raise _refusal(f"its pre-tokenizer is {kind} with settings that llama.cpp has not")


def _canonical(split: str) -> str:
    # Whitespace that no alternative took is a piece anyway.
    return split.removesuffix(r"|\s+")


def _tokens(tokenizer: Tokenizer, state: dict, vocab_size: int) -> tuple[list[str], list[int]]:
    by_id = {index: token for token, index in tokenizer.backend.get_vocab(True).items()}
    if max(by_id, default=-1) >= vocab_size:
        raise _refusal(f"it has tokens up to {max(by_id)}, the model {vocab_size}")
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    kinds = [NORMAL if i in by_id else UNUSED for i in range(vocab_size)]
    for added in state["added_tokens"]:
        if added["single_word"] or added["lstrip"] or added["rstrip"]:
            raise _refusal(f"its token {added['content']!r} strips or needs what stands beside it")
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds
