"""One progress bar for everything that can take more than two seconds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(
    items: Iterable[Item], label: str, unit: str, show: bool = True, total: int | None = None
) -> Iterable[Item]:
    """Iterate over `items` with a bar that appears after two seconds and disappears at the end.

    `total` is for iterators that do not know their length. TQDM_DISABLE=1 turns all bars off.
    """
    return tqdm(items, label, total, unit=unit, delay=2, leave=False) if show else items
