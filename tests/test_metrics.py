"""Perplexity and divergence against torch and transformers, and the memory they need."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F

from qlib import metrics
from qlib.metrics import Protocol, Reference, divergence, mean_and_error, perplexity, token_scores
from qlib.model import Config, Decoder

VOCAB, BOS = 61, 1


def tiny_decoder(seed: int = 0, tied: bool = True) -> Decoder:
    config = Config(VOCAB, 32, 48, 2, 4, 2, 8, tie_word_embeddings=tied, max_position_embeddings=64)
    generator = torch.Generator().manual_seed(seed)
    return Decoder(config).normal_init(0.3, generator).requires_grad_(False)


def tiny_llama(seed: int = 0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def random_tokens(n: int, seed: int = 3) -> torch.Tensor:
    return torch.randint(2, VOCAB, (n,), generator=torch.Generator().manual_seed(seed))


def loop_logits(model, protocol: Protocol) -> torch.Tensor:
    """Logits that predict every token, one token and one forward pass at a time, no windows."""
    start = [] if protocol.bos is None else [protocol.bos]
    room = protocol.context - len(start)
    tokens, rows = protocol.tokens.tolist(), []
    for i in range(0 if start else 1, len(tokens)):
        # Which past a token may see: its window is the first, or ends at the next multiple.
        first = protocol.context + 1 - len(start)
        over = max(0, i + 1 - first)
        stop = min(len(tokens), first + math.ceil(over / protocol.stride) * protocol.stride)
        past = tokens[max(0, stop - 1 - room) : i]
        output = model(torch.tensor([start + past]))
        rows.append(getattr(output, "logits", output)[0, -1])
    return torch.stack(rows).double()


def loop_targets(protocol: Protocol) -> torch.Tensor:
    return protocol.tokens[0 if protocol.bos is not None else 1 :]


PROTOCOLS = {
    "bos": Protocol("t", random_tokens(50), 16, 16, BOS),
    "no-bos": Protocol("t", random_tokens(50), 16, 16),
    "overlap": Protocol("t", random_tokens(45), 16, 5, BOS),
    "overlap-no-bos": Protocol("t", random_tokens(45), 16, 5),
    "shorter-than-a-window": Protocol("t", random_tokens(9), 16, 16, BOS),
    "two-tokens": Protocol("t", random_tokens(2), 16, 16),
    "exact-fit": Protocol("t", random_tokens(32), 16, 16, BOS),
}


# -- perplexity -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROTOCOLS)
def test_perplexity_equals_cross_entropy_of_full_logits(name):
    protocol, model = PROTOCOLS[name], tiny_decoder()
    wanted = F.cross_entropy(loop_logits(model, protocol), loop_targets(protocol)).exp()
    assert perplexity(model, protocol).value == pytest.approx(wanted.item(), rel=1e-5)


def test_a_changed_past_is_noticed():
    protocol, model = PROTOCOLS["overlap"], tiny_decoder()
    wanted = F.cross_entropy(loop_logits(model, protocol), loop_targets(protocol)).exp().item()
    twin = Protocol("t", protocol.tokens, protocol.context, protocol.stride + 1, protocol.bos)
    assert perplexity(model, twin).value != pytest.approx(wanted, rel=1e-3)


def huggingface_loss(model, tokens: list[int], context: int) -> float:
    """Sum of transformers' own losses over windows that start with BOS, cut by this function."""
    total = 0.0
    for start in range(0, len(tokens), context):
        fresh = min(context, len(tokens) - start)
        ids = [BOS, *tokens[max(0, start + fresh - context) : start + fresh]]
        labels = [-100] * (len(ids) - fresh) + ids[len(ids) - fresh :]
        total += model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item() * fresh
    return math.exp(total / len(tokens))


def test_perplexity_equals_transformers_loss():
    model, tokens = tiny_llama(), random_tokens(90)
    wanted = huggingface_loss(model, tokens.tolist(), context=16)
    assert perplexity(model, Protocol("t", tokens, 16, 16, BOS)).value == pytest.approx(
        wanted, rel=1e-5
    )


def test_one_changed_token_is_noticed():
    model, tokens = tiny_llama(), random_tokens(90)
    wanted = huggingface_loss(model, tokens.tolist(), context=16)
    tokens[89] = (tokens[89] + 1) % VOCAB
    assert perplexity(model, Protocol("t", tokens, 16, 16, BOS)).value != pytest.approx(
        wanted, rel=1e-5
    )


