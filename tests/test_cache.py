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
from qlib.cache.store import rotated
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
    monkeypatch.setattr("qlib.cache.rotated", lambda x, back=False: x if back else rotated(x))
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
    read = qlib.cache.packed.Packed.read
    monkeypatch.setattr("qlib.cache.packed.Packed.read", lambda self: read(self) * 1.5)
    assert qlib.divergence(model, through_cache(model, "int8", 5), protocol).kl > 10 * before


def test_bad_requests():
    with pytest.raises(ValueError, match=r"^chunk must be a positive number of tokens, got 0$"):
        through_cache(tiny_decoder(), "int4", 0)
    model, tokens = decoder(), some_tokens(4)
    model.model.layers[1].self_attn.k_proj.weight[3, 2] = torch.nan
    message = re.escape("layer 1: keys [2, 2, 4, 32] hold ") + r"16 NaN or infinite values$"
    with pytest.raises(ValueError, match=message):
        model(tokens, QuantizedCache("int4"))
    plain, heads = torch.ones(2, 64, 64), torch.ones(1, 2, 64, 64)
    for k, v, what in ((plain, plain, "keys"), (heads, plain, "values")):
        message = f"layer 0: {what} must be [batch, heads, tokens, head_dim], got [2, 64, 64]"
        for call in ("update", "attend"):
            pair = (k, v) if call == "update" else (heads, k, v)
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                getattr(QuantizedCache("int4-hadamard"), call)(*pair, layer=0)
    head_dim_24 = torch.ones(1, 1, 1, 24)
    with pytest.raises(ValueError, match=r"^layer 0: keys: "):
        QuantizedCache("q8_0").update(head_dim_24, head_dim_24, 0)


def new_tokens(time: int, groups: int = 2, seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(1, heads, time, 64, generator=generator) for heads in (4, groups, groups)
    )


REFUSED = ["int4", "int4-w5-s3", "f16", "fp8", "turbo4-w8", "kivi4-w32"]


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("tokens", [1, 40])
def test_a_refused_pair_leaves_the_cache_as_it_was(name, tokens):
    """Keys that could be stored are not, where their values cannot."""
    cache, other = QuantizedCache(name), QuantizedCache(name)
    for one in (cache, other):
        one.attend(*new_tokens(8), layer=0)
    q, k, v = new_tokens(tokens, seed=1)
    for bad in (k, v):
        bad[0, 1, -1, 3], was = torch.nan, bad[0, 1, -1, 3].item()
        for refused in (lambda: cache.attend(q, k, v, 0), lambda: cache.update(k, v, 0)):
            with pytest.raises(ValueError, match=r"hold 1 NaN or infinite values$"):
                refused()
        bad[0, 1, -1, 3] = was
    assert [len(store) for store in cache.stores[0]] == [8, 8]
    assert torch.equal(cache.attend(q, k, v, 0), other.attend(q, k, v, 0))
    # Keys that came alone would have made a difference.
    other.stores[0][0].append(other.stores[0][0].rounded(k))
    assert [len(store) for store in other.stores[0]] == [8 + 2 * tokens, 8 + tokens]


@pytest.mark.parametrize("name", ["int4", "bf16"])
@pytest.mark.parametrize("shape", [(1, 2, 2, 64), (1, 1, 3, 64), (2, 2, 3, 64)])
def test_keys_and_values_that_do_not_belong_together(name, shape):
    cache, k, v = QuantizedCache(name), torch.ones(1, 2, 3, 64), torch.ones(shape)
    for given in ((k, v), (v, k)):
        found = f"keys {list(given[0].shape)} and values {list(given[1].shape)}"
        message = f"layer 4: {found} differ in batch, heads or tokens"
        for call in ("update", "attend"):
            pair = given if call == "update" else (torch.ones(1, 4, 3, 64), *given)
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                getattr(cache, call)(*pair, layer=4)
    assert (cache.length, cache.nbytes, cache.bytes_per_token) == (0, 0, 0)
    # What was refused does not say what the first tokens are like; values may have another width.
    cache.attend(torch.ones(1, 3, 5, 64), torch.ones(1, 3, 5, 64), torch.ones(1, 3, 5, 32), 4)
    assert cache.length == 5


def test_every_refusal_names_the_layer():
    wide = replace(kv_format("int4"), dtype=torch.float32)
    none = "no construction of a Hadamard matrix of size 188 is known here: pad the rows to 192"
    for form, x, problem in (
        ("turbo4", torch.full((1, 2, 1, 64), 3e4), "a norm of 2.4e+05 overflows float16"),
        (wide, torch.full((1, 2, 1, 64), 1e5), "an offset of 1e+05 overflows float16"),
        ("int4-hadamard", torch.ones(1, 2, 1, 188), none),
    ):
        for call in ("update", "attend"):
            pair = (x, x) if call == "update" else (x, x, x)
            with pytest.raises(ValueError, match=f"^layer 7: keys: {re.escape(problem)}"):
                getattr(QuantizedCache(form), call)(*pair, layer=7)
    with pytest.raises(ValueError, match=r"^layer 7: values: a norm of 2.4e\+05 overflows"):
        QuantizedCache("turbo4").update(torch.ones(1, 2, 1, 64), torch.full((1, 2, 1, 64), 3e4), 7)


@pytest.mark.parametrize("name", ["f32", "int8-w32", "int8-hadamard-kv"])
def test_a_gradient_flows_to_the_queries_of_every_step(name):
    q, k, v = new_tokens(8)
    cache, q = QuantizedCache(replace(kv_format(name), dtype=torch.float32)), q.requires_grad_()
    parts = zip(*(x.split(2, dim=2) for x in (q, k, v)), strict=True)
    y = torch.cat([cache.attend(*part, layer=0) for part in parts], dim=2)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
    (found,) = torch.autograd.grad((y * weight).sum(), q)
    (expected,) = torch.autograd.grad((attention(q, k, v) * weight).sum(), q)
    bound = {"f32": 1e-5, "int8-w32": 1e-5}.get(name, 1e-2)
    assert (found - expected).norm() < bound * expected.norm()
    assert (found - expected.flip(2)).norm() > 0.5 * expected.norm()


def test_what_update_returns_is_not_the_cache():
    _, k, v = new_tokens(8)
    cache = DenseCache()
    for x in cache.update(k, v, 0):
        x.zero_()
    found = cache.update(k[:, :, :1], v[:, :, :1], 0)
    assert all(torch.equal(x[:, :, :8], y) for x, y in zip(found, (k, v), strict=True))
    # Where text is generated nothing is copied.
    with torch.no_grad():
        keys = cache.update(k, v, 0)[0]
    assert keys.data_ptr() == cache.stores[0][0].recent.view.data_ptr() != found[0].data_ptr()
