"""Decoders with caches: against no cache, against transformers' own, in both bases."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_decoder

import qlib
from qlib.cache import DenseCache, QuantizedCache, attention, through_cache
from qlib.cache.format import KVFormat
from qlib.cache.names import kv_format
from qlib.config import Config
from qlib.model import Decoder

CONFIG = Config(61, 64, 48, 2, 4, 2, 32, max_position_embeddings=512)


def decoder(dtype=torch.float32, **changes) -> Decoder:
    model = Decoder(replace(CONFIG, **changes))
    generator = torch.Generator().manual_seed(0)
    return model.normal_init(0.12, generator).requires_grad_(False).to(dtype)


def some_tokens(time: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(61, (batch, time), generator=generator)


def through(model: Decoder, tokens: torch.Tensor, cache, step: int) -> torch.Tensor:
    return torch.cat([model(part, cache) for part in tokens.split(step, dim=1)], dim=1)


def qkv(time: int, past: int, heads: int = 6, groups: int = 2, dim: int = 16):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, heads, time, dim, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 2, groups, past + time, dim, generator=generator, dtype=torch.float64)
    return q, k, v


@pytest.mark.parametrize(("time", "past"), [(1, 0), (5, 0), (1, 9), (4, 9)])
def test_attention_equals_its_definition(time, past):
    q, k, v = qkv(time, past)
    wide_k, wide_v = (x.repeat_interleave(3, dim=1) for x in (k, v))
    scores = q @ wide_k.transpose(-1, -2) / 4
    for i in range(time):
        scores[:, :, i, past + i + 1 :] = -torch.inf
    expected = scores.softmax(-1) @ wide_v
    assert (attention(q, k, v) - expected).abs().max() < 1e-12
    # Another head's keys, and a scale of 1 / head_dim, are noticed.
    assert (attention(q, k.flip(1), v) - expected).abs().max() > 1e-2 or past + time == 1
    assert (attention(q / 4, k, v) - expected).abs().max() > 1e-2 or past + time == 1


@pytest.mark.parametrize("step", [1, 7, 32])
@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 1}, {"num_key_value_heads": 4}])
def test_a_dense_cache_gives_the_logits_of_no_cache(step, changes):
    model, tokens, cache = decoder(**changes), some_tokens(45), DenseCache()
    difference = through(model, tokens, cache, step) - model(tokens)
    assert difference.abs().max() < 1e-5
    assert cache.length == 45
    heads = model.config.num_key_value_heads
    assert cache.nbytes == 2 * 45 * heads * 32 * 2 * 2 * 4
    assert cache.bytes_per_token == heads * 32 * 2 * 2 * 4


def test_a_dense_cache_holds_what_transformers_holds():
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    model, tokens = decoder(), some_tokens(20)
    twin = LlamaForCausalLM(LlamaConfig(**model.config.to_hf())).eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    ours, theirs = DenseCache(), DynamicCache()
    through(model, tokens, ours, 6)
    with torch.no_grad():
        for part in tokens.split(6, dim=1):
            twin(part, past_key_values=theirs, use_cache=True)
    for index, (keys, values) in ours.stores.items():
        layer = theirs.layers[index]
        torch.testing.assert_close(keys.read(), layer.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(values.read(), layer.values, atol=1e-5, rtol=0)
        assert (keys.read() - layer.keys.roll(1, 2)).abs().max() > 1e-2


@pytest.mark.parametrize("rotate", ["keys", "keys+values"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_rotation_alone_does_not_change_the_logits(rotate, dtype, bound):
    model, tokens = decoder(dtype), some_tokens(40)
    cache = QuantizedCache(KVFormat(rotate=rotate, dtype=None))
    rotated = through(model, tokens, cache, 7)
    plain = DenseCache()
    difference = rotated - through(model, tokens, plain, 7)
    assert difference.abs().max() < bound
    # What is stored did change: values too only if they are rotated.
    (keys, values), (plain_keys, plain_values) = cache.stores[0], plain.stores[0]
    assert (keys.read() - plain_keys.read()).abs().max() > 0.1
    changed = (values.read() - plain_values.read()).abs().max() > 0.1
    assert bool(changed) == (rotate == "keys+values")


def test_a_rotation_that_is_not_undone_is_noticed(monkeypatch):
    model, tokens = decoder(torch.float64), some_tokens(40)
    monkeypatch.setattr("qlib.cache._rotated", lambda x, back=False: x if back else x.flip(-1))
    cache = QuantizedCache(KVFormat(rotate="keys+values", dtype=None))
    assert (through(model, tokens, cache, 7) - model(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["int4", "int4-hadamard-kv-s2", "kivi4-g16-w32", "fp8", "turbo4"])
def test_update_returns_what_attend_reads(name):
    q, k, v = (x.float() for x in qkv(40, 0, dim=64))
    one, two = QuantizedCache(name), QuantizedCache(name)
    for start in range(0, 40, 5):
        new = slice(start, start + 5)
        y = one.attend(q[:, :, new], k[:, :, new], v[:, :, new], layer=0)
        keys, values = two.update(k[:, :, new], v[:, :, new], layer=0)
        assert (attention(q[:, :, new], keys, values) - y).abs().max() < 1e-5
    assert one.nbytes == two.nbytes
    assert keys.shape == k.shape
    assert 1e-4 < (keys - k).norm() / k.norm() < 0.2


def test_hadamard_keys_survive_an_outlier_channel():
    k = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    k[..., 5] += 40
    errors = {
        name: (QuantizedCache(name).update(k, k, 0)[0] - k).square().mean().item()
        for name in ("int4", "int4-hadamard", "kivi4-w0")
    }
    # The last call of the cache by channel reads its tokens before they are packed.
    assert errors["kivi4-w0"] < 1e-6
    assert errors["int4-hadamard"] < errors["int4"] / 2


def keys_only(name: str) -> KVFormat:
    return replace(kv_format(name), values=None)


@pytest.mark.parametrize("form", ["int4", "int2-s4", "fp8-token", keys_only("kivi2-g16-w32")])
def test_logits_do_not_depend_on_the_chunk(form):
    """By channel that holds if chunks end where groups do, since all of it read them unpacked."""
    model, tokens = decoder(torch.float64), some_tokens(96)
    one, sixteen = (through(model, tokens, QuantizedCache(form), step) for step in (1, 16))
    assert (one - sixteen).abs().max() < 1e-6
    assert (one - model(tokens)).abs().max() > 1e-2


def test_fewer_bits_are_farther_from_the_model():
    model, tokens = decoder(), some_tokens(96)
    errors = [
        (through(model, tokens, QuantizedCache(name), 16) - model(tokens)).square().mean().item()
        for name in ("f32", "f16", "int8", "int4", "int3", "int2")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 1e-10 < 1e-6 < errors[-1]


def test_sinks_and_window_of_a_decoder_keep_short_texts_exact():
    model, tokens = decoder(), some_tokens(20)
    for name in ("int2-w20", "int2-s20", "int2-w15-s5"):
        cache = QuantizedCache(replace(kv_format(name), dtype=torch.float32))
        assert (through(model, tokens, cache, 3) - model(tokens)).abs().max() < 1e-5
    cache = QuantizedCache(replace(kv_format("int2-w14-s5"), dtype=torch.float32))
    assert (through(model, tokens, cache, 3) - model(tokens)).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_models_of_every_dtype(dtype):
    model, tokens = decoder(dtype), some_tokens(40)
    for name, bound in (("int8-hadamard-kv", 0.1), ("kivi8-w32", 0.1), ("fp8", 1), ("f16", 0.1)):
        logits = through(model, tokens, QuantizedCache(name), 8)
        assert logits.dtype == dtype
        assert (logits - model(tokens)).abs().max() < bound


def test_generation_with_a_cache():
    model, tokens = decoder(eos_token_id=None), some_tokens(6)
    expected = model.generate(tokens, 40)
    cache = DenseCache()
    assert torch.equal(model.generate(tokens, 40, cache=cache), expected)
    assert cache.length == 45
    small = QuantizedCache("kivi8-w32")
    assert torch.equal(model.generate(tokens, 40, cache=small), expected)
    assert small.nbytes < cache.nbytes / 1.9
    rough = model.generate(tokens, 40, cache=QuantizedCache("int1"))
    assert not torch.equal(rough, expected)


def test_a_full_precision_cache_measures_no_divergence():
    model = tiny_decoder()
    protocol = qlib.Protocol("random", some_tokens(90, 1)[0], context=32, stride=16, bos=0)
    same = qlib.divergence(model, through_cache(model, "f32", chunk=5), protocol)
    assert same.kl < 1e-6
    assert same.top1 == 1
    kl = {
        n: qlib.divergence(model, through_cache(model, n, 5), protocol).kl for n in ("int4", "int2")
    }
    assert 1e-5 < kl["int4"] < kl["int2"]
    assert qlib.perplexity(through_cache(model, "f32"), protocol).value == pytest.approx(
        qlib.perplexity(model, protocol).value, rel=1e-5
    )


def test_divergence_reads_packed_tokens(monkeypatch):
    """A store that returns other tokens changes what is measured."""
    model = tiny_decoder()
    protocol = qlib.Protocol("random", some_tokens(60, 1)[0], context=32, stride=32, bos=0)
    before = qlib.divergence(model, through_cache(model, "int8", 5), protocol).kl
    read = qlib.cache.store.Packed.read
    monkeypatch.setattr("qlib.cache.store.Packed.read", lambda self: read(self) * 1.5)
    assert qlib.divergence(model, through_cache(model, "int8", 5), protocol).kl > 10 * before


def test_bad_requests():
    with pytest.raises(ValueError, match=r"^chunk must be a positive number of tokens, got 0$"):
        through_cache(tiny_decoder(), "int4", 0)
    model, tokens = decoder(), some_tokens(4)
    model.model.layers[1].self_attn.k_proj.weight[3, 2] = torch.nan
    message = re.escape("layer 1: keys [2, 2, 4, 32] hold ") + r"16 NaN or infinite values$"
    with pytest.raises(ValueError, match=message):
        model(tokens, QuantizedCache("int4"))
    head_dim_24 = torch.ones(1, 1, 1, 24)
    with pytest.raises(ValueError, match=r"^layer 0: keys: "):
        QuantizedCache("q8_0").update(head_dim_24, head_dim_24, 0)
