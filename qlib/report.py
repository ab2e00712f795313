"""What quantization will do to a model (Plan) and what it has done (Report), counted in bytes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

from .activations import Inputs
from .block import Stats
from .qtensor import Format, QTensor

KINDS = {"codes": "codes", "scale": "scales", "zero_point": "zeros", "offset": "zeros"}
KINDS |= {"blocks": "blocks"}


@dataclass(frozen=True)
class Step:
    """One line of a plan: a layer, what becomes of it, and the bytes that it will take."""

    layer: str
    shape: tuple[int, int]
    format: Format | None
    nbytes: int
    inputs: Inputs | None = None


@dataclass(frozen=True)
class Plan:
    """What `quantize_model` will do, known before a weight is touched."""

    steps: tuple[Step, ...]
    other_bytes: int
    other_weights: int
    other_dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the whole model afterwards."""
        return self.other_bytes + sum(step.nbytes for step in self.steps)

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the whole model, unquantized tensors included."""
        weights = self.other_weights + sum(math.prod(step.shape) for step in self.steps)
        return 8 * self.nbytes / weights

    @property
    def activations(self) -> dict[str, int]:
        """How inputs are quantized, and in how many layers."""
        return Counter(str(step.inputs) for step in self.steps if step.inputs)

    @property
    def is_static(self) -> bool:
        """Whether some inputs need a range, which calibration has to find."""
        return any(step.inputs and not step.inputs.is_ready for step in self.steps)

    def __str__(self) -> str:
        kept = sum(step.format is None for step in self.steps)
        return (
            f"{len(self.steps) - kept} layers to quantize, {kept} kept; "
            f"{self.nbytes / 1e6:,.1f} MB, {self.bits_per_weight:.3f} bits per weight in all"
        )


@dataclass(frozen=True)
class LayerResult:
    """One quantized layer: its bytes by kind and its signal-to-noise ratios in decibels.

    `snr_db` compares the weights, `output_db` what the layer computes from its calibration inputs
    (None without calibration, or where the method has rescaled them).
    """

    layer: str
    shape: tuple[int, int]
    format: Format
    nbytes: dict[str, int]
    snr_db: float
    output_db: float | None = None


@dataclass
class BlockResult:
    """What became of one decoder block: its tensors by layer, their results, who saw no token.

    `inputs` says by layer how inputs are quantized, `stats` what the method saw of them, if it did.
    """

    tensors: dict[str, QTensor]
    layers: list[LayerResult]
    unreached: list[str]
    inputs: dict[str, Inputs] = field(default_factory=dict)
    stats: dict[str, Stats] = field(default_factory=dict)


@dataclass
class Report:
    """What happened to a model: bits, bytes by kind, error and seconds."""

    plan: Plan
    method: str = "rtn"
    calibration: str = "none"
    layers: list[LayerResult] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes of the whole model by kind: codes, scales, zeros, codebooks, blocks, the rest."""
        kept = sum(step.nbytes for step in self.plan.steps if step.format is None)
        total = {"codes": 0, "scales": 0, "zeros": 0, "codebooks": 0}
        for layer in self.layers:
            for kind, size in layer.nbytes.items():
                total[kind] = total.get(kind, 0) + size
        total["unquantized"] = self.plan.other_bytes + kept
        return {kind: size for kind, size in total.items() if size}

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight of the quantized layers alone."""
        weights = sum(math.prod(layer.shape) for layer in self.layers)
        return 8 * sum(sum(layer.nbytes.values()) for layer in self.layers) / max(1, weights)

    @property
    def model_bits_per_weight(self) -> float:
        """Bits per weight of the whole model, unquantized tensors included."""
        return self.plan.bits_per_weight

    def rows(self) -> list[tuple[str, str]]:
        """The summary as (label, value) pairs."""
        total = sum(self.nbytes.values())
        rows = [(f"{kind}", f"{n:,} bytes ({n / total:.1%})") for kind, n in self.nbytes.items()]
        rows.append(("total", f"{total:,} bytes"))
        if self.layers:
            worst = min(self.layers, key=_ratio)
            rows.append(("bits per weight", f"{self.bits_per_weight:.3f} in quantized layers"))
            rows.append(("", f"{self.model_bits_per_weight:.3f} in the whole model"))
            rows.append(("", f"(unquantized tensors are {self.plan.other_dtype})"))
            what = "weights" if worst.output_db is None else "outputs"
            rows.append(("worst layer", f"{worst.layer}, {_ratio(worst):.1f} dB in its {what}"))
        kinds = self.plan.activations.items()
        rows += [("activations", f"{kind} ({n} layers)") for kind, n in kinds]
        rows.append(("method", self.method))
        if self.calibration != "none":
            rows.append(("calibration", self.calibration))
        rows += [("never reached", name) for name in self.unreached]
        rows.append(("time", f"{self.seconds:.1f} s"))
        return rows

    def __str__(self) -> str:
        head = f"{len(self.layers)} layers quantized\n"
        return head + "\n".join(f"  {label:<16} {value}" for label, value in self.rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        lines = (f"<tr><th>{label}</th><td>{value}</td></tr>" for label, value in self.rows())
        title = f"<caption>{len(self.layers)} layers quantized</caption>"
        return f"<table>{title}<tbody>{''.join(lines)}</tbody></table>"


def bytes_by_kind(q: QTensor) -> dict[str, int]:
    """Bytes of a tensor's codes, scales, zeros and codebooks."""
    nbytes: dict[str, int] = {}
    for part, tensor in q.parts.items():
        kind = KINDS.get(part.split(".")[0], "codebooks")
        nbytes[kind] = nbytes.get(kind, 0) + tensor.numel() * tensor.element_size()
    return nbytes


def _ratio(layer: LayerResult) -> float:
    return layer.snr_db if layer.output_db is None else layer.output_db
