"""SpinQuant: learn the rotations of a model instead of drawing them.

Every rotation leaves the function of a model as it is, but some are better to quantize in than
others. Learned are R1, of the residual stream, and an R2 for the values of every layer
(`qlib.methods.rotate`), by descent on the loss of the model with quantized activations. Weights
keep their full width: a method such as GPTQ repairs their rounding later.

Nothing is rotated meanwhile. A layer of the rotated model computes q(x R) (W R).T, where q rounds,
and so does one that reads q(x R) R.T instead of x and keeps its weight W. Rounding has no gradient:
what stands in for it takes the error of q for a constant times the scale of the token.

A step must lead from one orthogonal matrix to another. For a skew-symmetric A the Cayley transform
(I + A)^-1 (I - A) is orthogonal, and where A is a positive multiple of G R.T - R G.T, with the
gradient G by R, its product with R leads downhill.

Sources: Liu et al., SpinQuant, arXiv 2405.16406, section 3.2; Li et al., arXiv 2002.01113, section
4, which iterates towards the inverse. For one square matrix the inverse itself costs next to
nothing, and no error adds up.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..activations import Inputs
from ..calibrate import Calibration
from ..finetune import next_token_loss
from ..hadamard import base_matrix, hadamard
from ..progress import bar
from ..structure import decoder_blocks
from ..transform import Hadamard
from .rotate import DOWN, OUTPUT, READERS, checked_parts, rotate

LOSSES = ("kl", "cross-entropy")
# R1 [hidden, hidden], and the R2 of all layers [layers, head_dim, head_dim].
Rotations = tuple[Tensor, Tensor]
# How a block rounds what its norms write, and what o_proj and down_proj read, by their names.
Places = dict[str, Inputs]
Turn = Callable[[Tensor], Tensor]


def spinquant(
    model: nn.Module, recipe, calibration, steps: int = 40, learning_rate: float = 0.3,
    seed: int = 0, batch: int = 2, loss: str = "kl", down: bool = True, progress: bool = True,
) -> list[float]:  # fmt: skip
    """Rotate a model in place, as `rotate` does, by learned R1 and R2. Quantize it afterwards.

    Args:
        model: as for `rotate`.
        recipe: a Recipe for the model, or its name: its activations decide what is learned.
        calibration: a Calibration, or tokens as `Calibration.of` takes them.
        steps: each on `batch` windows of the calibration, from its first on.
        learning_rate: the angle in radians by which the first step turns a matrix in the plane that
            turns most; it falls to zero linearly. (The paper takes gradients as they are, whose
            size depends on the model, so its rate of 1.5 means something else.)
        seed: of the randomized Hadamard matrices to start from, those of `rotate`.
        loss: "kl", from the logits of the original model, or, as in the paper, "cross-entropy".
        down: rotate what down_proj reads by a Hadamard matrix (R4), while learning too.
        progress: show a bar when it takes more than two seconds.

    Returns the loss of every step. Raises ValueError as `rotate` does, and for a recipe whose
    activations no rotation reaches, are static, or differ between layers that read the same.
    """
    if loss not in LOSSES or steps < 1 or batch < 1:
        need = f"steps >= 1, batch >= 1 and a loss of {', '.join(LOSSES)}"
        raise ValueError(f"need {need}; got steps={steps}, batch={batch}, loss={loss!r}")
    body, blocks = checked_parts(model)
    places = _places(model, recipe)
    windows = list(Calibration.of(calibration).batches(batch))
    width, device = body.embed_tokens.weight.shape[1], body.embed_tokens.weight.device
    # Sizes that have no Hadamard matrix are refused before a weight is touched.
    for block in blocks if down else ():
        base_matrix(block.get_submodule(DOWN).in_features)
    stream, *heads = (
        Hadamard.random(size, seed + index).input(torch.eye(size, dtype=torch.float64)).to(device)
        for index, size in enumerate([width, *(block.self_attn.head_dim for block in blocks)])
    )
    rotations, losses = (stream, torch.stack(heads)), []
    # Gains move into the weights, so that norms write what R1 turns.
    identity = torch.eye(width, device=device)
    rotate(model, values=False, down=False, residual_matrix=identity, progress=progress)
    for step in bar(range(steps), "learning rotations", "step", progress):
        tokens = windows[step % len(windows)].to(device)
        found, gradients = _gradients(model, places, rotations, tokens, loss, down)
        angle = learning_rate * (1 - step / steps)
        rotations = tuple(cayley_step(r, g, angle) for r, g in zip(rotations, gradients))
        losses.append(found)
    stream, heads = rotations
    rotate(model, down=down, residual_matrix=stream, value_matrices=heads, progress=progress)
    return losses


def cayley_step(
    matrix: Float[Tensor, "*batch n n"], gradient: Float[Tensor, "*batch n n"], angle: float
) -> Float[Tensor, "*batch n n"]:
    """Turn orthogonal matrices downhill, in the plane that turns most by `angle` radians.

    >>> cayley_step(torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0]]), math.pi / 6)
    tensor([[ 0.8660, -0.5000],
            [ 0.5000,  0.8660]])
    """
    skew = gradient.to(matrix.dtype) @ matrix.mT
    skew = (skew - skew.mT) / 2
    fastest = torch.linalg.matrix_norm(skew, 2)[..., None, None]
    skew = skew * (math.tan(angle / 2) / fastest.clamp(min=torch.finfo(matrix.dtype).tiny))
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve(identity + skew, matrix - skew @ matrix)


def straight_through(x: Float[Tensor, "*batch in"], inputs: Inputs) -> Float[Tensor, "*batch in"]:
    """`inputs.rounded(x)`, with an error that the gradient takes to grow with the largest |x|."""
    with torch.no_grad():
        rows = x.detach().reshape(-1, x.shape[-1])
        error = (inputs.rounded(rows) - rows).view(x.shape)
    scale = x.abs().amax(-1, keepdim=True)
    return x + error * (scale / scale.detach().clamp(min=torch.finfo(x.dtype).tiny))


def _gradients(
    model: nn.Module, places: list[Places], rotations: Rotations,
    tokens: Int[Tensor, "batch time"], loss: str, down: bool,
) -> tuple[float, tuple[Tensor, ...]]:  # fmt: skip
    """The loss of the rotated model with quantized activations, and its gradients by R1 and R2."""
    dtype = next(model.parameters()).dtype
    variables = [matrix.to(dtype).requires_grad_() for matrix in rotations]
    with torch.no_grad():
        target = _log_probabilities(model, tokens) if loss == "kl" else None
    with torch.enable_grad(), _rounding(model, places, *variables, down):
        if target is None:
            value = next_token_loss(model, tokens)
        else:
            found = _log_probabilities(model, tokens)
            value = F.kl_div(found, target, reduction="batchmean", log_target=True)
        return value.item(), torch.autograd.grad(value, variables, materialize_grads=True)


def _log_probabilities(model: nn.Module, tokens: Tensor) -> Float[Tensor, "tokens vocab"]:
    found = model(tokens)
    return getattr(found, "logits", found).flatten(0, 1).float().log_softmax(-1)


@contextlib.contextmanager
def _rounding(
    model: nn.Module, places: list[Places], stream: Tensor, heads: Tensor, down: bool
) -> Iterator[None]:
    """While open, layers read what they would after a rotation: rounded, and turned back."""
    handles = []
    fixed = (hadamard, partial(hadamard, transpose=True)) if down else (_same, _same)
    turns = dict.fromkeys(READERS, (_by(stream), _by(stream.mT))) | {DOWN: fixed}
    for block, inputs, matrix in zip(checked_parts(model)[1], places, heads):
        turns[OUTPUT] = _by(matrix), _by(matrix.mT)
        for name, one in inputs.items():
            module, read = block.get_submodule(name), partial(_read, one, *turns[name])
            if name in READERS:
                handle = module.register_forward_hook(lambda _, __, y, read=read: read(y))
            else:
                handle = module.register_forward_pre_hook(lambda _, x, read=read: read(x[0]))
            handles.append(handle)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(inputs: Inputs, there: Turn, back: Turn, x: Tensor) -> Tensor:
    return back(straight_through(there(x), inputs))


def _by(matrix: Float[Tensor, "n n"]) -> Turn:
    """Multiply every n channels by the matrix: a whole row, or each of its heads."""
    return lambda x: (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def _same(x: Tensor) -> Tensor:
    return x


def _places(model: nn.Module, recipe) -> list[Places]:
    """What the recipe does to activations, for every block."""
    from ..rules import Recipe

    recipe, (prefix, blocks) = Recipe.of(recipe), decoder_blocks(model)
    readers, places = READERS | {OUTPUT: (OUTPUT,), DOWN: (DOWN,)}, []
    for index in range(len(blocks)):
        places.append({})
        for place, names in readers.items():
            chosen = [recipe.choose_inputs(f"{prefix}.{index}.{name}") for name in names]
            if len(set(map(str, chosen))) > 1:
                where = f"{prefix}.{index}: {', '.join(names)}"
                raise ValueError(f"{where} read the same: give them the same activations")
            if chosen[0] is not None and not chosen[0].is_ready:
                raise ValueError(f"activations {chosen[0]}: learn rotations with dynamic ones")
            places[-1] |= {} if chosen[0] is None else {place: chosen[0]}
    if not any(found.keys() - {DOWN} for found in places):
        raise ValueError("no learned rotation reaches activations that the recipe quantizes")
    return places
