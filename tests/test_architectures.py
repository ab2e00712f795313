"""Llama 3.1's rotary positions and Qwen2's biases: transformers and llama.cpp are the judges."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import gguf as peer
import pytest
import tokenizers
import torch
from test_files_gguf_export import TOKENS, tokenizer
from test_llama_cpp import HARD, ask, log_probabilities, theirs, with_rounded_inputs
from tokenizers import normalizers

import qlib
from qlib.config import ARCHITECTURES, Llama3Rope
from qlib.errors import FormatError
from qlib.files import gguf_export, gguf_llama, hf
from qlib.files.assemble import parameter_shapes
from qlib.model import Config, Decoder, frequency_factors
from qlib.shapes import ModelShape
from qlib.tokenizer import Tokenizer

# Of the 32 pairs some turn more than 4 times in 64 positions, some less than once.
ROPE = Llama3Rope(8.0, 1.0, 4.0, 64)
PLAIN = Config(
    264, 256, 512, 2, 4, 2, 64, rope_theta=5000.0, max_position_embeddings=256,
    eos_token_id=len(TOKENS),
)  # fmt: skip
FREE = tuple(1 + i / 8 for i in range(32))
CONFIGS = {
    "llama3": replace(PLAIN, rope_scaling=ROPE),
    "factors": replace(PLAIN, rope_scaling=FREE, tie_word_embeddings=False),
    "qwen2": replace(PLAIN, model_type="qwen2"),
    "qwen2-untied": replace(PLAIN, model_type="qwen2", tie_word_embeddings=False),
    "qwen2-llama3": replace(PLAIN, model_type="qwen2", rope_scaling=ROPE),
}
IN_GGUF = ["llama3", "factors", "qwen2", "qwen2-untied"]
# Long enough for several positions beyond the original length, and 24 tokens more.
PROMPTS = ["It was the 2nd of the month, the rain on the roof, and the end of the road. " * 2]
NEW = 24
# llama.cpp reports no tokens that are parts of characters, nor any after the end of a text.
BANNED = [i for i in range(264) if "\ufffd" in tokenizer().decode([i]) or i >= len(TOKENS)]


def decoder(config: Config) -> Decoder:
    generator = torch.Generator().manual_seed(0)
    model = Decoder(config).normal_init(0.1, generator).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def tokens(time: int = 100) -> torch.Tensor:
    return torch.randint(264, (2, time), generator=torch.Generator().manual_seed(1))


def cut(config: Config):
    return tokenizer("qwen2" if config.model_type == "qwen2" else "llama-bpe")


def answers_of_llama_cpp(path, prompts=PROMPTS, new=NEW):
    return ask(path, prompts, new, 264, BANNED)


def write(path, model, **options):
    gguf_export.export(model, cut(model.config), path, "F32", progress=False, **options)
    return path


def same(model: Decoder, other: Decoder) -> bool:
    with torch.no_grad():
        return torch.equal(model(tokens()), other(tokens()))


def difference(model: Decoder, other: torch.nn.Module) -> float:
    with torch.no_grad():
        found = other(tokens())
        return float((model(tokens()) - getattr(found, "logits", found)).abs().max())


def changed(model: Decoder, **changes) -> Decoder:
    """The same weights in another decoder."""
    other = Decoder(replace(model.config, **changes))
    other.load_state_dict(model.state_dict(), strict=False)
    return other.requires_grad_(False)


def without_bias(model: Decoder, name: str) -> Decoder:
    other = changed(model)
    other.get_parameter(f"model.layers.1.self_attn.{name}.bias").zero_()
    return other


def as_halves(model: Decoder) -> Decoder:
    """What a reader gets that takes the rows of q and k for pairs although they are not."""
    other = changed(model)
    for layer in other.model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            heads = len(linear.weight) // 64
            linear.weight.copy_(gguf_llama.halves_from_pairs(linear.weight, heads))
    return other


def twins(model: Decoder) -> list[Decoder]:
    """Decoders with one thing wrong, each of which a comparison must notice."""
    if model.config.rope_scaling is not None:
        yield changed(model, rope_scaling=None)
        yield changed(
            model, rope_scaling=(*frequency_factors(model.config)[:-5].tolist(), *[1.0] * 5)
        )
    if model.config.qkv_bias:
        # One bias of all keys adds the same to every score of a query, so only rotation shows it.
        yield from (without_bias(model, name) for name in ("q_proj", "k_proj", "v_proj"))
        yield as_halves(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(tmp_path, name):
    from transformers import AutoModelForCausalLM

    model = decoder(CONFIGS[name])
    hf.save_checkpoint(tmp_path, model.config, model.state_dict(), cut(model.config))
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(other).__name__ == ARCHITECTURES[model.config.model_type]
    assert difference(model, other) < 1e-4
    assert all(difference(twin, other) > 1e-3 for twin in twins(model))
    # transformers writes the same settings under other names.
    read = Config.from_hf(other.config.to_dict())
    assert read == replace(model.config, bos_token_id=read.bos_token_id)
    loaded, _ = hf.load(tmp_path)
    assert loaded.config == model.config
    assert same(loaded, model)


def test_the_factors_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = CONFIGS["llama3"]
    frequency, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config.to_hf()), "cpu")
    factors = frequency_factors(config)
    unscaled = 5000.0 ** (-torch.arange(0, 64, 2) / 64)
    torch.testing.assert_close(unscaled / factors, frequency, rtol=1e-5, atol=0)
    between = (factors > 1) & (factors < 8)
    assert min((factors == 1).sum(), between.sum(), (factors == 8).sum()) >= 4


@pytest.mark.parametrize("name", CONFIGS)
def test_own_container(tmp_path, name):
    model = decoder(CONFIGS[name])
    qlib.quantize_model(model, "int4-g32", progress=False)
    assert (model.model.layers[0].self_attn.k_proj.bias is not None) == model.config.qkv_bias
    qlib.save(model, tmp_path, cut(model.config))
    loaded, _ = qlib.load(tmp_path)
    assert isinstance(loaded.model.layers[0].self_attn.k_proj, qlib.QLinear)
    assert loaded.config == model.config
    assert same(loaded, model)
    if model.config.qkv_bias:
        loaded.model.layers[1].self_attn.v_proj.bias.zero_()
        assert not same(loaded, model)


@pytest.mark.filterwarnings("ignore:400 calibration tokens")
@pytest.mark.parametrize("method", ["gptq", "awq-clip"])
def test_methods_that_calibrate_keep_the_biases(method):
    model = decoder(CONFIGS["qwen2"])
    text = qlib.Calibration.of(tokens(400)[0], context=100)
    before = changed(model)
    qlib.quantize_model(model, "int8-g32", method=method, calibration=text, progress=False)
    assert difference(model, before) < 0.5 < difference(without_bias(before, "v_proj"), before)


@pytest.mark.parametrize("name", IN_GGUF)
def test_gguf_comes_back(tmp_path, name):
    model = decoder(CONFIGS[name])
    loaded, _ = qlib.load(write(tmp_path / "m.gguf", model))
    assert same(loaded, model)
    assert not any(same(loaded, twin) for twin in twins(model))
    assert replace(loaded.config, rope_scaling=None) == replace(model.config, rope_scaling=None)
    # What has no rule any more is kept as factors: in a folder, and in a GGUF file again.
    qlib.save(loaded, tmp_path / "folder", cut(model.config))
    again, _ = qlib.load(tmp_path / "folder")
    assert again.config == loaded.config
    second = write(tmp_path / "again.gguf", again)
    assert second.read_bytes() == (tmp_path / "m.gguf").read_bytes()


def test_the_gguf_package_reads_the_file(tmp_path):
    found = {}
    for name in IN_GGUF[:3]:
        model = decoder(CONFIGS[name])
        reader = peer.GGUFReader(write(tmp_path / "m.gguf", model))
        found[name] = {t.name: torch.tensor(t.data) for t in reader.tensors}
        arch = reader.fields["general.architecture"].contents()
        assert arch == model.config.model_type
        known = peer.get_tensor_name_map(peer.MODEL_ARCH[arch.upper()], 2)
        for key, _ in parameter_shapes(model.config):
            assert known.get_name(key, (".weight", ".bias")) in found[name]
        factors = found[name].get("rope_freqs.weight")
        if model.config.rope_scaling is None:
            assert factors is None
        else:
            assert torch.equal(factors, frequency_factors(model.config))
    weights, qwen2 = decoder(CONFIGS["qwen2"]).state_dict(), found["qwen2"]
    for which in "qkv":
        for kind in ("weight", "bias"):
            ours = weights[f"model.layers.1.self_attn.{which}_proj.{kind}"]
            assert torch.equal(qwen2[f"blk.1.attn_{which}.{kind}"], ours)
    assert not any(name.endswith(".bias") for name in found["llama3"])


@pytest.mark.parametrize("name", IN_GGUF)
def test_transformers_reads_the_gguf_file(tmp_path, name, monkeypatch):
    from transformers import AutoModelForCausalLM, modeling_utils

    # It asks for accelerate although a model on the CPU needs none of it.
    monkeypatch.setattr(modeling_utils, "is_accelerate_available", lambda: True)
    model = decoder(CONFIGS[name])
    write(tmp_path / "m.gguf", model)
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    wrong = [difference(twin, other) for twin in twins(model)]
    if model.config.rope_scaling is not None:
        # It leaves out rope_freqs.weight, so it has the function of the first twin.
        wrong[0] = difference(model, other)
        model = changed(model, rope_scaling=None)
    assert difference(model, other) < 1e-4
    assert min(wrong) > 1e-3


@pytest.mark.parametrize("name", IN_GGUF)
def test_llama_cpp_gives_our_logits(tmp_path, name):
    model = decoder(CONFIGS[name])
    answers = answers_of_llama_cpp(write(tmp_path / "m.gguf", model))
    assert len(answers[0]["prompt"]) > 90
    assert len(answers[0]["ids"]) == NEW
    logs = theirs(answers)
    assert (logs - log_probabilities(model, answers)).abs().max() < 1e-4
    for twin in twins(model):
        assert (logs - log_probabilities(twin, answers)).abs().max() > 1e-3


def test_llama_cpp_runs_quantized_layers_with_biases(tmp_path):
    """It rounds the inputs of quantized layers too; see test_llama_cpp for the bound."""
    model, path = decoder(CONFIGS["qwen2"]), tmp_path / "m.gguf"
    qlib.quantize_model(model, "q8_0", progress=False)
    answers = answers_of_llama_cpp(write(path, model))
    ours, logs = log_probabilities(model, answers), theirs(answers)
    explained = (log_probabilities(with_rounded_inputs(path), answers) - ours).abs().max()
    assert (logs - ours).abs().max() <= 1.5 * explained
    model.model.layers[1].self_attn.q_proj.bias.zero_()
    assert (logs - log_probabilities(model, answers)).abs().max() > 3 * explained


def with_a_number(cut):
    """The tokenizer with a token of two digits, which Qwen2's way to cut never reaches."""
    state = json.loads(tokenizer(cut).backend.to_str())
    state["model"]["vocab"]["12"] = len(TOKENS)
    state["model"]["merges"].append(["1", "2"])
    state["added_tokens"] = []
    return Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(state)), None, len(TOKENS) + 1)


