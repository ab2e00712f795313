"""Weights on which formats are compared with other libraries: ordinary ones and every extreme."""

from __future__ import annotations

import torch

import qlib


def gaussian(rows: int = 8, cols: int = 256, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def with_zero_blocks() -> torch.Tensor:
    weight = gaussian(seed=1)
    weight[1, :64] = 0
    weight[3] = 0
    return weight


def with_outliers() -> torch.Tensor:
    weight = gaussian(seed=2)
    weight[2, 37], weight[5, 200] = 1000.0, -3e4
    return weight


def with_ties() -> torch.Tensor:
    """Blocks of 32 whose largest is 6 or 4, and every middle between two values of FP4."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    row = torch.cat([torch.tensor([6.0]), middles, -middles, torch.ones(1)])
    four = row.masked_fill(row.abs() > 4, 4.0)
    return torch.cat([row, row, four, four]).repeat(4, 4)


def real() -> torch.Tensor:
    """A part of a trained projection."""
    weight = qlib.load("bpw-small")[0].get_submodule("model.layers.1.mlp.down_proj").weight
    return weight.detach().float()[:64, :256].contiguous()


WEIGHTS = {
    "gaussian": gaussian,
    "zero blocks": with_zero_blocks,
    "outliers": with_outliers,
    "1e-30": lambda: gaussian(seed=3) * 1e-30,
    "1e30": lambda: gaussian(seed=4) * 1e30,
    "subnormal": lambda: gaussian(seed=5) * 1e-38,
    "ties": with_ties,
    "real": real,
}
