"""Exported Llamas: every weight that is read back is the one that was stored, exactly."""

from __future__ import annotations

import gguf as peer
import numpy as np
import pytest
import tokenizers
import torch
from tiny_models import MODELS, raises
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

import qlib
from qlib import Calibration, ggml
from qlib.files import gguf, gguf_export, gguf_llama, gguf_tokenizer
from qlib.files.imatrix import Imatrix, measure
from qlib.model import Config, Decoder
from qlib.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = [*BYTES, "th", "the", "Ġthe"]
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
# What tokenizer.json of the model families says, by the name that llama.cpp has for it.
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CUT = {
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False, use_regex=True)]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(False, use_regex=True),
    "llama-bpe": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(gguf_llama.LLAMA3), "isolated"), BYTE_LEVEL]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(gguf_llama.QWEN2), "isolated"), BYTE_LEVEL]
    ),
    "default": pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(s), "isolated") for s in gguf_llama.SPLITS["default"]]
        + [BYTE_LEVEL]
    ),
}
TEXT = "It's the 12345th, isn't it?  \n\n\tthe end ½ €"


def tokenizer(cut="smollm", **options):
    vocabulary = {token: i for i, token in enumerate(TOKENS)}
    options.setdefault("ignore_merges", cut == "llama-bpe")
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, MERGES, **options))
    backend.pre_tokenizer, backend.decoder = CUT[cut], decoders.ByteLevel()
    backend.add_tokens([AddedToken("<|end|>", normalized=False, special=True)])
    backend.add_tokens([AddedToken("<user>", normalized=False, special=False)])
    return Tokenizer(backend, None, len(TOKENS))


def decoder(**changes):
    sizes = {"vocab_size": 264, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"eos_token_id": len(TOKENS), "rope_theta": 5000.0, "tie_word_embeddings": True}
    model = Decoder(Config(**(sizes | changes)))
    generator = torch.Generator().manual_seed(0)
    model.normal_init(0.1, generator).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def export(model, path, mix="Q4_K_M", importance=None, **options):
    return gguf_export.export(model, tokenizer(), path, mix, importance, False, **options)


def rounded(weight, kind, importance=None):
    """What a weight is worth after it was stored: rows do not depend on their order."""
    if kind in gguf_export.DENSE:
        return weight.to(gguf_export.DENSE[kind]).float()
    return gguf_export.FORMATS[kind].quantize(weight, importance).dequantize()


def same_weights(model, path, report, imatrix=None):
    loaded, _ = gguf_llama.load(path)
    kinds = {tensor.name: tensor.kind for tensor in report.tensors}
    assert loaded.config == model.config
    return all(
        torch.equal(
            found, rounded(model.state_dict()[key], kinds[gguf_llama.gguf_name(key)],
                           imatrix and imatrix.get(gguf_llama.gguf_name(key))))
        for key, found in loaded.state_dict().items()
    )  # fmt: skip


MIXES = ["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_S", "Q4_K_M", "Q3_K_L", "Q2_K", "Q4_0"]


@pytest.mark.parametrize("mix", MIXES)
def test_every_weight_is_what_was_stored(tmp_path, mix):
    model = decoder(tie_word_embeddings=mix != "Q4_K_M")
    report = export(model, tmp_path / "m.gguf", mix)
    assert same_weights(model, tmp_path / "m.gguf", report)


@pytest.mark.parametrize("name", ["blk.1.attn_k.weight", "token_embd.weight", "output_norm.weight"])
def test_a_flipped_bit_is_noticed(tmp_path, name):
    model, path = decoder(), tmp_path / "m.gguf"
    report = export(model, path, "Q8_0")
    raw = bytearray(path.read_bytes())
    raw[gguf.read(path).tensors[name].start + 2] ^= 1
    path.write_bytes(raw)
    assert not same_weights(model, path, report)


def test_importance_from_an_imatrix_or_from_text(tmp_path):
    model = decoder()
    text = Calibration.of(torch.arange(200) % 259, context=50)
    imatrix = measure(model, text)
    given = export(model, tmp_path / "a.gguf", "Q4_K_M", imatrix)
    measured = export(model, tmp_path / "b.gguf", "Q4_K_M", text)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    assert same_weights(model, tmp_path / "a.gguf", given, imatrix)
    assert not same_weights(model, tmp_path / "a.gguf", given)
    assert given.importance == measured.importance == repr(imatrix)
    keys = gguf.read(tmp_path / "a.gguf").metadata
    assert keys["quantize.imatrix.dataset"] == "calibration"
    assert keys["quantize.imatrix.entries_count"] == 14
    assert keys["quantize.imatrix.chunks_count"] == 4