def test_tokens_of_qwen2_are_those_of_llama_cpp(tmp_path):
    texts = [text for text in HARD if "<|" not in text] + ["in 12345 it's\n \n x"]
    found = {}
    for cut in ("qwen2", "llama-bpe"):
        ours, path = with_a_number(cut), tmp_path / f"{cut}.gguf"
        gguf_export.export(decoder(CONFIGS["qwen2"]), ours, path, "F32", progress=False)
        found[cut] = [answer["prompt"] for answer in answers_of_llama_cpp(path, texts, 1)]
        assert found[cut] == [ours.encode(text) for text in texts]
        assert found[cut] == [qlib.load(path)[1].encode(text) for text in texts]
    assert found["qwen2"] != found["llama-bpe"]


def test_qwen2_cuts_as_transformers_does():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    assert gguf_llama.SPLITS["qwen2"] == (PRETOKENIZE_REGEX,)


def test_only_a_qwen2_may_compose_characters(tmp_path):
    for name, refused in (("qwen2", False), ("smollm", True)):
        given = tokenizer(name)
        given.backend.normalizer = normalizers.NFC()
        arguments = (decoder(CONFIGS["qwen2"]), given, tmp_path / "m.gguf", "Q8_0")
        if refused:
            with pytest.raises(ValueError, match=r"it normalizes text \(NFC\)"):
                gguf_export.export(*arguments, progress=False)
        else:
            gguf_export.export(*arguments, progress=False)
        given.backend.normalizer = normalizers.NFKC()
        with pytest.raises(ValueError, match=r"it normalizes text \(NFKC\)"):
            gguf_export.export(*arguments, progress=False)


