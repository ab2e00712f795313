"""Llamas in GGUF files written by the gguf package: same function, same tokens, no surprises."""

from __future__ import annotations

import random
import resource
import struct
import time

import gguf as peer
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from qlib.errors import FormatError
from qlib.files import gguf, gguf_llama
from qlib.model import Config, Decoder

TOKENS = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġthe", "<|end|>", "<user>"]
MERGES = ["t h", "th e", "Ġ the"]
TYPES = [1] * (len(TOKENS) - 2) + [3, 4]
CONFIG = Config(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    rope_theta=5000.0,
    tie_word_embeddings=False,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=TOKENS.index("<|end|>"),
)
THEIR_NAMES = peer.get_tensor_name_map(peer.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)


def pairs_from_halves(weight, heads):
    """Row by row, as a rotary pair is defined: rows i and i + head_dim/2 become 2i and 2i + 1."""
    size = len(weight) // heads
    out = np.empty_like(weight)
    for row in range(len(weight)):
        head, inside = divmod(row, size)
        member, pair = divmod(inside, size // 2)
        out[head * size + 2 * pair + member] = weight[row]
    return out


def decoder(**changes):
    config = Config(**{**CONFIG.__dict__, **changes})
    generator = torch.Generator().manual_seed(0)
    model = Decoder(config).normal_init(0.1, generator).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def write(path, model, metadata=(), drop=(), quantize=None, permute=True):
    config = model.config
    writer = peer.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(config.eos_token_id)
    for key in drop:
        del writer.kv_data[0][key]
    for key, value, kind in metadata:
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, kind)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if permute and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_" in name else config.num_key_value_heads
            array = pairs_from_halves(array, heads)
        theirs = THEIR_NAMES.get_name(name, try_suffixes=(".weight",))
        if quantize and array.ndim == 2:
            array = peer.quants.quantize(array, quantize)
            writer.add_tensor(theirs, array, raw_dtype=quantize)
        else:
            writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def prompt():
    return torch.randint(len(TOKENS), (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("tied", [False, True])
def test_weights_config_and_logits_come_back(tmp_path, tied):
    model = decoder(tie_word_embeddings=tied)
    loaded, _ = gguf_llama.load(write(tmp_path / "m.gguf", model))
    assert loaded.config == model.config
    assert {n: tuple(t.shape) for n, t in loaded.state_dict().items()} == {
        n: tuple(t.shape) for n, t in model.state_dict().items()
    }
    assert torch.equal(loaded(prompt()), model(prompt()))
    assert not any(p.requires_grad for p in loaded.parameters())


def test_without_the_row_order_the_function_is_another(tmp_path):
    model = decoder()
    loaded, _ = gguf_llama.load(write(tmp_path / "m.gguf", model, permute=False))
    assert (loaded(prompt()) - model(prompt())).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_stored_types(tmp_path, name):
    kind = peer.GGMLQuantizationType[name]
    model = decoder()
    loaded, _ = gguf_llama.load(write(tmp_path / "m.gguf", model, quantize=kind))
    for key, weight in model.state_dict().items():
        found = loaded.state_dict()[key]
        if weight.ndim == 2:
            stored = peer.quants.quantize(weight.numpy(), kind)
            weight = torch.from_numpy(peer.quants.dequantize(stored, kind))
        assert torch.equal(found, weight), key


def test_dtype(tmp_path):
    loaded, _ = gguf_llama.load(write(tmp_path / "m.gguf", decoder()), torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_tokens(tmp_path):
    tokenizer = gguf_llama.load(write(tmp_path / "m.gguf", decoder()))[1]
    ids = tokenizer.encode("then the 12<|end|>é")
    assert [TOKENS[i] for i in ids] == ["the", "n", "Ġthe", "Ġ", "1", "2", "<|end|>", "Ã", "©"]
    assert tokenizer.decode(torch.tensor(ids)) == "then the 12<|end|>é"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (261, None, 259)


PIECES = {
    "smollm": ["It", "'s", "Ġ", "2", "0", "2", "4", ",", "ĠOK", "Ġ", "Ġx"],
    "gpt-2": ["It", "'s", "Ġ2024", ",", "ĠOK", "Ġ", "Ġx"],
    "llama-bpe": ["It", "'s", "Ġ", "202", "4", ",", "ĠOK", "Ġ", "Ġx"],
    "qwen2": ["It", "'s", "Ġ", "2", "0", "2", "4", ",", "ĠOK", "Ġ", "Ġx"],
    "default": ["It", "'", "s", "Ġ", "202", "4", ",", "ĠOK", "Ġ", "Ġx"],
}


@pytest.mark.parametrize("pre", PIECES)
def test_pre_tokenizers(tmp_path, pre):
    string = peer.GGUFValueType.STRING
    path = write(tmp_path / "m.gguf", decoder(), [("tokenizer.ggml.pre", pre, string)])
    backend = gguf_llama.load(path)[1].backend
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("It's 2024, OK  x")]
    assert pieces == PIECES[pre]


VALUE = peer.GGUFValueType
BAD = {
    "architecture": (
        [("general.architecture", "gemma", VALUE.STRING)],
        "general.architecture': is 'gemma', which is not supported; need 'llama' or 'qwen2'",
    ),
    "imatrix": (
        [("general.type", "imatrix", VALUE.STRING)],
        "general.type': is 'imatrix': the file holds importances; give it as importance= of a mix",
    ),
    "type": (
        [("llama.block_count", "2", VALUE.STRING)],
        "llama.block_count': has a value of type str; need int",
    ),
    "layers": (
        [("llama.block_count", 2**32 - 1, VALUE.UINT32)],
        "model.layers.2.input_layernorm.weight': this tensor is missing",
    ),
    "fewer layers": (
        [("llama.block_count", 1, VALUE.UINT32)],
        "model.layers.1.input_layernorm.weight': "
        "this tensor is not part of a llama decoder of this config",
    ),
    "heads": (
        [("llama.attention.head_count", 0, VALUE.UINT32)],
        "config': config: num_attention_heads must be a positive integer, got 0",
    ),
    "shape": (
        [("llama.feed_forward_length", 2**62, VALUE.UINT64)],
        "model.layers.0.mlp.gate_proj.weight': has shape [96, 64], but the config needs "
        f"[{2**62}, 64]",
    ),
    "epsilon": (
        [("llama.attention.layer_norm_rms_epsilon", float("nan"), VALUE.FLOAT32)],
        "llama.attention.layer_norm_rms_epsilon': is nan; need a positive number",
    ),
    "rope": (
        [("llama.rope.scaling.type", "yarn", VALUE.STRING)],
        "llama.rope.scaling.type': is 'yarn'; only 'none' is supported",
    ),
    "rope size": (
        [("llama.rope.dimension_count", 8, VALUE.UINT32)],
        "llama.rope.dimension_count': is 8; only 16 is supported",
    ),
    "eos": (
        [("tokenizer.ggml.eos_token_id", 261, VALUE.UINT32)],
        "tokenizer.ggml.eos_token_id': is 261, which is not a token",
    ),
    "tokenizer": (
        [("tokenizer.ggml.model", "llama", VALUE.STRING)],
        "tokenizer.ggml.model': is 'llama'; only byte-level BPE ('gpt2') is read",
    ),
    "pre": (
        [("tokenizer.ggml.pre", "gemma", VALUE.STRING)],
        "tokenizer.ggml.pre': pre-tokenizer 'gemma' is unknown; "
        "need one of smollm, gpt-2, llama-bpe, qwen2, default",
    ),
    "merge": (
        [("tokenizer.ggml.merges", ["t z"], VALUE.ARRAY)],
        "tokenizer.ggml.merges': 't z' does not join two tokens to a third",
    ),
    "token types": (
        [("tokenizer.ggml.token_type", [1, 1], VALUE.ARRAY)],
        "tokenizer.ggml.token_type': has 2 entries for 261 tokens",
    ),
    "repeated token": (
        [("tokenizer.ggml.tokens", [*TOKENS[:-1], "the"], VALUE.ARRAY)],
        "tokenizer.ggml.tokens': a token is repeated",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_refused(tmp_path, name):
    metadata, message = BAD[name]
    path = write(tmp_path / "m.gguf", decoder(), metadata)
    with pytest.raises(FormatError) as caught:
        gguf_llama.load(path)
    assert str(caught.value) == f"{path}: field '{message}"


def test_missing_key_and_unknown_tensors(tmp_path):
    path = write(tmp_path / "m.gguf", decoder(), drop=["llama.embedding_length"])
    with pytest.raises(FormatError, match="embedding_length': this metadata key is missing"):
        gguf_llama.load(path)
    file = gguf.read(write(tmp_path / "n.gguf", decoder()))
    start = file.tensors["output.weight"].start
    message = "this tensor is not part of a Llama or Qwen2 decoder"
    for name in ("blk.00.attn_q.weight", "blk.0.attn_q.scale", "token_embd.bias"):
        file.tensors[name] = file.tensors["output.weight"]
        with pytest.raises(FormatError) as caught:
            gguf_llama.hf_name(file, name)
        assert str(caught.value) == f"{file.path}: field '{name}' at byte {start}: {message}"


def mutate(content, rng, head):
    """One hostile change, mostly before byte `head`, where sizes and names are."""
    bad = bytearray(content)
    at = rng.randrange(head if rng.random() < 0.9 else len(bad) - 8)
    kind = rng.randrange(5)
    if kind == 0:
        bad[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        bad[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 2**31, 2**60, 2**63, 2**64 - 1]))
    elif kind == 2:
        del bad[at:]
    elif kind == 3:
        del bad[at : at + rng.randrange(1, 40)]
    else:
        bad[at:at] = rng.randbytes(rng.randrange(1, 40))
    return bytes(bad)


def test_mutated_files_load_or_raise_format_error(tmp_path):
    content = write(tmp_path / "good.gguf", decoder()).read_bytes()
    head = min(info.start for info in gguf.read(tmp_path / "good.gguf").tensors.values())
    rng, path, outcomes = random.Random(0), tmp_path / "bad.gguf", {"loads": 0, "refused": 0}
    gguf_llama.load(tmp_path / "good.gguf")
    memory, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    for _ in range(700):
        path.unlink(missing_ok=True)
        path.write_bytes(mutate(content, rng, head))
        try:
            gguf_llama.load(path)
            outcomes["loads"] += 1
        except FormatError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 50
    assert time.process_time() - start < 200
    # In kilobytes: nothing that a 1 MB file says may make the process grow by 100 MB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 100_000
