"""The scoreboard: what can be done to a model, a row that says what it did, and a way to measure a
part of that again."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator

from torch import nn

from .cache import through_cache
from .calibrate import Calibration
from .methods.rotate import rotate
from .methods.spinquant import spinquant
from .metrics import Protocol, Reference, divergence
from .recipe import quantized
from .report import Report
from .rules import Recipe
from .tokenizer import Tokenizer

CHECK_TOKENS = 256
CALIBRATION_TOKENS = 8192
TOLERANCE, FLOOR = 0.05, 5e-6


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is done to a model before it is measured.

    Args:
        format: of the weights, or the name of a recipe.
        method: how codes are chosen.
        activations: replaces those of the recipe; "" leaves them to it.
        rotation: "quarot" (random) or "spinquant" (learned) before that, or "".
        cache: the format of the KV cache that tokens are read through, or "".
    """

    format: str
    method: str = "rtn"
    activations: str = ""
    rotation: str = ""
    cache: str = ""

    @property
    def recipe(self) -> Recipe:
        recipe = Recipe.of(self.format).with_method(self.method)
        return dataclasses.replace(recipe, activations=self.activations or recipe.activations)

    def __str__(self) -> str:
        return " ".join(part for part in dataclasses.astuple(self) if part)


@dataclasses.dataclass(frozen=True)
class Row(Entry):
    """One measurement: `kl` in nats with its standard error, `seconds` to quantize the model."""

    model: str = ""
    bits_per_weight: float = 0.0
    model_bits_per_weight: float = 0.0
    kl: float = 0.0
    kl_error: float = 0.0
    kl_99: float = 0.0
    top1: float = 0.0
    perplexity: float = 0.0
    perplexity_error: float = 0.0
    reference_perplexity: float = 0.0
    seconds: float = 0.0
    check_kl: float = 0.0


def entry_of(row: dict) -> Entry:
    """What a stored row says was done."""
    return Entry(**{f.name: row[f.name] for f in dataclasses.fields(Entry) if f.name in row})


def protocols(tokenizer: Tokenizer, tokens: int | None) -> tuple[Protocol, Protocol]:
    """(the board's protocol over `tokens` tokens, the short one that `check` repeats)."""
    full = Protocol.of(tokenizer, "evaluation", tokens=tokens)
    return full, Protocol.of(tokenizer, "evaluation", tokens=CHECK_TOKENS)


def calibration(tokenizer: Tokenizer) -> Calibration:
    """The text that methods which look at data are calibrated on: none of it is measured on."""
    return Calibration.text(tokenizer, "calibration", tokens=CALIBRATION_TOKENS)


@contextlib.contextmanager
def prepared(
    model: nn.Module, entry: Entry, data: Calibration | None = None, progress: bool = True
) -> Iterator[tuple[nn.Module, Report]]:
    """A model as an entry has it, and its report; `model` itself is as before afterwards."""
    if entry.rotation:
        model = copy.deepcopy(model)
    if entry.rotation == "spinquant":
        spinquant(model, entry.recipe, data, progress=progress)
    elif entry.rotation:
        rotate(model, progress=progress)
    with quantized(model, entry.recipe, calibration=data, progress=progress) as report:
        yield (through_cache(model, entry.cache) if entry.cache else model), report


def measure(
    name: str, model: nn.Module, entry: Entry, references: tuple[Reference, Reference],
    data: Calibration | None = None,
) -> Row:  # fmt: skip
    """Do to `model` what `entry` says, compare it with both references, restore it."""
    with prepared(model, entry, data) as (changed, report):
        full, short = (divergence(ref, changed, ref.protocol) for ref in references)
    return Row(
        **dataclasses.asdict(entry),
        model=name,
        bits_per_weight=report.bits_per_weight,
        model_bits_per_weight=report.model_bits_per_weight,
        kl=full.kl,
        kl_error=full.standard_error,
        kl_99=full.kl_99,
        top1=full.top1,
        perplexity=full.perplexity.value,
        perplexity_error=full.perplexity.standard_error,
        reference_perplexity=full.reference_perplexity.value,
        seconds=report.seconds,
        check_kl=short.kl,
    )


def check(row: dict, model: nn.Module, tokenizer: Tokenizer) -> float:
    """Measure a stored row's bits and its KL over the first tokens again; return that KL.

    Raises AssertionError if the bits differ at all or the KL by more than 5%.
    """
    _, short = protocols(tokenizer, CHECK_TOKENS)
    reference, entry = Reference(model, short), entry_of(row)
    with prepared(model, entry, calibration(tokenizer), progress=False) as (changed, report):
        kl = divergence(reference, changed, short).kl
    bits, stored = report.bits_per_weight, row["bits_per_weight"]
    assert bits == stored, f"{entry}: {bits} bits per weight, the board has {stored}"
    # Below that the rounding of float32 logits shows.
    close = abs(kl - row["check_kl"]) <= max(TOLERANCE * row["check_kl"], FLOOR)
    assert close, f"{entry}: KL {kl:.4g}, the board has {row['check_kl']:.4g}"
    return kl
