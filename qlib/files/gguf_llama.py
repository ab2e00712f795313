"""A Llama or Qwen2 in a GGUF file: its names, row order, metadata and tokenizer.

In a Llama, llama.cpp rotates neighboring pairs of a head where Hugging Face rotates its two halves,
so the rows of q and k are stored in another order. Everything else, and all of a Qwen2, is the
checkpoint under other names.
"""

from __future__ import annotations

import os
import re
from typing import Any

import numpy as np
import tokenizers
import torch
from jaxtyping import Float, Shaped
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from torch import Tensor

from .. import ggml
from ..config import ARCHITECTURES
from ..errors import FormatError
from ..linear import QLinear, replace_layer
from ..model import Config, Decoder
from ..qtensor import QTensor
from ..tokenizer import Tokenizer
from . import gguf
from .assemble import assemble

OUTSIDE_BLOCKS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
BLOCK_NAME = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)")
# The divisors of the rotary frequencies of a Llama 3.1, [head_dim / 2].
ROPE_FACTORS = "rope_freqs.weight"
# The same names the other way, for those who write files.
TO_OUTSIDE = {ours: theirs for theirs, ours in OUTSIDE_BLOCKS.items()}
TO_BLOCK = {ours: theirs for theirs, ours in IN_BLOCK.items()}
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
CONTROL, USER_DEFINED = 3, 4
REQUIRED = object()