def test_quantized_layers_keep_their_bytes(tmp_path):
    """Of q and k the packed rows are put into llama.cpp's order; nothing is decoded."""
    model, path = decoder(), tmp_path / "m.gguf"
    qlib.quantize_model(model, "q6_k", progress=False)
    before = {n: m.weight for n, m in model.named_modules() if isinstance(m, qlib.QLinear)}
    report = export(model, path, "F16")
    file, loaded = gguf.read(path), gguf_llama.load(path)[0].state_dict()
    assert len(before) == 14
    for name, q in before.items():
        raw = file.raw(gguf_llama.gguf_name(f"{name}.weight")).reshape(len(q.parts["blocks"]), -1)
        ours = q.parts["blocks"].numpy()
        moved = name.endswith(("q_proj", "k_proj"))
        assert np.array_equal(raw, ours) != moved
        assert sorted(map(bytes, raw)) == sorted(map(bytes, ours))
        assert torch.equal(loaded[f"{name}.weight"], q.dequantize())
    assert {t.kind for t in report.tensors} == {"Q6_K", "F16", "F32"}
    assert "general.file_type" not in file.metadata


def test_row_orders_are_inverse():
    rows = torch.arange(48 * 3).view(48, 3)
    pairs = gguf_llama.pairs_from_halves(rows, 4)
    # A head of 12 rows: row i of its first half comes to 2i, row i of the second to 2i + 1.
    assert pairs[:4, 0].tolist() == [0, 18, 3, 21]
    assert torch.equal(gguf_llama.halves_from_pairs(pairs, 4), rows)


def test_names_are_inverse():
    for key in decoder(tie_word_embeddings=False).state_dict():
        name = gguf_llama.gguf_name(key)
        assert gguf_llama.hf_name(None, name) == key
    with raises("model.layers.0.mlp.router.weight: a Llama in a GGUF file has no such tensor"):
        gguf_llama.gguf_name("model.layers.0.mlp.router.weight")


def test_the_gguf_package_reads_the_file(tmp_path):
    model = decoder(tie_word_embeddings=False)
    report = export(model, tmp_path / "m.gguf", "Q4_K_M")
    theirs = peer.GGUFReader(tmp_path / "m.gguf")
    keys = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.file_type": 15,
        "general.quantization_version": 2, "llama.block_count": 2, "llama.context_length": 2048,
        "llama.embedding_length": 256, "llama.feed_forward_length": 512,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 64, "llama.attention.value_length": 64,
        "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
        "llama.rope.dimension_count": 64, "llama.rope.freq_base": 5000.0, "llama.vocab_size": 264,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": [*TOKENS, "<|end|>", "<user>", "[PAD261]", "[PAD262]", "[PAD263]"],
        "tokenizer.ggml.token_type": [1] * len(TOKENS) + [3, 4, 5, 5, 5],
        "tokenizer.ggml.merges": ["t h", "th e", "Ġ the"],
        "tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.eos_token_id": 259,
    }  # fmt: skip
    assert keys == expected
    stored = {t.name: (t.tensor_type.name, tuple(map(int, t.shape[::-1]))) for t in theirs.tensors}
    assert stored == {t.name: (t.kind, t.shape) for t in report.tensors}
    assert stored["blk.0.attn_norm.weight"] == ("F32", (256,))
    loaded = gguf_llama.load(tmp_path / "m.gguf")[0].state_dict()
    for tensor in theirs.tensors:
        key = gguf_llama.hf_name(None, tensor.name)
        values = torch.tensor(peer.quants.dequantize(tensor.data, tensor.tensor_type))
        for which, heads in (("attn_q", 4), ("attn_k", 2)):
            if which in tensor.name:
                values = gguf_llama.halves_from_pairs(values, heads)
        assert torch.equal(loaded[key], values.view(loaded[key].shape)), tensor.name


