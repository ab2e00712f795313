"""The container of vLLM: compressed-tensors itself packs and unpacks the same.

transformers computes the same, and files that are not right are refused by name.
"""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file, save_file
from tiny_models import raises

import qlib
from qlib import fit, grid, zoo
from qlib.errors import FormatError
from qlib.files import compressed_tensors as ct
from qlib.files import quantized
from qlib.model import Config, Decoder

CONFIG = Config(64, 64, 128, 2, 4, 2, 16, max_position_embeddings=64)
FORMATS = [
    *(f"int{bits}-g32" for bits in range(2, 9)), "int4-row", "int8-row", "int4-g64",
    "int4-g32-asym", "int3-g32-asym", "int8-g64-asym", "fp8_e4m3", "mxfp4", "mxfp4-rceil",
    "mxfp6_e2m3", "mxfp8_e4m3", "nvfp4-reciprocal",
]  # fmt: skip
TENSOR_FP8 = qlib.Scheme(grid.E4M3, "tensor", fit.absmax, torch.float32)


def model(seed: int = 0, config: Config = CONFIG) -> Decoder:
    generator = torch.Generator().manual_seed(seed)
    return Decoder(config).normal_init(0.3, generator).requires_grad_(False)


def tokenizer():
    import tokenizers

    from qlib.tokenizer import Tokenizer

    letters = {chr(33 + i): i for i in range(64)}
    return Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, "!")), None, None)


def layers(decoder) -> dict[str, qlib.QTensor]:
    return {n: m.weight for n, m in decoder.named_modules() if isinstance(m, qlib.QLinear)}


def saved(folder, format, dtype=torch.float32, **options):
    decoder = model().to(dtype)
    qlib.quantize_model(decoder, format, progress=False)
    qlib.save(decoder, folder, tokenizer(), container=ct.NAME, **options)
    return decoder


def scheme_of(q: qlib.QTensor) -> QuantizationScheme:
    group = ct.describe({"a": q.format})["quantization_config"]["config_groups"]["group_0"]
    return QuantizationScheme.model_validate(group)


def theirs(q: qlib.QTensor) -> torch.Tensor:
    """The weight that compressed-tensors makes of our tensors."""
    decoder = BaseCompressor.get_value_from_registry(ct.layout_of(q.format))
    return decoder.decompress(ct.store(q), scheme_of(q))["weight"]


@pytest.mark.parametrize("format", [*FORMATS, TENSOR_FP8], ids=str)
def test_they_decode_what_we_store(format):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(1))
    weight[3] *= 100
    q = qlib.quantize(weight, format)
    decoded = theirs(q)
    # FP4 and the MX formats come back in bfloat16.
    assert torch.equal(decoded, q.dequantize().to(decoded.dtype))
    assert decoded.dtype == (torch.bfloat16 if ct.layout_of(q.format) in ct.BFLOAT16 else
                             q.format.scale if "int" in str(format) else torch.float32)  # fmt: skip
    q.parts["codes"][5, 7] ^= 1
    assert int((theirs(q) != decoded).sum()) >= 1


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_we_read_what_they_pack(tmp_path, bits, symmetric):
    """Their codes and zero points, from their quantizer, packed by their compressor."""
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    decoder = model()
    saved(tmp_path, f"int{bits}-g32" + "-asym" * (not symmetric))
    tensors = load_file(tmp_path / "model.safetensors")
    expected = {}
    for name in layers(quantized.load(tmp_path)[0]):
        weight = decoder.get_submodule(name).weight
        q = qlib.quantize(weight, f"int{bits}-g32" + "-asym" * (not symmetric))
        arguments = scheme_of(q).weights
        low, high = weight.unflatten(1, (-1, 32)).aminmax(dim=2)
        scale, zero = calculate_qparams(low, high, arguments)
        expected[name] = (
            quantize(weight, scale, zero, arguments).unflatten(1, (-1, 32)) - zero.unsqueeze(2)
        ).float().mul(scale.unsqueeze(2)).flatten(1)  # fmt: skip
        state = {"weight": weight, "weight_scale": scale}
        if not symmetric:
            state["weight_zero_point"] = zero.to(torch.int8)
        packer = BaseCompressor.get_value_from_registry("pack-quantized")
        packed = packer.compress(state, scheme_of(q))
        tensors |= {f"{name}.{part}": t for part, t in packed.items() if t is not None}
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "model.safetensors")
    found = layers(qlib.load(tmp_path)[0])
    assert found.keys() == expected.keys()
    for name, q in found.items():
        assert torch.equal(q.dequantize(), expected[name])
        assert not torch.equal(q.dequantize(), expected[name].roll(1, 0))