def test_bos_changes_the_prediction_of_the_first_tokens():
    model, tokens = tiny_decoder(), random_tokens(50)
    values = {bos: perplexity(model, Protocol("t", tokens, 16, 16, bos)).value for bos in (1, 2)}
    assert values[1] != pytest.approx(values[2], rel=1e-3)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary():
    model = tiny_decoder(tied=False)
    model.lm_head.weight.data.zero_()
    result = perplexity(model, PROTOCOLS["bos"])
    assert result.value == pytest.approx(VOCAB, rel=1e-6)


def test_bfloat16_model_is_scored_in_float32():
    model = tiny_decoder().bfloat16()
    logits = loop_logits(model, PROTOCOLS["bos"])
    wanted = F.cross_entropy(logits, loop_targets(PROTOCOLS["bos"])).exp().item()
    assert perplexity(model, PROTOCOLS["bos"]).value == pytest.approx(wanted, rel=0.02)


def test_a_hopeless_model_has_infinite_perplexity():
    model = tiny_decoder(tied=False)
    model.lm_head.weight.data.mul_(1e5)
    assert perplexity(model, PROTOCOLS["bos"]).value == math.inf


def test_a_broken_model_has_no_perplexity():
    model = tiny_decoder()
    model.model.norm.weight.data[3] = math.nan
    assert math.isnan(perplexity(model, PROTOCOLS["bos"]).value)
    assert math.isnan(divergence(tiny_decoder(), model, PROTOCOLS["bos"]).kl)


def test_perplexity_prints_its_protocol_and_error():
    text = str(metrics.Perplexity(12.3456, 0.4321, PROTOCOLS["bos"]))
    assert text == (
        "perplexity 12.35 ± 0.43 (t, 50 tokens, context 16, stride 16, BOS)"
    )  # fmt: skip


# -- divergence -----------------------------------------------------------------------------------


def full_kl(protocol: Protocol, reference, model) -> torch.Tensor:
    log_p = loop_logits(reference, protocol).log_softmax(-1)
    log_q = loop_logits(model, protocol).log_softmax(-1)
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_divergence_equals_torch_kl_of_full_logits(name):
    protocol, one, two = PROTOCOLS[name], tiny_decoder(0), tiny_decoder(7)
    kl = token_scores(one, two, protocol).kl
    torch.testing.assert_close(kl.double(), full_kl(protocol, one, two), rtol=1e-4, atol=1e-5)


def test_divergence_is_not_symmetric():
    protocol, one, two = PROTOCOLS["bos"], tiny_decoder(0), tiny_decoder(7)
    swapped = full_kl(protocol, two, one)
    assert not torch.allclose(token_scores(one, two, protocol).kl.double(), swapped, rtol=1e-2)


def test_divergence_of_a_model_from_itself_is_exactly_zero():
    model = tiny_decoder()
    result = divergence(model, model, PROTOCOLS["overlap"])
    assert (result.kl, result.kl_99, result.top1) == (0.0, 0.0, 1.0)
    assert result.perplexity.value == result.reference_perplexity.value


def test_one_changed_weight_is_a_divergence():
    model, twin = tiny_decoder(), tiny_decoder()
    twin.model.layers[0].mlp.down_proj.weight.data[0, 0] += 0.1
    assert divergence(model, twin, PROTOCOLS["overlap"]).kl > 1e-7


def test_divergence_summarizes_the_token_scores():
    protocol, one, two = PROTOCOLS["bos"], tiny_decoder(0), tiny_decoder(7)
    logits = [loop_logits(model, protocol) for model in (one, two)]
    result = divergence(one, two, protocol)
    kl = full_kl(protocol, one, two)
    agree = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
    assert result.kl == pytest.approx(kl.mean().item(), rel=1e-4)
    assert result.kl_99 == pytest.approx(kl.quantile(0.99).item(), rel=1e-4)
    assert result.top1 == pytest.approx(agree.item())
    for found, wanted in zip((result.reference_perplexity, result.perplexity), logits):
        nll = F.cross_entropy(wanted, loop_targets(protocol))
        assert found.value == pytest.approx(nll.exp().item(), rel=1e-5)