@pytest.mark.parametrize("cut", CUT)
def test_tokenizers_come_back(tmp_path, cut):
    ours = tokenizer(cut)
    gguf_export.export(decoder(), ours, tmp_path / "m.gguf", "Q8_0", progress=False)
    assert gguf.read(tmp_path / "m.gguf").metadata["tokenizer.ggml.pre"] == cut
    found = gguf_llama.load(tmp_path / "m.gguf")[1]
    for text in (TEXT, "<user>the<|end|>", "2024"):
        assert found.encode(text) == ours.encode(text)
        assert found.decode(ours.encode(text)) == text
    assert (found.bos_id, found.eos_id) == (ours.bos_id, ours.eos_id)


def test_the_shipped_tokenizer_is_recognized():
    _, ours = qlib.load("bpw-small")
    keys = gguf_tokenizer.metadata(ours, 1024, add_bos=True)
    assert keys["tokenizer.ggml.pre"] == ("string", "smollm")
    assert keys["tokenizer.ggml.add_bos_token"] == ("bool", True)
    assert keys["tokenizer.ggml.bos_token_id"] == ("u32", 0)


def changed(change, **options):
    given = tokenizer(**options)
    change(given.backend)
    return given


def normalize(backend):
    backend.normalizer = normalizers.NFC()


def no_decoder(backend):
    backend.decoder = decoders.Fuse()


def prefix_space(backend):
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def three_digits(backend):
    split = pre_tokenizers.Split(Regex(r"\p{N}{3}"), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, BYTE_LEVEL])


def merged_digits(backend):
    split = pre_tokenizers.Split(Regex(r"\p{N}"), "merged_with_next")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, BYTE_LEVEL])


def no_cut(backend):
    backend.pre_tokenizer = None


def stripping(backend):
    backend.add_tokens([AddedToken("<s>", lstrip=True)])


def crowd(backend):
    backend.add_tokens([f"<{i}>" for i in range(9)])


KNOWN = "smollm, gpt-2, llama-bpe, qwen2, default"
UNKNOWN = f"it cuts text in none of the ways that are known ({KNOWN})"
OTHERS = {
    "normalizer": (changed(normalize), "it normalizes text (NFC)"),
    "decoder": (changed(no_decoder), "it is not byte-level"),
    "space": (
        changed(prefix_space), "its pre-tokenizer is ByteLevel with settings that llama.cpp has not"
    ),
    "split": (changed(three_digits), UNKNOWN),
    "behavior": (
        changed(merged_digits), "its pre-tokenizer is Split with settings that llama.cpp has not"
    ),
    "none": (changed(no_cut), "its pre-tokenizer is none with settings that llama.cpp has not"),
    "merges": (tokenizer(ignore_merges=True), UNKNOWN),
    "suffix": (tokenizer(end_of_word_suffix="</w>"), "its end_of_word_suffix is '</w>'"),
    "dropout": (tokenizer(dropout=0.5), "its dropout is 0.5"),
    "strip": (changed(stripping), "its token '<s>' strips or needs what stands beside it"),
    "size": (changed(crowd), "it has tokens up to 269, the model 264"),
    "model": (
        Tokenizer(tokenizers.Tokenizer(models.WordLevel({"a": 0}, "a"))),
        "its model is WordLevel, not BPE",
    ),
}  # fmt: skip
REMEDY = "qlib.save(model, folder, tokenizer) keeps it as it is"


@pytest.mark.parametrize("name", OTHERS)
def test_tokenizers_that_cannot_be_expressed(tmp_path, name):
    given, message = OTHERS[name]
    with raises(f"this tokenizer cannot be written to a GGUF file: {message}; {REMEDY}"):
        gguf_export.export(decoder(), given, tmp_path / "m.gguf", "Q8_0", progress=False)
    assert not any(tmp_path.iterdir())


def test_bos_that_is_not_there(tmp_path):
    message = "it has no BOS that could be added; say add_bos=False"
    with raises(f"this tokenizer cannot be written to a GGUF file: {message}; {REMEDY}"):
        export(decoder(), tmp_path / "m.gguf", add_bos=True)