@pytest.mark.parametrize("format", [*FORMATS, TENSOR_FP8], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_round_trip(tmp_path, format, dtype):
    decoder = saved(tmp_path, format, dtype)
    back = qlib.load(tmp_path, dtype)[0]
    ours, found = layers(decoder), layers(back)
    assert ours.keys() == found.keys()
    assert len(ours) == 14
    for name, q in ours.items():
        assert torch.equal(q.dequantize(), found[name].dequantize())
        assert q.tobytes() == found[name].tobytes()
    ids = torch.arange(12).view(1, -1)
    assert torch.equal(decoder(ids), back(ids))
    for name in layers(back):
        back.get_submodule(name).codes[0, 0] ^= 1
    assert not torch.equal(decoder(ids), back(ids))


EXACT = {"int4-g32", "int8-row", "int3-g32", "fp8_e4m3"}


@pytest.mark.parametrize("format", [*sorted(EXACT), "mxfp4", "nvfp4-reciprocal"])
def test_transformers_computes_the_same(tmp_path, format):
    import transformers

    dtype = torch.float32 if format in EXACT else torch.bfloat16
    decoder = saved(tmp_path, format, dtype)
    ids = torch.arange(40).view(1, -1)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert next(loaded.parameters()).dtype == dtype
    logits = loaded(ids).logits
    error = (logits - decoder(ids)).float().norm() / decoder(ids).float().norm()
    assert error < (1e-5 if format in EXACT else 5e-2)
    # One layer with its rows in another order is noticed.
    tensors = load_file(tmp_path / "model.safetensors")
    key = next(k for k in tensors if k.endswith(("down_proj.weight_packed", "down_proj.weight")))
    tensors[key] = tensors[key].flip(0).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    other = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (other(ids).logits - decoder(ids)).float().norm() / decoder(ids).float().norm() > 0.1


def test_a_model_of_two_formats(tmp_path):
    import transformers

    recipe = qlib.Recipe("int4-g32", rules=(("*.down_proj", "int8-row"), ("*.0.*.q_proj", None)))
    decoder = saved(tmp_path, recipe)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["format"] == "pack-quantized"
    assert settings["ignore"] == ["model.layers.0.self_attn.q_proj", "lm_head"]
    assert [len(g["targets"]) for g in settings["config_groups"].values()] == [11, 2]
    ids = torch.arange(40).view(1, -1)
    assert torch.equal(qlib.load(tmp_path)[0](ids), decoder(ids))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded(ids).logits - decoder(ids)).abs().max() < 1e-4


def test_zero_points_in_transformers(tmp_path):
    """It expects them unpacked and stops; once it does not, the warning can go."""
    import transformers

    with pytest.warns(UserWarning, match="transformers does .* only with"):
        decoder = saved(tmp_path, "int4-g32-asym")
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=dense)
    ids = torch.arange(40).view(1, -1)
    assert (loaded.eval()(ids).logits - decoder(ids)).abs().max() < 0.05


