"""From named tensors to a Decoder: what a checkpoint must hold, whichever container it came in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import FormatError
from ..model import Config, Decoder

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def parameter_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every parameter of ``Decoder(config)``, without building it."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    key = config.num_key_value_heads * config.head_dim
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    yield "model.embed_tokens.weight", (config.vocab_size, hidden)
    yield "model.norm.weight", (hidden,)
    if not config.tie_word_embeddings:
        yield "lm_head.weight", (config.vocab_size, hidden)
    for index in range(config.num_hidden_layers):
        for name, shape in layer.items():
            yield f"model.layers.{index}.{name}.weight", shape
            if config.qkv_bias and name in QKV:
                yield f"model.layers.{index}.{name}.bias", shape[:1]


def assemble(
    path: str | os.PathLike,
    config: Config,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> Decoder:
    """Build a decoder whose parameters are the tensors that ``read(name)`` returns.

    Args:
        path: where the tensors come from, for messages.
        config: the sizes of the model.
        shapes: shape of every tensor on offer, by Hugging Face name.
        read: called once per parameter, so that a model is never in memory twice.

    The model is in evaluation mode and its parameters do not require gradients.
    Raises FormatError for a tensor that is missing, left over, or of another shape.
    """
    names = _check(path, config, shapes)
    model = empty_decoder(config)
    model.load_state_dict({name: read(name) for name in names}, assign=True)
    return model.eval().requires_grad_(False)


def empty_decoder(config: Config) -> Decoder:
    """A decoder on the meta device: it has shapes and no memory, until tensors are assigned."""
    with torch.device("meta"), _Uninitialized():
        return Decoder(config)


class _Uninitialized(TorchFunctionMode):
    """Skips torch.nn.init: on the meta device its normal_ imports sympy, which takes a second."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


def _check(
    path: str | os.PathLike, config: Config, shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    names = []
    # Shapes are compared one by one, so a config with 2^31 layers ends at the first missing tensor.
    for name, need in parameter_shapes(config):
        if name not in shapes:
            raise FormatError(path, name, "this tensor is missing")
        if tuple(shapes[name]) != need:
            raise FormatError(
                path, name, f"has shape {list(shapes[name])}, but the config needs {list(need)}"
            )
        names.append(name)
    extra = sorted(set(shapes) - set(names))
    if extra:
        message = f"this tensor is not part of a {config.model_type} decoder of this config"
        raise FormatError(path, extra[0], message)
    return names
