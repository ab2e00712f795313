"""QuaRot: rotations of a whole model that leave its function as it is and take its outliers away.

A row x of the residual stream is written by some linear layers and read by others. If all writers
give x R instead, for an orthogonal matrix R, and all readers multiply by R.T first, nothing else
notices: an RMS norm divides by the length of x, which a rotation keeps, once its gains have moved
into the readers. Both products are made beforehand, in the weights. There are four such places:

    R1  the residual stream, between embedding, blocks and head       in the weights
    R2  every head of the values, between v_proj and o_proj           in the weights
    R3  queries and keys, between rotary positions and their product  in the cache (`qlib.cache`)
    R4  the inputs of down_proj, after the product with the gate      in every call, O(n log n)

R is a Hadamard matrix whose rows have random signs: it spreads a channel of the stream over all.
`qlib.methods.spinquant` learns R1 and R2 instead. R1 and R2 leave an ordinary checkpoint.
Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import is_dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import require_model
from ..fold import QKV
from ..linear import DenseLinear, QLinear, replace_layer
from ..progress import bar
from ..structure import decoder_blocks, decoder_linears
from ..transform import Hadamard, Orthogonal, Transform

READERS = {
    "input_layernorm": QKV,
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
VALUES, OUTPUT, DOWN = "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"
# These norm the heads of queries and keys, which no rotation here touches.
OPTIONAL = ("self_attn.q_norm", "self_attn.k_norm")
# Rows of a weight that are in float64 at a time.
ROWS = 4096


@torch.no_grad()
def rotate(
    model: nn.Module, residual: bool = True, values: bool = True, down: bool = True, seed: int = 0,
    residual_matrix: Float[Tensor, "hidden hidden"] | None = None,
    value_matrices: Sequence[Float[Tensor, "head_dim head_dim"]] | None = None,
    progress: bool = True,
) -> nn.Module:  # fmt: skip
    """Rotate a model in place; its function stays the same. Quantize it afterwards.

    Args:
        model: our Decoder or a Hugging Face model with the blocks of Llama (Mistral, Qwen2, Qwen3,
            Gemma, ...), not quantized; peak extra memory is about its largest weight.
        residual: rotate the residual stream (R1). Gains of norms move into the linear layers that
            read them. That makes the head differ from the embedding, so tied ones are untied: head
            diag(gain) R, embedding R; the model grows by one of them.
        values: rotate every value head (R2), by one matrix for all heads of a layer.
        down: rotate what down_proj reads (R4), a DenseLinear with a transform from then on.
        seed: of the random signs of R1 and R2.
        residual_matrix, value_matrices: orthogonal matrices to take instead of random Hadamard
            matrices; of values one for each layer. Rows are multiplied from the left: x R.
        progress: show a bar when it takes more than two seconds.

    Products are computed in float64 and stored in the dtype of the model. Returns the model that it
    was given. Raises ValueError, before a weight is touched, for models of another structure, and
    for matrices that are not orthogonal or of another size.
    """
    body, blocks = checked_parts(model)
    embedding = body.embed_tokens.weight
    width, device = embedding.shape[1], embedding.device
    if residual:
        offsets = _gain_offsets(model, body, blocks)
        stream = _transform(residual_matrix, "residual_matrix", width, seed, device)
    heads = _head_transforms(blocks, value_matrices, seed) if values else []
    inner = [Hadamard(block.get_submodule(DOWN).in_features) for block in blocks if down]
    if residual:
        _rotate_ends(model, body, stream, offsets[-1])
    for index, block in enumerate(bar(blocks, "rotating", "block", progress)):
        if residual:
            _rotate_stream(block, stream, offsets[2 * index :])
        if values:
            _rotate_values(block, heads[index])
        if down:
            layer = block.get_submodule(DOWN)
            _change(layer.weight, inner[index].weight)
            replace_layer(block, DOWN, DenseLinear(layer.weight, layer.bias, inner[index]))
    return model


def _rotate_ends(model: nn.Module, body: nn.Module, stream: Transform, offset: int) -> None:
    """The embedding writes the first row of the stream, and the head reads the last one."""
    embedding = body.embed_tokens
    if getattr(model, "lm_head", None) is None:
        model.lm_head = nn.Linear(*embedding.weight.T.shape, bias=False, device="meta")
        model.lm_head.weight = embedding.weight
    if model.lm_head.weight is embedding.weight:
        shared = embedding.weight
        model.lm_head.weight = nn.Parameter(shared.data, requires_grad=shared.requires_grad)
    if is_dataclass(model.config):
        model.config = replace(model.config, tie_word_embeddings=False)
    else:
        model.config.tie_word_embeddings = False
    _change(embedding.weight, stream.input)
    _read(body.norm, [model.lm_head], stream, offset)


def _rotate_stream(block: nn.Module, stream: Transform, offsets: Sequence[int]) -> None:
    for (norm, readers), offset in zip(READERS.items(), offsets):
        layers = [block.get_submodule(name) for name in readers]
        _read(block.get_submodule(norm), layers, stream, offset)
    for layer in (block.get_submodule(OUTPUT), block.get_submodule(DOWN)):
        _change(layer.weight, stream.input, axis=0)
        if layer.bias is not None:
            _change(layer.bias, stream.input)


def _read(norm: nn.Module, layers: Sequence[nn.Module], stream: Transform, offset: int) -> None:
    """Layers read the rotated stream after a norm, whose gains become 1."""
    gain = norm.weight.double() + offset
    for layer in layers:
        _change(layer.weight, lambda weight: stream.weight(weight * gain))
    norm.weight.data = torch.full_like(norm.weight.data, 1 - offset)


def _rotate_values(block: nn.Module, turn: Transform) -> None:
    def by_heads(rows: Tensor) -> Tensor:
        return turn.input(rows.unflatten(-1, (-1, block.self_attn.head_dim))).flatten(-2)

    layer = block.get_submodule(VALUES)
    _change(layer.weight, by_heads, axis=0)
    if layer.bias is not None:
        _change(layer.bias, by_heads)
    # Query heads that share a value head need nothing more: all heads have one matrix.
    _change(block.get_submodule(OUTPUT).weight, by_heads)


def _change(parameter: nn.Parameter, change: Callable[[Tensor], Tensor], axis: int = -1) -> None:
    """Bind a new tensor: `change`, in float64, of the vectors along `axis`."""
    rows = parameter.data.movedim(axis, -1)
    pieces = rows.split(ROWS) if rows.ndim > 1 else (rows,)
    changed = torch.cat([change(piece.double()).to(rows.dtype) for piece in pieces])
    parameter.data = changed.movedim(-1, axis).contiguous()


def checked_parts(model: nn.Module) -> tuple[nn.Module, nn.ModuleList]:
    """What holds embedding, blocks and last norm, and the blocks.

    Raises ValueError unless every parameter is one that rotations know: they could miss it.
    """
    require_model(model)
    if any(isinstance(module, QLinear) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is quantized already: rotate it before")
    prefix, blocks = decoder_blocks(model)
    body, count = prefix.rpartition(".")[0], len(blocks)
    parts = [*READERS, *(name for names in READERS.values() for name in names), OUTPUT, DOWN]
    needed = [f"{body}.embed_tokens", f"{body}.norm"]
    needed += [f"{prefix}.{index}.{part}" for index in range(count) for part in parts]
    known = {*needed, "lm_head"}
    known |= {f"{prefix}.{index}.{part}" for index in range(count) for part in OPTIONAL}
    found = dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters())
    for name in [name for name in needed if name not in found][:1]:
        raise ValueError(f"{type(model).__name__} has no {name}: rotations need blocks of Llama")
    for name in [name for name in found if name not in known][:1]:
        raise ValueError(f"{name}: rotations do not know what this part does to the stream")
    for name, layer in decoder_linears(model).items():
        if getattr(layer, "transform", None) is not None:
            raise ValueError(f"{name} reads transformed inputs already: load the model again")
        if getattr(layer, "inputs", None) is not None:
            raise ValueError(f"{name} rounds its inputs, which a rotation moves: rotate first")
    return model.get_submodule(body), blocks


def _gain_offsets(model: nn.Module, body: nn.Module, blocks: nn.ModuleList) -> list[int]:
    """`_rms_offset` of all norms of the stream, in their order."""
    norms = [block.get_submodule(name) for block in blocks for name in READERS] + [body.norm]
    offsets = list(map(_rms_offset, norms))
    if None in offsets:
        bad = norms[offsets.index(None)]
        name = next(name for name, module in model.named_modules() if module is bad)
        raise ValueError(
            f"{name} is a {type(bad).__name__}, not x / rms(x) times a gain, so the stream cannot "
            "be rotated before it: give residual=False"
        )
    return offsets


def _rms_offset(norm: nn.Module) -> int | None:
    """0 or 1 where the norm is x / rms(x) times `weight` or `1 + weight`, None for any other."""
    generator = torch.Generator().manual_seed(0)
    x = 1 + torch.randn(1, len(norm.weight), generator=generator)
    expected = x / x.square().mean().sqrt()
    for offset in (0, 1):
        plain = {"weight": torch.full_like(norm.weight, 1 - offset)}
        y = functional_call(norm, plain, (x.to(norm.weight),))
        if torch.allclose(y.cpu().float(), expected, rtol=0.02, atol=0.02):
            return offset
    return None


def _head_transforms(
    blocks: nn.ModuleList, matrices: Sequence[Tensor] | None, seed: int
) -> list[Transform]:
    if matrices is not None and len(matrices) != len(blocks):
        raise ValueError(f"{len(matrices)} value_matrices for {len(blocks)} layers: give one each")
    device = next(blocks.parameters()).device
    sizes = [block.self_attn.head_dim for block in blocks]
    matrices = [None] * len(blocks) if matrices is None else matrices
    return [
        _transform(matrix, f"value_matrices[{index}]", size, seed + 1 + index, device)
        for index, (matrix, size) in enumerate(zip(matrices, sizes))
    ]


def _transform(
    matrix: Tensor | None, name: str, size: int, seed: int, device: torch.device
) -> Transform:
    if matrix is None:
        return Hadamard.random(size, seed).to(device)
    if matrix.shape != (size, size):
        raise ValueError(f"{name} is {list(matrix.shape)}; the model needs [{size}, {size}]")
    return Orthogonal(matrix.double()).to(device)