# How text is cut before the byte pairs are merged; the names are those of tokenizer.ggml.pre.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
SPLITS = {
    "smollm": (r"\p{N}", GPT2),
    "gpt-2": (GPT2,),
    "llama-bpe": (LLAMA3,),
    "qwen2": (QWEN2,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}


def load(
    path: str | os.PathLike, dtype: torch.dtype = torch.float32, packed: bool = False
) -> tuple[Decoder, Tokenizer]:
    """Load a Llama or Qwen2 and its tokenizer from a GGUF file.

    Args:
        path: the file.
        dtype: floating-point type of the parameters; every tensor is decoded on its own.
        packed: linear layers in a block format become QLinear and keep their bytes.

    Raises FormatError if the file is malformed, or holds another architecture or tensor type.
    """
    file = gguf.read(path)
    config = read_config(file)
    stored = {hf_name(file, name): name for name in file.tensors if name != ROPE_FACTORS}
    shapes = {name: file.tensors[source].shape for name, source in stored.items()}

    def fetch(name: str) -> Tensor:
        weight = file.tensor(stored[name])
        if not bool(weight.isfinite().all()):
            message = "holds NaN or infinite weights; the file is damaged"
            raise FormatError(path, stored[name], message, file.tensors[stored[name]].start)
        heads = heads_in_pairs(config, stored[name])
        return (halves_from_pairs(weight, heads) if heads else weight).to(dtype)

    def blocks(name: str) -> QTensor | None:
        """The rows of a linear layer in our order, as they are stored, if they are blocks."""
        info = file.tensors[stored[name]]
        form = next((f for f in ggml.FORMATS.values() if f.kind == info.kind), None)
        if form is None or not name.startswith("model.layers"):
            return None
        rows = torch.from_numpy(file.raw(stored[name]).reshape(info.shape[0], -1).copy())
        heads = heads_in_pairs(config, stored[name])
        return QTensor(
            form, info.shape, {"blocks": halves_from_pairs(rows, heads) if heads else rows}
        )

    model = assemble(path, config, shapes, fetch)
    for name in stored if packed else ():
        q = blocks(name)
        if q is not None:
            layer = name.removesuffix(".weight")
            replace_layer(model, layer, QLinear(q, model.get_submodule(layer).bias))
    return model, read_tokenizer(file, config)


def hf_name(file: gguf.Gguf, name: str) -> str:
    """The Hugging Face name of a tensor. Raises FormatError for a name that no decoder has."""
    if name in OUTSIDE_BLOCKS:
        return OUTSIDE_BLOCKS[name]
    match = BLOCK_NAME.fullmatch(name)
    if match and match[2] in IN_BLOCK:
        return f"model.layers.{match[1]}.{IN_BLOCK[match[2]]}.{match[3]}"
    message = "this tensor is not part of a Llama or Qwen2 decoder"
    raise FormatError(file.path, name, message, file.tensors[name].start)


def gguf_name(name: str) -> str:
    """The inverse of `hf_name`. Raises ValueError for a parameter that no decoder has."""
    match = LAYER_NAME.fullmatch(name)
    if match and match[2] in TO_BLOCK:
        return f"blk.{match[1]}.{TO_BLOCK[match[2]]}.{match[3]}"
    if name not in TO_OUTSIDE:
        raise ValueError(f"{name}: a Llama in a GGUF file has no such tensor")
    return TO_OUTSIDE[name]


def heads_in_pairs(config: Config, name: str) -> int:
    """How many heads of a tensor have their rows in pairs in the file; 0 if it has our order."""
    if config.model_type != "llama":
        return 0
    if name.endswith("attn_q.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("attn_k.weight") else 0


def halves_from_pairs(weight: Float[Tensor, "out in"], heads: int) -> Float[Tensor, "out in"]:
    """Reorder the rows of each head from (pair, member) to (member, pair)."""
    pairs = weight.unflatten(0, (heads, -1, 2))
    return pairs.transpose(1, 2).flatten(0, 2).contiguous()


def pairs_from_halves(rows: Shaped[Tensor, "out row"], heads: int) -> Shaped[Tensor, "out row"]:
    """The inverse order, of the rows of weights or of packed rows: from (member, pair) back."""
    halves = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def read_config(file: gguf.Gguf) -> Config:
    """The sizes of the model, from the metadata. Raises FormatError if one is missing or wrong."""
    if file.metadata.get("general.type") == "imatrix":
        message = "is 'imatrix': the file holds importances; give it as importance= of a mix"
        raise FormatError(file.path, "general.type", message)
    architecture = _get(file, "general.architecture", str)
    if architecture not in ARCHITECTURES:
        need = " or ".join(map(repr, ARCHITECTURES))
        message = f"is {architecture!r:.80}, which is not supported; need {need}"
        raise FormatError(file.path, "general.architecture", message)
    heads = _get(file, f"{architecture}.attention.head_count", int)
    hidden = _get(file, f"{architecture}.embedding_length", int)
    head_dim = _get(file, f"{architecture}.attention.key_length", int, hidden // max(heads, 1))
    _need(file, f"{architecture}.attention.value_length", head_dim)
    _need(file, f"{architecture}.rope.dimension_count", head_dim)
    _need(file, f"{architecture}.rope.scaling.type", "none")
    sizes = {
        "vocab_size": len(_get(file, "tokenizer.ggml.tokens", list)),
        "hidden_size": hidden,
        "intermediate_size": _get(file, f"{architecture}.feed_forward_length", int),
        "num_hidden_layers": _get(file, f"{architecture}.block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": _get(file, f"{architecture}.attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "max_position_embeddings": _get(file, f"{architecture}.context_length", int),
        "rms_norm_eps": _positive(file, f"{architecture}.attention.layer_norm_rms_epsilon"),
        "rope_theta": _positive(file, f"{architecture}.rope.freq_base", 10000.0),
        "bos_token_id": _token_id(file, "bos"),
        "eos_token_id": _token_id(file, "eos"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_scaling": _rope_factors(file, architecture, head_dim),
        "model_type": architecture,
    }
    try:
        return Config(**sizes)
    except ValueError as error:
        raise FormatError(file.path, "config", str(error)) from error


def _rope_factors(file: gguf.Gguf, architecture: str, head_dim: int) -> tuple[float, ...] | None:
    if ROPE_FACTORS not in file.tensors:
        return None
    info = file.tensors[ROPE_FACTORS]
    if architecture != "llama":
        message = f"llama.cpp gives a {architecture} no such tensor"
    elif info.shape != (head_dim // 2,):
        message = f"has shape {list(info.shape)}; need half of the head, [{head_dim // 2}]"
    else:
        factors = file.tensor(ROPE_FACTORS)
        if ((factors > 0) & factors.isfinite()).all():
            return tuple(factors.tolist())
        message = "needs positive and finite factors"
    raise FormatError(file.path, ROPE_FACTORS, message, info.start)


def read_tokenizer(file: gguf.Gguf, config: Config) -> Tokenizer:
    """The byte-level BPE tokenizer of the metadata.

    Raises FormatError if it is of another kind, or if tokens and merges do not fit together.
    """
    kind = _get(file, "tokenizer.ggml.model", str)
    if kind != "gpt2":
        message = f"is {kind!r:.80}; only byte-level BPE ('gpt2') is read"
        raise FormatError(file.path, "tokenizer.ggml.model", message)
    tokens = _get(file, "tokenizer.ggml.tokens", list)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise FormatError(file.path, "tokenizer.ggml.tokens", "a token is repeated")
    name = _get(file, "tokenizer.ggml.pre", str, "default")
    if name not in SPLITS:
        message = f"pre-tokenizer {name!r:.80} is unknown; need one of {', '.join(SPLITS)}"
        raise FormatError(file.path, "tokenizer.ggml.pre", message)
    # Llama 3 takes a piece that is a token as it is, without looking at the merges.
    model = models.BPE(vocabulary, _merges(file, vocabulary), ignore_merges=name == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    splits = [pre_tokenizers.Split(Regex(split), "isolated") for split in SPLITS[name]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    _add_special(file, backend, tokens)
    return Tokenizer(backend, config.bos_token_id, config.eos_token_id)


def _merges(file: gguf.Gguf, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = [tuple(merge.split(" ")) for merge in _get(file, "tokenizer.ggml.merges", list)]
    for merge in merges:
        if len(merge) != 2 or not vocabulary.keys() >= {*merge, "".join(merge)}:
            message = f"{' '.join(merge)!r:.80} does not join two tokens to a third"
            raise FormatError(file.path, "tokenizer.ggml.merges", message)
    return merges


def _add_special(file: gguf.Gguf, backend: tokenizers.Tokenizer, tokens: list[str]) -> None:
    """Register control and user-defined tokens, which are found in a text before it is cut."""
    kinds = _get(file, "tokenizer.ggml.token_type", np.ndarray, np.ones(len(tokens), np.int32))
    if len(kinds) != len(tokens):
        message = f"has {len(kinds)} entries for {len(tokens)} tokens"
        raise FormatError(file.path, "tokenizer.ggml.token_type", message)
    for index in np.flatnonzero((kinds == CONTROL) | (kinds == USER_DEFINED)):
        special = bool(kinds[index] == CONTROL)
        backend.add_tokens([AddedToken(tokens[index], normalized=False, special=special)])


def _get(file: gguf.Gguf, key: str, kind: type, default: Any = REQUIRED) -> Any:
    """The metadata value of `key`, which must be of type `kind`."""
    value = file.metadata.get(key, default)
    if value is REQUIRED:
        raise FormatError(file.path, key, "this metadata key is missing")
    if type(value) is not kind:
        message = f"has a value of type {type(value).__name__}; need {kind.__name__}"
        raise FormatError(file.path, key, message)
    return value


def _need(file: gguf.Gguf, key: str, expected: int | str) -> None:
    """Refuse a file whose optional `key` says anything but the one value that is supported."""
    value = _get(file, key, type(expected), expected)
    if value != expected:
        raise FormatError(file.path, key, f"is {value!r:.80}; only {expected!r} is supported")


def _positive(file: gguf.Gguf, key: str, default: Any = REQUIRED) -> float:
    value = _get(file, key, float, default)
    # Written as float32: the shortest decimal that rounds to it is the number that was meant.
    with np.errstate(over="ignore"):
        value = float(str(np.float32(value)))
    if not 0 < value < float("inf"):
        raise FormatError(file.path, key, f"is {value}; need a positive number")
    return value


def _token_id(file: gguf.Gguf, which: str) -> int | None:
    key = f"tokenizer.ggml.{which}_token_id"
    value = _get(file, key, int, None) if key in file.metadata else None
    if value is not None and not 0 <= value < len(_get(file, "tokenizer.ggml.tokens", list)):
        raise FormatError(file.path, key, f"is {value}, which is not a token")
    return value
