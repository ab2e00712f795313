"""Layers with correlated inputs for the tests of GPTQ, and their errors in float64."""

from __future__ import annotations

import numpy as np
import torch

from qlib.calibrate import Stats


def problem(
    seed: int, out: int, columns: int, tokens: int | None = None, kind: str = "mixed"
) -> tuple[torch.Tensor, Stats]:
    """A random weight, and statistics of inputs that are of one kind.

    mixed: correlated channels; independent: uncorrelated; giant: mixed, one channel a thousand
    times the others; wild: mixed, magnitudes over three decades; dead: mixed, two channels zero;
    alike: mixed, and all channels share one large signal.
    """
    rng = np.random.default_rng(seed)
    weight = rng.normal(size=(out, columns))
    x = rng.normal(size=(4 * columns + 8 if tokens is None else tokens, columns))
    if kind != "independent":
        x = x @ (np.eye(columns) + rng.normal(size=(columns, columns)) / np.sqrt(columns))
    if kind == "alike":
        x += 5 * rng.normal(size=(len(x), 1))
    if kind == "giant":
        x[:, rng.integers(columns)] *= 1000
    if kind == "wild":
        x *= 10 ** rng.uniform(-1.5, 1.5, columns)
    if kind == "dead":
        x[:, rng.choice(columns, min(2, columns), replace=False)] = 0
    return torch.from_numpy(weight).float(), Stats.of(torch.from_numpy(x).float())


def losses(weight, q, stats) -> np.ndarray:
    """e H e^T of every row, in float64."""
    error = (weight.float() - q.dequantize()).double()
    return ((error @ stats.hessian.double()) * error).sum(1).numpy()
