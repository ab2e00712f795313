"""Which candidate each item gets when bytes are limited: the greedy knapsack of bit allocation."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def spend(
    sizes: Float[np.ndarray, "items candidates"],
    harm: Float[np.ndarray, "items candidates"],
    budget: float,
) -> list[int]:
    """The candidate of every item, so that sizes sum to at most `budget` and harms to little.

    Every item starts at its smallest candidate; then, again and again, the exchange that lowers the
    harm most per byte is made, while bytes are left.

    Raises ValueError if even the smallest candidates take more.

    >>> sizes, harm = np.array([[4.0, 8.0], [4.0, 8.0]]), np.array([[3.0, 1.0], [9.0, 1.0]])
    >>> spend(sizes, harm, 13)
    [0, 1]
    """
    rows = np.arange(len(sizes))
    at = sizes.argmin(1)
    left = budget - sizes[rows, at].sum()
    if left < 0:
        raise ValueError(f"{budget:g} bytes: the smallest candidates take {budget - left:g}")
    while True:
        more = sizes - sizes[rows, at][:, None]
        gain = harm[rows, at][:, None] - harm
        rate = np.where((more > 0) & (more <= left) & (gain > 0), gain / np.maximum(more, 1), 0)
        row, column = np.unravel_index(rate.argmax(), rate.shape)
        if not rate[row, column]:
            return at.tolist()
        left -= more[row, column]
        at[row] = column