def test_one_reference_serves_many_models():
    protocol, one = PROTOCOLS["bos"], tiny_decoder(0)
    reference = Reference(one, protocol)
    for seed in (1, 2):
        model = tiny_decoder(seed)
        shared, fresh = (token_scores(ref, model, protocol) for ref in (reference, one))
        assert torch.equal(shared.kl, fresh.kl)
        assert torch.equal(shared.nll, fresh.nll)


def test_huggingface_and_own_decoder_agree():
    hf = tiny_llama()
    own = Decoder(Config.from_hf(hf.config.to_dict()))
    own.load_state_dict(hf.state_dict())
    result = divergence(hf, own, PROTOCOLS["overlap"])
    assert 0 <= result.kl < 1e-9
    assert result.top1 == 1


def test_divergence_prints_its_protocol_and_error():
    perplexities = [metrics.Perplexity(x, 1.0, PROTOCOLS["bos"]) for x in (12.0, 10.0)]
    result = metrics.Divergence(0.1234, 0.0056, 1.5, 0.875, 0.01, *perplexities, 0.0213)
    assert str(result) == (
        "KL 0.123 ± 0.006 nats, 99% 1.5, top-1 87.5% ± 1.0%, perplexity ratio 1.2 ± 0.02 "
        "(t, 50 tokens, context 16, stride 16, BOS)"
    )


def test_error_of_the_ratio_is_that_of_paired_tokens():
    """The logarithm of the ratio is a mean over tokens; halves of it agree with its error."""
    model = tiny_llama()
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    protocol = Protocol("t", random_tokens(6 * metrics.ERROR_BLOCK), 16, 16)
    result, scores = divergence(model, other, protocol), token_scores(model, other, protocol)
    mean, error = mean_and_error(scores.nll - scores.reference_nll)
    assert result.ratio == pytest.approx(math.exp(mean), rel=1e-5)
    assert result.ratio_error == pytest.approx(result.ratio * error, rel=1e-5)
    alone = [mean_and_error(x)[1] for x in (scores.nll, scores.reference_nll)]
    assert result.ratio_error < result.ratio * sum(alone)


# -- memory ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("measure", ["perplexity", "divergence"])
def test_logits_are_made_a_few_tokens_at_a_time(measure, monkeypatch):
    model, protocol = tiny_decoder(), Protocol("t", random_tokens(600), 64, 64, BOS)
    sizes, plain = [], Decoder.head

    def head(self, hidden):
        sizes.append(hidden.shape[:-1].numel())
        return plain(self, hidden)

    monkeypatch.setattr(Decoder, "head", head)
    if measure == "perplexity":
        perplexity(model, protocol)
    else:
        divergence(model, model, protocol)
    assert max(sizes) <= metrics.HEAD_TOKENS
    assert sum(sizes) == 600 * (1 if measure == "perplexity" else 2)


def test_windows_are_batched_within_a_bound(monkeypatch):
    shapes, plain = [], Decoder.hidden

    def hidden(self, tokens, cache=None):
        shapes.append(tuple(tokens.shape))
        return plain(self, tokens, cache)

    monkeypatch.setattr(Decoder, "hidden", hidden)
    perplexity(tiny_decoder(), Protocol("t", random_tokens(3000), 32, 32, BOS))
    assert max(rows for rows, _ in shapes) > 1
    assert all(rows * (time + 1) <= metrics.BATCH_TOKENS for rows, time in shapes)


# -- errors, word for word ------------------------------------------------------------------------


def test_reference_of_another_protocol():
    reference = Reference(tiny_decoder(), PROTOCOLS["bos"])
    message = (
        "the reference was made with another protocol: t, 50 tokens, context 16, stride 16, BOS"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        divergence(reference, tiny_decoder(), PROTOCOLS["no-bos"])


def test_logits_that_are_not_a_linear_head():
    from transformers import GraniteConfig, GraniteForCausalLM

    config = GraniteConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, logits_scaling=8.0, initializer_range=0.5,
    )  # fmt: skip
    message = "GraniteForCausalLM transforms its logits after the head"
    with pytest.raises(ValueError, match=f"^{message}$"):
        perplexity(GraniteForCausalLM(config).eval(), PROTOCOLS["bos"])