def test_gguf_cannot_scale_a_qwen2(tmp_path):
    message = "llama.cpp scales no rotary positions of a qwen2; qlib.save(model, folder, tokenizer)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} keeps them$"):
        write(tmp_path / "m.gguf", decoder(CONFIGS["qwen2-llama3"]))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes(name):
    model = decoder(CONFIGS[name])
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    assert dict(parameter_shapes(model.config)) == shapes
    count = sum(parameter.numel() for parameter in model.parameters())
    assert ModelShape.of(model.config).parameters == count


def test_init_starts_biases_at_zero():
    model = Decoder(CONFIGS["qwen2"]).normal_init()
    assert not model.model.layers[0].self_attn.k_proj.bias.any()


@pytest.mark.parametrize("container", ["dense", "qlib"])
def test_folders_with_wrong_biases(tmp_path, container):
    model = decoder(CONFIGS["qwen2"])
    if container == "qlib":
        qlib.quantize_model(model, "int4-g32", progress=False)
    name = "model.layers.1.self_attn.v_proj"
    bias = model.get_submodule(name).bias
    for wrong, message in (
        (bias[:64], "has shape [64]"),
        (bias[None], "has shape [1, 128]"),
        (None, "is missing"),
    ):
        changed = None if wrong is None else torch.nn.Parameter(wrong, requires_grad=False)
        model.get_submodule(name).bias = changed
        qlib.save(model, tmp_path, tokenizer("qwen2"))
        with pytest.raises(FormatError, match=re.escape(message)) as caught:
            qlib.load(tmp_path)
        assert f"field '{name}.bias'" in str(caught.value)