def test_other_dtype_and_shards(tmp_path):
    decoder = saved(tmp_path, "int4-g32", dtype=torch.float32, max_shard_bytes=20_000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(
        qlib.load(tmp_path)[0](torch.tensor([[1, 2]])), decoder(torch.tensor([[1, 2]]))
    )
    qlib.save(decoder, tmp_path, tokenizer(), container=ct.NAME, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.float16


def test_what_does_not_fit_is_refused(tmp_path):
    where = "model.layers.0.self_attn.q_proj [64, 64]: compressed-tensors cannot hold "
    has = "it has layouts for int2 to int8, FP8, MXFP4, MXFP6, MXFP8 and NVFP4 (reciprocal)"
    for format, why in {
        "nf4": f"nf4, block 64, absmax, scale float32: {has}",
        "int4-g48": "int4, block 48, absmax, scale float16: "
        "64 inputs are no multiple of the group 48",
        "iq4_nl": f"IQ4_NL: {has}",
    }.items():
        decoder = model()
        qlib.quantize_model(decoder, format, progress=False)
        with pytest.raises(ValueError, match="cannot hold") as caught:
            qlib.save(decoder, tmp_path, container=ct.NAME)
        assert str(caught.value).startswith(where + why + "; ")
    assert not list(tmp_path.iterdir())


Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SETTING = "quantization_config.config_groups.group_0.weights"


# What is changed in the settings: of the group's weights w, or of all s.
BAD_SETTINGS = {
    "bits": (
        lambda w, s: w.update(num_bits=9),
        f"{SETTING}.num_bits': is 9; need an integer from 2 to 8",
    ),
    "text": (
        lambda w, s: w.update(group_size="32"),
        f"{SETTING}.group_size': is '32'; need an integer from 1 to 64",
    ),
    "group": (
        lambda w, s: w.update(group_size=48),
        f"{SETTING}.group_size': is 48, which does not divide 64 inputs",
    ),
    "strategy": (
        lambda w, s: w.update(strategy="block"),
        f"{SETTING}.strategy': is 'block'; need one of 'group', 'channel'",
    ),
    "groups": (
        lambda w, s: s.update(config_groups=[]),
        "quantization_config.config_groups': is a list; need an object",
    ),
    "format": (
        lambda w, s: (s.update(format="x"), s["config_groups"]["group_0"].pop("format")),
        "quantization_config.format': is 'x'; need one of pack-quantized, ",
    ),
}
# A tensor, and what becomes of it (None: it is left out).
BAD_TENSORS = {
    "missing": (f"{Q}.weight_shape", lambda t: None, "weight_shape': this tensor is missing"),
    "dense and packed": (
        f"{Q}.weight",
        lambda t: torch.zeros(64, 64),
        "q_proj.weight': is not part of a llama decoder of this config",
    ),
    "dtype": (
        f"{Q}.weight_packed",
        torch.Tensor.long,
        "weight_packed': is I64 [64, 8]; a weight [64, 64] needs I32 [64, 8]",
    ),
    "shape": (
        f"{DOWN}.weight_scale",
        lambda t: torch.ones(64, 3),
        "is F32 [64, 3]; a weight [64, 128] needs F16 or BF16 or F32 [64, 4]",
    ),
    "other shape": (
        f"{Q}.weight_shape",
        lambda t: torch.tensor([64, 63]),
        f"'{Q}.weight_shape': is [64, 63]; need [64, 64]",
    ),
    "nan": (
        f"{Q}.weight_scale",
        lambda t: t * torch.nan,
        f"'{Q}.scale': holds NaN or infinite values",
    ),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_bad_settings_are_refused_by_name(tmp_path, name):
    change, message = BAD_SETTINGS[name]
    saved(tmp_path, "int4-g32")
    config = json.loads((tmp_path / "config.json").read_text())
    settings = config["quantization_config"]
    change(settings["config_groups"]["group_0"]["weights"], settings)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError) as caught:
        qlib.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: field '{message}")


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_are_refused_by_name(tmp_path, name):
    key, change, message = BAD_TENSORS[name]
    saved(tmp_path, "int4-g32")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[key] = change(tensors.get(key))
    kept = {name: t.contiguous() for name, t in tensors.items() if t is not None}
    save_file(kept, tmp_path / "model.safetensors")
    with pytest.raises(FormatError) as caught:
        qlib.load(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: field '")
    assert str(caught.value).endswith(message)


def test_expressions_from_outside_are_not_run(tmp_path):
    """A regular expression that takes forever is compared as a plain pattern."""
    recipe = qlib.Recipe("int4-g32", rules=(("*.down_proj", "int8-row"),))
    decoder = saved(tmp_path, recipe)
    config = json.loads((tmp_path / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"]["targets"] = [r"re:.*\.down_proj$"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(qlib.load(tmp_path)[0](ids), decoder(ids))
    groups["group_1"]["targets"] = ["re:(.*)*(.*)*(.*)*(.*)*x"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="has no group for the packed layer"):
        qlib.load(tmp_path)


def test_unknown_container(tmp_path):
    saved(tmp_path, "int4-g32")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "quark"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        FormatError, match=r"quant_method': 'quark'; need one of 'compressed-tensors'"
    ):
        qlib.load(tmp_path)
    known = ", ".join(zoo.CONTAINERS)
    hint = "did you mean 'compressed-tensors'? "
    with raises(f"unknown container 'compressed': {hint}known are {known}"):
        qlib.save(model(), tmp_path, container="compressed")
