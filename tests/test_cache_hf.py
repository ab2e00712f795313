"""The cache of transformers' generate on our stores, against transformers' own."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tiny_models import VOCAB, huggingface

from qlib.cache.format import KVFormat
from qlib.cache.hf import HFCache

FULL = KVFormat(dtype=None)
FAMILIES = ["Llama", "Qwen2"]


def prompts(batch: int = 2, time: int = 9) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, time), generator=torch.Generator().manual_seed(1))


def generated(model, cache, tokens=None, new: int = 30, **options) -> torch.Tensor:
    tokens = prompts() if tokens is None else tokens
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None} | options
    return model.generate(tokens, past_key_values=cache, max_new_tokens=new, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 0}])
def test_generate_equals_the_dynamic_cache(family, options):
    from transformers import DynamicCache

    model = huggingface(family)
    torch.manual_seed(3)
    expected = generated(model, DynamicCache(), **options)
    for form in (FULL, KVFormat(rotate="keys+values", dtype=None)):
        torch.manual_seed(3)
        cache = HFCache(form)
        assert torch.equal(generated(model, cache, **options), expected)
        assert cache.get_seq_length() == 9 + 29
    torch.manual_seed(3)
    assert not torch.equal(generated(model, HFCache("int1"), **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_prompts(family):
    from transformers import DynamicCache

    model, tokens = huggingface(family), prompts()
    mask = torch.ones_like(tokens)
    tokens[0, :4], mask[0, :4] = 0, 0
    expected = generated(model, DynamicCache(), tokens, attention_mask=mask)
    assert torch.equal(generated(model, HFCache(FULL), tokens, attention_mask=mask), expected)
    unmasked = torch.ones_like(mask)
    assert not torch.equal(
        generated(model, HFCache(FULL), tokens, attention_mask=unmasked), expected
    )


@pytest.mark.parametrize("name", ["int4-g8", "kivi4-g8-w16", "int8-g8-hadamard-kv", "fp8"])
def test_logits_equal_those_of_our_decoder(name):
    """The same cache below transformers' Llama and below ours."""
    from tiny_models import tiny_decoder
    from transformers import LlamaConfig, LlamaForCausalLM

    from qlib.cache import QuantizedCache

    ours = tiny_decoder()
    theirs = LlamaForCausalLM(LlamaConfig(**ours.config.to_hf())).eval().requires_grad_(False)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    cache, own = HFCache(name), QuantizedCache(name)
    differences = []
    for part in prompts(time=40).split(5, dim=1):
        expected = ours(part, own)
        logits = theirs(part, past_key_values=cache, use_cache=True).logits
        differences.append((logits - expected).abs().median())
    assert max(differences) < 1e-4
    assert cache.own.nbytes == own.nbytes
    assert cache.own.bytes_per_token == own.bytes_per_token


def test_a_quantized_cache_is_smaller():
    model = huggingface("Llama")
    full, small = HFCache("f16"), HFCache("int4-g8")
    generated(model, full)
    generated(model, small)
    # Heads of 8 values: 4 bytes of codes, a scale and a minimum, instead of 16 bytes.
    assert (small.own.nbytes, full.own.nbytes) == (2 * 2 * 2 * 2 * 38 * 8, 2 * 2 * 2 * 2 * 38 * 16)


def test_reset_and_selection():
    model, cache = huggingface("Llama"), HFCache("kivi4-g8-w16")
    model(prompts(time=20), past_key_values=cache)
    first = cache.own.stores[1][0].read()
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.own.stores[1][0].read(), first[[0, 0, 1, 1]])
    cache.batch_select_indices(torch.tensor([2]))
    assert torch.equal(cache.own.stores[1][0].read(), first[[1]])
    with pytest.raises(NotImplementedError, match="cannot forget its newest tokens"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.own.nbytes == 0
    logits = model(prompts(time=20), past_key_values=cache).logits
    again = model(prompts(time=20), past_key_values=HFCache("kivi4-g8-w16")).logits
    assert torch.equal(logits, again)


def test_a_refused_first_token_leaves_a_cache_that_can_be_used():
    cache, k = HFCache("int4-g8"), torch.ones(2, 2, 3, 8)
    with pytest.raises(ValueError, match="layer 0"):
        cache.update(k * torch.nan, k, 0)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0]))
    assert cache.get_seq_length() == 0
    assert cache.update(k, k, 0)[0].shape == k.shape


def saved_and_loaded(cache: HFCache) -> HFCache:
    file = io.BytesIO()
    torch.save(cache, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("filled", [False, True])
def test_a_copy_is_a_cache_of_its_own(copied, filled):
    model, cache, tokens = huggingface("Llama"), HFCache("kivi4-g8-w16"), prompts(time=40)
    whole = HFCache("kivi4-g8-w16")
    if filled:
        for one in (cache, whole):
            model(tokens[:, :21], past_key_values=one)
    other, rest = copied(cache), tokens[:, 21:]
    expected = model(rest, past_key_values=whole).logits
    for one in (other, cache):
        assert one.get_seq_length() == 21 * filled
        assert torch.equal(model(rest, past_key_values=one).logits, expected)
        assert one.own.length == one.get_seq_length() == 21 * filled + 19
        assert all(layer.own is one.own for layer in one.layers)
    assert not torch.equal(model(rest, past_key_values=other).logits, expected)
