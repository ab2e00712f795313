"""Fine-tuning: next-token prediction with AdamW, for whatever parameters require a gradient."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .progress import bar


def train(
    model: nn.Module, tokens: Int[Tensor, " n"], steps: int, batch: int = 8, lr: float = 1e-3,
    *, context: int = 256, warmup: int = 10, clip: float = 0.3, seed: int = 0,
    progress: bool = True,
) -> list[float]:  # fmt: skip
    """Train a model on a text, in place; returns the loss of every step, in nats.

    Only parameters that require a gradient are trained: the adapters after `lora.add_adapters`,
    or all of a dense model after `model.requires_grad_()`.

    Args:
        model: our Decoder or any Hugging Face causal LM.
        tokens: ids of the text; a step sees `batch` random windows, `context` predictions each.
        steps: optimizer steps of AdamW, without weight decay.
        lr: the highest learning rate: it rises over `warmup` steps and falls to 0 along a cosine.
            Large models need a smaller one (QLoRA: 2e-4 for 7 billion weights).
        clip: largest norm of the whole gradient (QLoRA, arXiv 2305.14314, appendix B: 0.3).
        seed: of the windows.

    Raises ValueError if nothing requires a gradient or the text is too short, and RuntimeError if
    a gradient is not finite; the parameters are then what they were before that step.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("no parameter requires a gradient: call qlib.lora.add_adapters first")
    if tokens.ndim != 1 or len(tokens) <= context:
        need = f"more than context={context} tokens in one row"
        raise ValueError(f"need {need}, got {list(tokens.shape)}: give more text or less context")
    tokens = tokens.to(trained[0].device).long()
    generator = torch.Generator().manual_seed(seed)
    # Adam keeps two moments of every parameter that it is given, and of no other.
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.0)
    losses = []
    for step in bar(range(steps), "training", "step", progress):
        starts = torch.randint(len(tokens) - context, (batch, 1), generator=generator)
        loss = next_token_loss(
            model, tokens[(starts + torch.arange(context + 1)).to(tokens.device)]
        )
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip, error_if_nonfinite=True)
        cosine = (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.param_groups[0]["lr"] = lr * cosine * min(1, (step + 1) / max(1, warmup))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def next_token_loss(model: nn.Module, windows: Int[Tensor, "batch time"]) -> Float[Tensor, ""]:
    """The mean negative log-likelihood, in nats, of every token but the first of a window."""
    out = model(windows[:, :-1])
    logits = getattr(out, "logits", out)
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())