NUMBER = "must be a positive number, got"
LLAMA3 = CONFIGS["llama3"].to_hf()["rope_scaling"]
LONG = CONFIGS["factors"].to_hf()["rope_scaling"]
BAD = [
    (LLAMA3, {"factor": None}, f"factor {NUMBER} None"),
    (LLAMA3, {"factor": float("nan")}, f"factor {NUMBER} nan"),
    (LLAMA3, {"low_freq_factor": 0}, f"low_freq_factor {NUMBER} 0"),
    (LLAMA3, {"high_freq_factor": "4"}, f"high_freq_factor {NUMBER} '4'"),
    (
        LLAMA3,
        {"original_max_position_embeddings": 8192.5},
        "original_max_position_embeddings must be a positive integer, got 8192.5",
    ),
    (
        LLAMA3,
        {"original_max_position_embeddings": 2**63},
        f"original_max_position_embeddings must be a positive integer, got {2**63}",
    ),
    (
        LLAMA3,
        {"factor": 0.5},
        "rope_scaling needs factor 0.5 >= 1 and low_freq_factor 1.0 < high_freq_factor 4.0",
    ),
    (
        LLAMA3,
        {"low_freq_factor": 4.0},
        "rope_scaling needs factor 8.0 >= 1 and low_freq_factor 4.0 < high_freq_factor 4.0",
    ),
    (
        LLAMA3,
        {"rope_type": "yarn"},
        "rope_type 'yarn' is not supported; need 'default' or 'llama3' or 'longrope'",
    ),
    (LONG, {"short_factor": None, "long_factor": None}, "short_factor must be a list, got None"),
    (
        LONG | {"short_factor": [1.0], "long_factor": [2.0]},
        {},
        "long_factor [2.0] is not supported; need [1.0]",
    ),
    (LONG, {"attention_factor": 1.2}, "attention_factor 1.2 is not supported; need 1.0"),
    (LONG, dict.fromkeys(["short_factor", "long_factor"], [0] * 32), f"rope_scaling {NUMBER} 0"),
    (LONG, dict.fromkeys(["short_factor", "long_factor"], [2.0] * 9), "has 9 factors; need 32"),
]


