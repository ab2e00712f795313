"""Sizes against what really exists: checkpoints, cache tensors, files, and transformers' models."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from safetensors.torch import load_file

from qlib import zoo
from qlib.cache import DenseCache
from qlib.files import gguf
from qlib.model import Config, Decoder
from qlib.plan import DEVICES, decode_bound, kv_bytes, read_bytes, unique_experts, weights_bytes
from qlib.recipe import decoder_linears
from qlib.recipe import plan as recipe_plan
from qlib.shapes import GQA, SHAPES, Experts, ModelShape

ODD = Config(301, 40, 56, 2, 6, 2, 10, tie_word_embeddings=False)


@pytest.fixture(scope="module")
def small() -> Decoder:
    return zoo.load("bpw-small")[0]


def tensor_bytes(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


# -- weights ------------------------------------------------------------------------------------


def test_weights_equal_the_small_checkpoint_and_one_bit_less_does_not(small):
    stored = tensor_bytes(load_file(zoo.SMALL_FOLDER / "model.safetensors").values())
    shape = ModelShape.of(small.config)
    assert weights_bytes(shape, 16) == stored
    assert weights_bytes(shape, 15) != stored
    assert weights_bytes(dataclasses.replace(shape, tied=False), 16) != stored


def test_weights_equal_every_byte_of_the_smollm2_file():
    file = gguf.read(zoo.packaged_path(zoo.SMOLLM2_FILE))
    stored = sum(tensor.size for tensor in file.tensors.values())
    shape = SHAPES["SmolLM2-135M"]
    assert weights_bytes(shape, 5, embedding=8.5, vectors=32) == stored
    assert weights_bytes(shape, 5, embedding=8.5, vectors=16) != stored


@pytest.mark.parametrize("tied", [True, False])
def test_weights_of_an_odd_decoder(tied):
    config = dataclasses.replace(ODD, tie_word_embeddings=tied)
    model = Decoder(config)
    shape = ModelShape.of(config)
    assert weights_bytes(shape, 32, embedding=32, vectors=32) == tensor_bytes(model.parameters())
    assert shape.parameters == shape.active == sum(p.numel() for p in model.parameters())
    linears = {n.rsplit(".")[-1]: tuple(m.weight.shape) for n, m in decoder_linears(model).items()}
    assert {name: m.shape for name, m in shape.matrices.items()} == linears


@pytest.mark.parametrize("name", ["int4-g32-asym", "int3-row", "nvfp4", "ternary"])
def test_a_format_is_counted_as_the_quantizer_counts_it(name):
    # 40 and 56 columns leave ragged blocks and half-filled bytes.
    planned = recipe_plan(Decoder(ODD), name).nbytes
    shape = ModelShape.of(ODD)
    assert weights_bytes(shape, name, embedding=32, vectors=32) == planned
    assert weights_bytes(shape, "int4-row", embedding=32, vectors=32) != planned


# -- published shapes ---------------------------------------------------------------------------


def llama(shape: ModelShape, kind: str, **more) -> transformers.PretrainedConfig:
    a = shape.attention
    return transformers.AutoConfig.for_model(
        kind, hidden_size=shape.hidden, num_hidden_layers=shape.layers, vocab_size=shape.vocab,
        intermediate_size=shape.width, num_attention_heads=a.heads, num_key_value_heads=a.groups,
        head_dim=a.head_dim, tie_word_embeddings=shape.tied, **more,
    )  # fmt: skip


def oracle(name: str) -> transformers.PretrainedConfig:
    shape = SHAPES[name]
    if name == "DeepSeek-V3":
        return transformers.DeepseekV3Config()
    if name == "Mixtral-8x7B":
        return transformers.MixtralConfig()
    if name == "Qwen3-30B-A3B":
        return llama(shape, "qwen3_moe", num_experts=128, num_experts_per_tok=8,
                     moe_intermediate_size=768)  # fmt: skip
    family = name.split("-")[0]
    return llama(shape, {"Qwen2.5": "qwen2", "Qwen3": "qwen3"}.get(family, "llama"))


def parameters(config: transformers.PretrainedConfig) -> int:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_equal_those_of_transformers(name):
    config = oracle(name)
    assert SHAPES[name].parameters == parameters(config)
    config.vocab_size += 1
    assert SHAPES[name].parameters != parameters(config)


# Total and active parameters in billions, as the papers of the models state them.
@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("Mixtral-8x7B", 47, 13), ("Qwen3-30B-A3B", 30.5, 3.3), ("DeepSeek-V3", 671, 37)],
)
def test_total_and_active_parameters_are_the_published_ones(name, total, active):
    shape = SHAPES[name]
    assert shape.parameters / 1e9 == pytest.approx(total, rel=0.01)
    assert shape.active / 1e9 == pytest.approx(active, rel=0.02)
    more = dataclasses.replace(shape.experts, active=shape.experts.active + 1)
    assert dataclasses.replace(shape, experts=more).active / 1e9 != pytest.approx(active, rel=0.02)


# -- cache --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 13), (3, 7)])
def test_kv_bytes_equal_the_cache_of_a_running_decoder(small, batch, tokens):
    cache = DenseCache()
    small(torch.zeros(batch, tokens, dtype=torch.long), cache)
    small(torch.zeros(batch, 1, dtype=torch.long), cache)
    held = tensor_bytes(store.recent.view for pair in cache.stores.values() for store in pair)
    shape = ModelShape.of(small.config)
    assert kv_bytes(shape, tokens + 1, batch, bits=32) == held
    assert kv_bytes(shape, tokens, batch, bits=32) != held
    shared = dataclasses.replace(shape.attention, groups=shape.attention.heads)
    assert kv_bytes(dataclasses.replace(shape, attention=shared), tokens + 1, batch, 32) != held


def test_kv_bytes_of_latent_attention():
    # Table 1 of DeepSeek-V2: (d_c + d_h^R) values a layer; 70 KB a token with 61 layers.
    assert kv_bytes(SHAPES["DeepSeek-V3"], 1) == 61 * (512 + 64) * 2 == 70_272


# -- reading ------------------------------------------------------------------------------------


def simulated(count: int, active: int, tokens: int) -> float:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4000, tokens, count, generator=generator)
    chosen = scores.topk(active).indices.flatten(1)
    hit = torch.zeros(4000, count).scatter_(1, chosen, 1)
    return hit.sum(1).mean().item()


@pytest.mark.parametrize(("count", "active", "tokens"), [(8, 2, 1), (8, 2, 5), (16, 3, 4)])
def test_unique_experts_equal_a_simulation(count, active, tokens):
    expected = unique_experts(count, active, tokens)
    assert simulated(count, active, tokens) == pytest.approx(expected, rel=0.01)
    assert simulated(count, active, tokens + 1) != pytest.approx(expected, rel=0.01)


def test_unique_experts_at_the_ends():
    assert unique_experts(8, 2, 0) == 0
    assert unique_experts(8, 8, 1) == 8
    assert unique_experts(128, 8, 1) == pytest.approx(8)
    assert unique_experts(8, 2, 1000) == pytest.approx(8)


def test_a_step_reads_the_touched_weights_and_the_cache():
    # Count what a forward pass of one token touches: all but the unused rows of the embedding.
    model = Decoder(ODD)
    untouched = (ODD.vocab_size - 1) * ODD.hidden_size
    touched = sum(p.numel() for p in model.parameters()) - untouched
    shape = ModelShape.of(ODD)
    assert read_bytes(shape, 16) == 2 * touched
    assert read_bytes(shape, 16, context=9, batch=1) == 2 * touched + kv_bytes(shape, 9)
    assert read_bytes(shape, 16, batch=2) == 2 * (touched + ODD.hidden_size)
    assert read_bytes(shape, 15) != 2 * touched


def test_a_large_batch_reads_all_experts_and_one_token_the_active_ones():
    shape = ModelShape(8, 2, 16, 12, GQA(2, 1, 4), Experts(4, 1, 12))
    one, many = read_bytes(shape, 16), read_bytes(shape, 16, batch=1000)
    rows = 999 * shape.hidden * 2
    assert many - one - rows == pytest.approx(2 * 2 * 3 * (3 * 8 * 12), abs=1)
    assert one == 2 * (shape.active - (shape.vocab - 1) * shape.hidden)


def test_the_bound_is_bandwidth_over_bytes():
    shape = SHAPES["Llama-3.1-8B"]
    assert decode_bound(shape, 1e12) == 1e12 / read_bytes(shape, 16)
    quarter = decode_bound(shape, 1e12, 4, embedding=4) / decode_bound(shape, 1e12)
    assert quarter == pytest.approx(4, rel=1e-3)
    # With a batch the weights are shared, the caches are not.
    eight = decode_bound(shape, 1e12, batch=8) / decode_bound(shape, 1e12)
    assert eight == pytest.approx(8, rel=1e-3)
    long = decode_bound(shape, 1e12, context=32768, batch=8)
    assert long < 8 * decode_bound(shape, 1e12, context=32768)


def test_unknown_formats_are_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="unknown format 'int4-g12x': did you mean"):
        weights_bytes(SHAPES["Llama-3.1-8B"], "int4-g12x")


def test_devices_are_sorted_and_distinct():
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    assert [d.memory for d in DEVICES] == sorted(d.memory for d in DEVICES)