def test_report(tmp_path):
    report = export(decoder(), tmp_path / "m.gguf", "Q8_0")
    weights = sum(parameter.numel() for parameter in decoder().parameters())
    assert report.file_bytes == (tmp_path / "m.gguf").stat().st_size
    assert report.bits_per_weight == 8 * report.nbytes / weights
    # 34 bytes of Q8_0 for 32 weights, 4 for one of the 5 norms of 256.
    assert report.nbytes == (weights - 1280) // 32 * 34 + 1280 * 4
    lines = str(report).splitlines()
    assert lines[:-1] == [
        f"20 tensors written to {tmp_path / 'm.gguf'}",
        "  mix              Q8_0",
        "  Q8_0             1,325,184 bytes (99.6%) in 15 tensor(s)",
        "  F32              5,120 bytes (0.4%) in 5 tensor(s)",
        f"  total            1,330,304 bytes, and {report.file_bytes:,} with the metadata",
        "  bits per weight  8.524",
        "  importance       none",
    ]
    assert lines[-1].startswith("  time             ")
    assert repr(report) == str(report)
    assert "<tr><th>bits per weight</th><td>8.524</td></tr>" in report._repr_html_()


def test_fallbacks_are_announced(tmp_path):
    """Rows of 96 have no blocks of 256, rows of 40 none of 32."""
    model = decoder(hidden_size=96, intermediate_size=40, head_dim=24)
    report = export(model, tmp_path / "m.gguf", "Q4_K_M")
    assert same_weights(model, tmp_path / "m.gguf", report)
    kinds = {t.name: t.kind for t in report.tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.weight"] == "Q5_0"
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert len(report.fallbacks) == 14
    rows = [value for label, value in report.rows() if label == "fallback"]
    assert rows[0] == (
        "blk.0.attn_q.weight - ncols 96 not divisible by 256 (required for type q4_K) "
        "-> falling back to q5_0"
    )
    assert ("", "14 of 20 tensor(s) required fallback quantization") in report.rows()


def test_own_mix(tmp_path):
    model = decoder()
    names = [n for n, w in gguf_export.named_weights(model) if w.ndim == 2]
    own = dict.fromkeys(names, "Q8_0") | {"blk.0.attn_q.weight": "Q5_1"}
    report = export(model, tmp_path / "m.gguf", own)
    assert same_weights(model, tmp_path / "m.gguf", report)
    assert {t.name: t.kind for t in report.tensors if len(t.shape) > 1} == own
    assert "general.file_type" not in gguf.read(tmp_path / "m.gguf").metadata
    assert report.rows()[0] == ("mix", "own")
    message = "a mix names every matrix of the model, and this one is"
    with raises(f"token_embd.weight: {message} missing"):
        export(model, tmp_path / "m.gguf", {n: "Q8_0" for n in names if n != "token_embd.weight"})
    unknown = f"{message} unknown; names look like blk.0.attn_k.weight"
    with raises(f"output_norm.weight: {unknown}"):
        export(model, tmp_path / "m.gguf", own | {"output_norm.weight": "Q8_0"})
    with pytest.raises(ValueError, match=r"attn_q.weight: Q7_K cannot be written; the types are"):
        export(model, tmp_path / "m.gguf", own | {"blk.0.attn_q.weight": "q7_k"})


def test_own_mix_of_so_many_bits(tmp_path):
    model, _ = qlib.load("bpw-small")
    sizes = {}
    for bits in (3.5, 5):
        report = export(model, tmp_path / "m.gguf", bits)
        assert 0.99 * bits < report.bits_per_weight <= bits
        sizes[bits] = {t.kind for t in report.tensors}
    assert sizes[3.5] != sizes[5]
    # A Mix is taken as it is, and too few bits are refused.
    mix = gguf_export.own_mix(model, 3.5)
    assert export(model, tmp_path / "m.gguf", mix).bits_per_weight <= 3.5
    with pytest.raises(ValueError, match="bits per weight: these candidates take"):
        export(model, tmp_path / "m.gguf", 2.0)


def test_relative_errors():
    model = decoder()
    text = Calibration.of(torch.arange(200) % 259, context=50)
    found = gguf_export.relative_errors(model, ["Q8_0", "Q4_K"], measure(model, text))
    assert len(found) == 15
    for errors in found.values():
        assert 0 < 100 * errors["Q8_0"] < errors["Q4_K"] < 0.02
    importance = measure(model, text).get("blk.1.ffn_up.weight")
    weight = model.model.layers[1].mlp.up_proj.weight
    error = (qlib.quantize(weight, "q4_k", importance).dequantize() - weight).square() @ importance
    expected = error.sum() / (weight.square() @ importance).sum()
    assert found["blk.1.ffn_up.weight"]["Q4_K"] == pytest.approx(float(expected), rel=1e-4)
    assert (
        found["token_embd.weight"]
        == gguf_export.relative_errors(model, ["Q8_0", "Q4_K"])["token_embd.weight"]
    )


def test_relative_errors_leave_out_what_does_not_fit():
    model = decoder(hidden_size=96)
    model.model.embed_tokens.weight.zero_()
    found = gguf_export.relative_errors(model, ["Q8_0", "Q4_K"])
    assert found["token_embd.weight"] == {"Q8_0": 0.0}
    assert found["blk.0.ffn_down.weight"].keys() == {"Q8_0", "Q4_K"}


def test_formats_that_gguf_cannot_hold(tmp_path):
    model = decoder()
    qlib.quantize_model(model, "int4-g64", progress=False)
    scheme = qlib.format("int4-g64")
    with raises(
        f"model.layers.0.self_attn.q_proj: a GGUF file cannot hold its format ({scheme}); "
        f"quantize it to one of {', '.join(gguf_export.NAMES)}, or keep it with qlib.save"
    ):
        export(model, tmp_path / "m.gguf")
    layer = model.model.layers[0].mlp.up_proj
    layer.format = ggml.BlockFormat(ggml.TYPES["Q8_K"], None, None)
    with pytest.raises(
        ValueError, match=r"up_proj: a GGUF file cannot hold its format .Q8_K.; quan"
    ):
        dict(gguf_export.named_weights(replaced(decoder(), layer)))
    assert not any(tmp_path.iterdir())


def replaced(model, layer):
    model.model.layers[0].mlp.up_proj = layer
    return model


def test_importance_that_is_missing_or_of_another_model(tmp_path):
    need = "requires an importance matrix; give importance=Calibration.text(tokenizer)"
    with raises(f"blk.0.attn_q.weight: quantization to Q2_K {need}"):
        export(decoder(), tmp_path / "m.gguf", "Q2_K_S")
    imatrix = Imatrix({"blk.0.attn_q.weight": torch.ones(3)}, {"blk.0.attn_q.weight": 1})
    message = "imatrix size 3 is different from tensor size 256; measure it on this model"
    with raises(f"blk.0.attn_q.weight: {message}"):
        export(decoder(), tmp_path / "m.gguf", "Q4_K_M", imatrix)
    assert not any(tmp_path.iterdir())


def test_types_that_cannot_be_written(tmp_path):
    known = ", ".join(gguf_export.FORMATS)
    own = {n: "I32" for n, w in gguf_export.named_weights(decoder()) if w.ndim == 2}
    with raises(f"token_embd.weight: I32 cannot be written; the types are {known}"):
        export(decoder(), tmp_path / "m.gguf", own)
    model = decoder()
    model.model.layers[1].mlp.up_proj.weight[0, 0] = 70000
    with raises("blk.1.ffn_up.weight: 70000 is too large for F16; use BF16 or F32"):
        export(model, tmp_path / "m.gguf", "F16")
    export(model, tmp_path / "m.gguf", "BF16")


def test_models_that_are_no_llama_of_ours(tmp_path):
    with pytest.raises(TypeError, match=r"export takes a model from qlib\.load, not a LlamaFor"):
        export(MODELS["llama"](), tmp_path / "m.gguf")
    model = decoder()
    model.model.layers[0].mlp.up_proj.bias = torch.nn.Parameter(torch.zeros(512))
    with raises("model.layers.0.mlp.up_proj: has a bias, which a Llama in a GGUF file has not"):
        export(model, tmp_path / "m.gguf")


def test_failure_while_writing_leaves_the_old_file(tmp_path):
    model, path = decoder(), tmp_path / "m.gguf"
    path.write_bytes(b"old")
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        export(model, path, "Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]
    assert path.read_bytes() == b"old"


def test_other_dtypes_and_several_ends(tmp_path):
    model = decoder(eos_token_id=(259, 3)).bfloat16()
    export(model, tmp_path / "m.gguf", "BF16")
    loaded, _ = gguf_llama.load(tmp_path / "m.gguf")
    assert all(
        torch.equal(w.float(), loaded.state_dict()[n]) for n, w in model.state_dict().items()
    )
    assert loaded.config.eos_token_id == 259
    report = export(model, tmp_path / "m.gguf", "Q4_K_M")
    assert same_weights(decoder().bfloat16().float(), tmp_path / "m.gguf", report)