@pytest.mark.parametrize(("good", "change", "message"), BAD)
def test_rotary_settings_that_are_wrong(good, change, message):
    raw = PLAIN.to_hf() | {"rope_scaling": good | change}
    message = f"config: {message}".replace("config: has", "config: rope_scaling has")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Config.from_hf(raw)


def rewritten(path, tensors, arch="llama"):
    """The file of a Llama as the gguf package writes it again, with other tensors in it."""
    reader = peer.GGUFReader(path)
    writer = peer.GGUFWriter(path.with_name("bad.gguf"), arch)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            kind = field.types[0]
            item = field.types[-1] if kind == peer.GGUFValueType.ARRAY else None
            writer.add_key_value(key.replace("llama.", f"{arch}."), field.contents(), kind, item)
    stored = {tensor.name: tensor.data for tensor in reader.tensors} | tensors
    for name, data in stored.items():
        if data is not None:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.with_name("bad.gguf")


def vector(size, value=1.0, last=1.0):
    found = torch.full((size,), float(value))
    found[-1] = last
    return found.numpy()


ROPE_NAME, Q_BIAS = "rope_freqs.weight", "blk.1.attn_q.bias"
OURS = "model.layers.1.self_attn.q_proj.bias"
HOSTILE = {
    "short": (
        "llama3",
        {ROPE_NAME: vector(31)},
        ROPE_NAME,
        "has shape [31]; need half of the head, [32]",
    ),
    "matrix": (
        "llama3",
        {ROPE_NAME: vector(64).reshape(2, 32)},
        ROPE_NAME,
        "has shape [2, 32]; need",
    ),
    "zero": (
        "llama3",
        {ROPE_NAME: vector(32, 1, 0)},
        ROPE_NAME,
        "needs positive and finite factors",
    ),
    "negative": ("llama3", {ROPE_NAME: vector(32, 1, -2)}, ROPE_NAME, "needs positive and finite"),
    "nan": (
        "llama3",
        {ROPE_NAME: vector(32, 1, torch.nan)},
        ROPE_NAME,
        "needs positive and finite",
    ),
    "inf": (
        "llama3",
        {ROPE_NAME: vector(32, 1, torch.inf)},
        ROPE_NAME,
        "needs positive and finite",
    ),
    "scaled qwen2": (
        "qwen2",
        {ROPE_NAME: vector(32)},
        ROPE_NAME,
        "llama.cpp gives a qwen2 no such tensor",
    ),
    "bias in a llama": (
        "llama3",
        {Q_BIAS: vector(256)},
        OURS,
        "not part of a llama decoder of this",
    ),
    "bias missing": ("qwen2", {Q_BIAS: None}, OURS, "this tensor is missing"),
    "bias of another shape": (
        "qwen2",
        {Q_BIAS: vector(64)},
        OURS,
        "has shape [64], but the config needs [256]",
    ),
    "bias of a matrix": (
        "qwen2",
        {Q_BIAS: vector(256).reshape(1, 256)},
        OURS,
        "has shape [1, 256], but",
    ),
    "bias of another layer": (
        "qwen2",
        {"blk.1.ffn_up.bias": vector(512)},
        "model.layers.1.mlp.up_proj.bias",
        "not part of a qwen2 decoder of this",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_gguf_files_that_are_wrong(tmp_path, case):
    name, tensors, field, message = HOSTILE[case]
    good = write(tmp_path / "m.gguf", decoder(CONFIGS[name]))
    arch = CONFIGS[name].model_type
    assert same(gguf_llama.load(rewritten(good, {}, arch))[0], gguf_llama.load(good)[0])
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        gguf_llama.load(rewritten(good, tensors, arch))
    assert f"bad.gguf: field '{field}'" in str(caught.value)
