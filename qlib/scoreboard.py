"""The scoreboard: a row per model, format and method, and a way to measure part of it again."""

from __future__ import annotations

import dataclasses

from torch import nn

from .calibrate import Calibration
from .metrics import Protocol, Reference, divergence
from .recipe import quantized
from .tokenizer import Tokenizer

CHECK_TOKENS = 256
CALIBRATION_TOKENS = 8192
TOLERANCE, FLOOR = 0.05, 5e-6


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement: `kl` in nats with its standard error, `seconds` to quantize the model."""

    model: str
    format: str
    method: str
    bits_per_weight: float
    model_bits_per_weight: float
    kl: float
    kl_error: float
    kl_99: float
    top1: float
    perplexity: float
    perplexity_error: float
    reference_perplexity: float
    seconds: float
    check_kl: float


def protocols(tokenizer: Tokenizer, tokens: int | None) -> tuple[Protocol, Protocol]:
    """(the board's protocol over `tokens` tokens, the short one that `check` repeats)."""
    full = Protocol.of(tokenizer, "evaluation", tokens=tokens)
    return full, Protocol.of(tokenizer, "evaluation", tokens=CHECK_TOKENS)


def calibration(tokenizer: Tokenizer) -> Calibration:
    """The text that methods which look at data are calibrated on: none of it is measured on."""
    return Calibration.text(tokenizer, "calibration", tokens=CALIBRATION_TOKENS)


def measure(
    name: str, model: nn.Module, format: str, references: tuple[Reference, Reference],
    method: str = "rtn", data: Calibration | None = None,
) -> Row:  # fmt: skip
    """Quantize `model`, compare it with both references, restore it."""
    with quantized(model, format, method, data) as report:
        full, short = (divergence(ref, model, ref.protocol) for ref in references)
    return Row(
        name,
        format,
        method,
        report.bits_per_weight,
        report.model_bits_per_weight,
        full.kl,
        full.standard_error,
        full.kl_99,
        full.top1,
        full.perplexity.value,
        full.perplexity.standard_error,
        full.reference_perplexity.value,
        report.seconds,
        short.kl,
    )


def check(row: dict, model: nn.Module, tokenizer: Tokenizer) -> float:
    """Measure a stored row's bits and its KL over the first tokens again; return that KL.

    Raises AssertionError if the bits differ at all or the KL by more than 5%.
    """
    _, short = protocols(tokenizer, CHECK_TOKENS)
    reference = Reference(model, short)
    data = calibration(tokenizer)
    with quantized(model, row["format"], row["method"], data, progress=False) as report:
        kl = divergence(reference, model, short).kl
    bits, stored = report.bits_per_weight, row["bits_per_weight"]
    assert bits == stored, f"{row['format']}: {bits} bits per weight, the board has {stored}"
    # Below that the rounding of float32 logits shows.
    close = abs(kl - row["check_kl"]) <= max(TOLERANCE * row["check_kl"], FLOOR)
    assert close, f"{row['format']}: KL {kl:.4g}, the board has {row['check_kl']:.4g}"
    return kl
