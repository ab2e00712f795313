"""The decoder against transformers' Llama, against itself with a cache, and against bad configs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from qlib.cache import DenseCache, QuantizedCache, kv_format
from qlib.model import Config, Decoder

TINY = Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=5000.0,
    tie_word_embeddings=True,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
)
VARIANTS = {
    "gqa-tied": TINY,
    "gqa-untied": replace(TINY, tie_word_embeddings=False),
    "mha-tied": replace(TINY, num_key_value_heads=4),
    "mha-untied": replace(TINY, num_key_value_heads=4, tie_word_embeddings=False),
    "wide-heads": replace(TINY, head_dim=16, num_key_value_heads=1),
}


def random_decoder(config: Config, seed: int = 0) -> Decoder:
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(config).normal_init(std=0.2, generator=generator)
    # Gains of 1 would hide a norm that is applied in the wrong place.
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
    return model.requires_grad_(False)


def random_tokens(batch: int = 2, time: int = 13, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(TINY.vocab_size, (batch, time), generator=generator)


def transformers_twin(model: Decoder) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    twin = LlamaForCausalLM(LlamaConfig(**model.config.to_hf())).eval()
    missing, unexpected = twin.load_state_dict(model.state_dict(), strict=False)
    assert missing == (["lm_head.weight"] if model.config.tie_word_embeddings else [])
    assert unexpected == []
    return twin


def largest_difference(model: Decoder, twin: torch.nn.Module) -> float:
    tokens = random_tokens()
    with torch.no_grad():
        return (model(tokens) - twin(tokens).logits).abs().max().item()


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_transformers(name):
    model = random_decoder(VARIANTS[name])
    assert largest_difference(model, transformers_twin(model)) < 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_two_swapped_query_rows_are_noticed(name):
    model = random_decoder(VARIANTS[name])
    twin = transformers_twin(model)
    rows = model.model.layers[1].self_attn.q_proj.weight.data
    rows[[3, 5]] = rows[[5, 3]]
    assert largest_difference(model, twin) > 1e-2


def test_both_names_of_the_rope_settings_give_the_same_function():
    from transformers import LlamaConfig

    written_by_transformers = LlamaConfig(**TINY.to_hf()).to_dict()
    assert Config.from_hf(written_by_transformers) == TINY


@pytest.mark.parametrize("chunks", [[1] * 13, [5, 1, 7], [12, 1], [1, 12]])
def test_cached_decoding_equals_the_full_forward(chunks):
    model, tokens, cache = random_decoder(TINY), random_tokens(), DenseCache()
    parts = [model(part, cache) for part in tokens.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), atol=1e-5, rtol=0)
    assert [keys.read().shape for keys, _ in cache.stores.values()] == [(2, 2, 13, 8)] * 2


def test_a_changed_cache_entry_is_noticed():
    model, tokens, cache = random_decoder(TINY), random_tokens(), DenseCache()
    model(tokens[:, :12], cache)
    cache.stores[0][1].recent.view[:, :, 4] += 1.0
    assert (model(tokens[:, 12:], cache) - model(tokens)[:, 12:]).abs().max() > 1e-2


def test_later_tokens_do_not_change_earlier_logits():
    model, tokens = random_decoder(TINY), random_tokens()
    other = tokens.clone()
    other[:, 9:] = (other[:, 9:] + 1) % TINY.vocab_size
    assert torch.equal(model(tokens)[:, :9], model(other)[:, :9])
    assert not torch.equal(model(tokens)[:, 9:], model(other)[:, 9:])


def test_greedy_generation_takes_the_argmax_of_the_full_forward():
    model = random_decoder(replace(TINY, eos_token_id=None))
    tokens = random_tokens(time=4)
    expected = tokens
    for _ in range(6):
        newest = model(expected)[:, -1].argmax(-1, keepdim=True)
        expected = torch.cat((expected, newest), dim=1)
    assert torch.equal(model.generate(tokens, 6), expected)
    assert torch.equal(model.generate(tokens, 6), expected)
    assert torch.equal(model.generate(tokens, 0), tokens)


def test_generation_takes_a_format_for_a_cache():
    model = random_decoder(replace(TINY, eos_token_id=None))
    tokens = random_tokens(time=20)
    expected = model.generate(tokens, 30, cache=QuantizedCache("int2"))
    for given in ("int2", kv_format("int2"), "f32", None):
        same = torch.equal(model.generate(tokens, 30, cache=given), expected)
        assert same == (given not in ("f32", None))


@pytest.mark.parametrize("given", [4, ["int4"], QuantizedCache])
def test_what_is_no_cache_is_refused(given):
    need = "a cache such as QuantizedCache('int4'), a KVFormat or a name of one"
    with pytest.raises(TypeError) as caught:
        random_decoder(TINY).generate(random_tokens(), 2, cache=given)
    assert str(caught.value) == f"cache must be {need}, got {type(given).__name__}"


def test_sampling_repeats_with_its_generator_and_varies_with_the_seed():
    model = random_decoder(replace(TINY, eos_token_id=None))
    tokens = random_tokens(time=4)

    def sample(seed: int) -> torch.Tensor:
        return model.generate(tokens, 20, 1.0, torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


@pytest.mark.parametrize("as_tuple", [False, True])
def test_generation_stops_at_an_end_token(as_tuple):
    free = random_decoder(replace(TINY, eos_token_id=None))
    tokens = random_tokens(batch=1, time=4)
    long = free.generate(tokens, 6)
    end = long[0, 6].item()
    first = long[0, 4:].tolist().index(end)
    config = replace(TINY, eos_token_id=(end, 60) if as_tuple else end)
    assert torch.equal(random_decoder(config).generate(tokens, 6), long[:, : 5 + first])


def test_too_many_tokens_are_refused():
    model, message = random_decoder(TINY), "65 tokens exceed the model's max_position_embeddings 64"
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(random_tokens(time=65))
    cache = DenseCache()
    model(random_tokens(time=64), cache)
    with pytest.raises(ValueError, match=f"^{message}$"):
        model(random_tokens(time=1), cache)


def test_weights_can_be_assigned_to_a_model_without_memory():
    model = random_decoder(TINY)
    with torch.device("meta"):
        empty = Decoder(TINY)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(random_tokens()), model(random_tokens()))


def test_normal_init_has_the_stated_standard_deviations():
    model = Decoder(replace(TINY, hidden_size=256)).normal_init(0.1, torch.Generator())
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.1, rel=0.03)
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.std().item() == pytest.approx(0.1 / 2, rel=0.03)
    assert torch.equal(model.model.norm.weight, torch.ones(256))


def test_config_defaults_of_a_short_file():
    raw = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 8,
        "head_dim": None,
        "eos_token_id": [2, 3],
    }
    expected = Config(100, 64, 128, 1, 8, 8, 8, 1e-6, 1e4, False, 2048, None, (2, 3))
    assert Config.from_hf(raw) == expected


BAD = [
    ({"model_type": "gpt2"}, "config: model_type 'gpt2' is not supported; need 'llama' or 'qwen2'"),
    ({"model_type": None}, "config: model_type None is not supported; need 'llama' or 'qwen2'"),
    ({"hidden_act": "gelu"}, "config: hidden_act 'gelu' is not supported; need 'silu'"),
    ({"attention_bias": True}, "config: attention_bias True is not supported; need False"),
    ({"mlp_bias": True}, "config: mlp_bias True is not supported; need False"),
    ({"use_sliding_window": True}, "config: use_sliding_window True is not supported; need False"),
    (
        {"rope_parameters": {"type": "linear"}},
        "config: rope_type 'linear' is not supported; need 'default' or 'llama3' or 'longrope'",
    ),
    ({"rope_scaling": "x"}, "config: rope_scaling must be a dictionary, got 'x'"),
    ({"bos_token_id": 61}, "config: bos_token_id 61 is not in a vocabulary of 61"),
    ({"eos_token_id": [1, "2"]}, "config: eos_token_id (1, '2') is not in a vocabulary of 61"),
    ({"hidden_size": None}, "config: hidden_size must be a positive integer, got None"),
    ({"vocab_size": "61"}, "config: vocab_size must be a positive integer, got '61'"),
    ({"num_hidden_layers": 0}, "config: num_hidden_layers must be a positive integer, got 0"),
    (
        {"num_attention_heads": True},
        "config: num_attention_heads must be a positive integer, got True",
    ),
    ({"rope_theta": 10**400}, f"config: rope_theta must be a positive number, got {10**400}"),
    ({"rope_theta": -1.0}, "config: rope_theta must be a positive number, got -1.0"),
    ({"rms_norm_eps": float("nan")}, "config: rms_norm_eps must be a positive number, got nan"),
    ({"head_dim": 7}, "config: head_dim 7 must be even for rotary positions"),
    (
        {"num_key_value_heads": 3},
        "config: num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Config.from_hf(TINY.to_hf() | change)
