"""Another order of the channels of a model, in place."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from .model import Decoder, Layer


@torch.no_grad()
def permute_channels(model: Decoder, seed: int) -> Decoder:
    """Reorder the channels of a model at random, in place: other groups, the same function.

    A network does not care in which order its channels come; a quantizer that scales groups of
    neighboring channels does. Reordered are the residual stream, the inner channels of every MLP,
    and the channels of every value head together with the columns of o_proj that read them. Query
    and key channels keep their places, because rotary positions pair them by index.

    Args:
        model: a decoder with dense weights; peak extra memory is its largest weight.
        seed: the same seed gives the same order on every machine and torch version.

    Returns the model that it was given.
    """
    rng = random.Random(seed)
    residual = _order(rng, model.config.hidden_size)
    _take(model.model.embed_tokens, 1, residual)
    _take(model.model.norm, 0, residual)
    if not model.config.tie_word_embeddings:
        _take(model.lm_head, 1, residual)
    for layer in model.model.layers:
        _permute_residual(layer, residual)
        _permute_inner(layer, _order(rng, model.config.intermediate_size))
        _permute_values(layer, rng, model.config.num_key_value_heads)
    return model


def _permute_residual(layer: Layer, order: Tensor) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        _take(norm, 0, order)
    for reads in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
        _take(reads, 1, order)
    for writes in (attention.o_proj, mlp.down_proj):
        _take(writes, 0, order)


def _permute_inner(layer: Layer, order: Tensor) -> None:
    _take(layer.mlp.gate_proj, 0, order)
    _take(layer.mlp.up_proj, 0, order)
    _take(layer.mlp.down_proj, 1, order)


def _permute_values(layer: Layer, rng: random.Random, kv_heads: int) -> None:
    attention = layer.self_attn
    size = attention.head_dim
    orders = [_order(rng, size) for _ in range(kv_heads)]
    _take(attention.v_proj, 0, torch.cat([h * size + order for h, order in enumerate(orders)]))
    # Several query heads read one value head: their slices of o_proj follow its order.
    heads = attention.o_proj.weight.shape[1] // size
    readers = [orders[h * kv_heads // heads] for h in range(heads)]
    _take(attention.o_proj, 1, torch.cat([h * size + order for h, order in enumerate(readers)]))


def _order(rng: random.Random, size: int) -> Tensor:
    # random() is the one stream that Python promises to keep; torch promises none.
    keys = [rng.random() for _ in range(size)]
    return torch.tensor(sorted(range(size), key=keys.__getitem__))


def _take(module: torch.nn.Module, axis: int, order: Tensor) -> None:
    module.weight.data = module.weight.data.index_select(axis, order.to(module.weight.device))
