"""Quality, always with its protocol: perplexity, divergence from a reference, and weight error.

Tokens of a text are correlated, so standard errors come from the means of blocks of consecutive
tokens; the usual formula for independent samples is too small by a factor of two to five.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from .errors import require_model
from .progress import bar
from .protocol import Protocol

# A chunk of logits over a 49k vocabulary is 12 MB; all logits of a text would be gigabytes.
HEAD_TOKENS = 64
BATCH_TOKENS = 1024
ERROR_BLOCK = 64


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood, with a standard error from block means."""

    value: float
    standard_error: float
    protocol: Protocol

    def __str__(self) -> str:
        return f"perplexity {self.value:.4g} ± {self.standard_error:.2g} ({self.protocol})"

    __repr__ = __str__


@dataclass(frozen=True)
class Divergence:
    """How far a model's predictions are from a reference's on the same tokens.

    `kl` is the mean KL(reference || model) in nats, `kl_99` its 99th percentile over tokens,
    `top1` the share of tokens whose most likely prediction agrees; errors from block means. That of
    the ratio of perplexities is of token by token differences, which are less noisy.
    """

    kl: float
    standard_error: float
    kl_99: float
    top1: float
    top1_error: float
    perplexity: Perplexity
    reference_perplexity: Perplexity
    ratio_error: float

    @property
    def ratio(self) -> float:
        """The model's perplexity over the reference's."""
        return self.perplexity.value / self.reference_perplexity.value

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.3g} ± {self.standard_error:.1g} nats, 99% {self.kl_99:.3g}, top-1 "
            f"{self.top1:.1%} ± {self.top1_error:.1%}, perplexity ratio {self.ratio:.4g} ± "
            f"{self.ratio_error:.1g} ({self.perplexity.protocol})"
        )

    __repr__ = __str__


@dataclass(frozen=True, eq=False)
class TokenScores:
    """Per scored token: KL in nats, top-1 agreement, both negative log-likelihoods; [n] each."""

    kl: Float[Tensor, " n"]
    agree: Float[Tensor, " n"]
    nll: Float[Tensor, " n"]
    reference_nll: Float[Tensor, " n"]


class Reference:
    """A reference model's hidden states on a protocol, so that many models can be compared to it.

    Only hidden states are kept ([tokens, hidden]); log-probabilities are made again a few tokens
    at a time, so the logits of a large vocabulary never exist all at once.
    """

    @torch.inference_mode()
    def __init__(self, model: nn.Module, protocol: Protocol):
        hidden, self.head = _halves(model)
        self.protocol = protocol
        self.states = [hidden(batch) for batch in _progress(protocol, "reference")]


@torch.inference_mode()
def perplexity(model: nn.Module, protocol: Protocol) -> Perplexity:
    """Perplexity of a causal language model (our Decoder or a Hugging Face model)."""
    hidden, head = _halves(model)
    nll = []
    for batch in _progress(protocol, "perplexity"):
        for chunk, targets in zip(_chunks(hidden(batch)), _chunks(_targets(batch))):
            nll.append(F.cross_entropy(head(chunk).float(), targets, reduction="none"))
    return _perplexity(torch.cat(nll), protocol)


def divergence(
    reference: nn.Module | Reference, model: nn.Module, protocol: Protocol
) -> Divergence:
    """KL divergence, top-1 agreement and both perplexities over the protocol's tokens.

    Raises ValueError if a `Reference` was made with another protocol.
    """
    scores = token_scores(reference, model, protocol)
    kl, kl_error = mean_and_error(scores.kl)
    top1, top1_error = mean_and_error(scores.agree)
    ours, theirs = (_perplexity(x, protocol) for x in (scores.nll, scores.reference_nll))
    # exp of a mean difference, whose error is relative.
    ratio_error = ours.value / theirs.value * mean_and_error(scores.nll - scores.reference_nll)[1]
    tail = scores.kl.quantile(0.99).item()
    return Divergence(kl, kl_error, tail, top1, top1_error, ours, theirs, ratio_error)


@torch.inference_mode()
def token_scores(
    reference: nn.Module | Reference, model: nn.Module, protocol: Protocol
) -> TokenScores:
    """The per-token figures that `divergence` summarizes."""
    if not isinstance(reference, Reference):
        reference = Reference(reference, protocol)
    if not reference.protocol.same(protocol):
        raise ValueError(f"the reference was made with another protocol: {reference.protocol}")
    hidden, head = _halves(model)
    rows = []
    for batch, ref_states in zip(_progress(protocol, "divergence"), reference.states):
        chunks = (_chunks(ref_states), _chunks(hidden(batch)), _chunks(_targets(batch)))
        for ref_chunk, chunk, targets in zip(*chunks):
            rows.append(_compare(reference.head(ref_chunk), head(chunk), targets))
    return TokenScores(*(torch.cat(column) for column in zip(*rows)))


