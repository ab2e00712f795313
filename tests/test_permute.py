"""A permuted model is the same function with other groups."""

from __future__ import annotations

import pytest
import torch

from qlib.model import Config, Decoder
from qlib.permute import _take, permute_channels

GQA = Config(61, 32, 48, 2, 4, 2, 8, max_position_embeddings=64)
UNTIED = Config(61, 32, 48, 2, 6, 1, 16, tie_word_embeddings=False, max_position_embeddings=64)


def decoder(config):
    generator = torch.Generator().manual_seed(0)
    model = Decoder(config).normal_init(0.2, generator).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
    return model


def prompt():
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("config", [GQA, UNTIED])
def test_the_function_does_not_change(config):
    before, after = decoder(config), permute_channels(decoder(config), seed=3)
    assert (after(prompt()) - before(prompt())).abs().max() < 1e-5


@pytest.mark.parametrize("config", [GQA, UNTIED])
def test_every_weight_moves_and_keeps_its_values(config):
    before, after = decoder(config), permute_channels(decoder(config), seed=3)
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert not torch.equal(old, new), name
        assert torch.equal(old.flatten().sort().values, new.flatten().sort().values)


def test_query_and_key_rows_keep_their_order():
    before, after = decoder(GQA), permute_channels(decoder(GQA), seed=3)
    for name in ("q_proj", "k_proj"):
        old = getattr(before.model.layers[0].self_attn, name).weight
        new = getattr(after.model.layers[0].self_attn, name).weight
        # Columns moved, rows did not: each row holds the values that it held.
        assert torch.equal(old.sort(1).values, new.sort(1).values)


def test_one_wrong_swap_is_noticed():
    before, after = decoder(GQA), permute_channels(decoder(GQA), seed=3)
    order = torch.arange(32)
    order[:2] = torch.tensor([1, 0])
    _take(after.model.layers[0].self_attn.o_proj, 1, order)
    assert (after(prompt()) - before(prompt())).abs().max() > 1e-3


def test_the_seed_decides():
    def first(seed):
        return permute_channels(decoder(GQA), seed).model.embed_tokens.weight

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))
    # Written down, so that a change of the order is noticed: it would change every number measured.
    norm = torch.arange(32.0)
    model = decoder(GQA)
    model.model.norm.weight.copy_(norm)
    order = permute_channels(model, 0).model.norm.weight[:8]
    assert order.int().tolist() == [25, 15, 3, 12, 7, 20, 5, 2]