def mean_and_error(values: Float[Tensor, " n"], block: int = ERROR_BLOCK) -> tuple[float, float]:
    """Mean of correlated values and its standard error from the means of consecutive blocks."""
    values = values.double()
    blocks = values[: len(values) // block * block].view(-1, block).mean(dim=1)
    if len(blocks) < 2:
        return values.mean().item(), math.nan
    return values.mean().item(), (blocks.std() / math.sqrt(len(blocks))).item()


def snr_db(weight: Tensor, approximation: Tensor) -> float:
    """Signal-to-noise ratio in decibels: 10 log10(sum w^2 / sum (w - w_hat)^2).

    >>> round(snr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5])), 6)
    20.0
    """
    noise = (weight.double() - approximation.double()).square().sum()
    if noise == 0:
        return math.inf
    return (10 * torch.log10(weight.double().square().sum() / noise)).item()


def proxy_loss(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """tr(E H E^T) / tr(W H W^T): the layer's relative output error over H = mean of x x^T.

    Args:
        weight, approximation: [out, in]; hessian: [in, in] (GPTQ, arXiv 2210.17323, eq. 1).
    """
    error, weight, hessian = (x.double() for x in (weight - approximation, weight, hessian))
    return (((error @ hessian) * error).sum() / ((weight @ hessian) * weight).sum()).item()


def _perplexity(nll: Tensor, protocol: Protocol) -> Perplexity:
    mean, error = mean_and_error(nll)
    # Unlike math.exp this gives infinity, not an error, for a model that is ruined altogether.
    value = torch.tensor(mean, dtype=torch.float64).exp().item()
    return Perplexity(value, value * error, protocol)


def _compare(ref_logits: Tensor, logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    ref, log_q = ref_logits.float().log_softmax(-1), logits.float().log_softmax(-1)
    kl = (ref.exp() * (ref - log_q)).sum(-1)
    agree = (ref.argmax(-1) == log_q.argmax(-1)).float()
    at = targets.unsqueeze(-1)
    return kl, agree, -log_q.gather(-1, at).squeeze(-1), -ref.gather(-1, at).squeeze(-1)


def _progress(protocol: Protocol, label: str) -> Iterator[tuple[Tensor, int]]:
    return iter(bar(list(_batches(protocol)), label, "batch"))


def _batches(protocol: Protocol) -> Iterator[tuple[Tensor, int]]:
    """Windows of one length and score stacked to [batch, time], at most BATCH_TOKENS each."""
    stack: list[tuple[Tensor, int]] = []
    for window, score in protocol.windows():
        full = stack and (len(stack) + 1) * len(window) > BATCH_TOKENS
        if full or (stack and (len(stack[0][0]), stack[0][1]) != (len(window), score)):
            yield torch.stack([w for w, _ in stack]), stack[0][1]
            stack = []
        stack.append((window, score))
    if stack:
        yield torch.stack([w for w, _ in stack]), stack[0][1]


def _halves(model: nn.Module):
    """(hidden, head): a batch of windows to the states of its scored tokens, states to logits.

    Raises ValueError for models whose logits are not a linear head applied to their last states.
    """
    require_model(model)
    weight = next(model.parameters())
    if hasattr(model, "hidden"):
        body, head = model.hidden, model.head
    else:
        decoder, head = model.get_decoder(), model.get_output_embeddings()

        def body(tokens: Tensor) -> Tensor:
            return decoder(input_ids=tokens).last_hidden_state

        probe = torch.zeros(1, 2, dtype=torch.long, device=weight.device)
        whole = model(input_ids=probe).logits
        if not torch.allclose(head(body(probe)), whole, rtol=1e-3, atol=1e-3):
            raise ValueError(f"{type(model).__name__} transforms its logits after the head")

    def hidden(batch: tuple[Tensor, int]) -> Tensor:
        tokens, score = batch
        return body(tokens[:, :-1].to(weight.device))[:, -score:].flatten(0, 1).cpu()

    return hidden, lambda states: head(states.to(weight.device)).cpu()


def _targets(batch: tuple[Tensor, int]) -> Tensor:
    tokens, score = batch
    return tokens[:, -score:].flatten()


def _chunks(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(HEAD_TOKENS)
