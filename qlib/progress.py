"""One progress bar for everything that can take more than two seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")


def bar(items: Sequence[Item], label: str, unit: str, show: bool = True) -> Iterable[Item]:
    """Iterate over `items` with a bar that appears after two seconds and disappears at the end.

    The environment variable TQDM_DISABLE=1 turns all bars off.
    """
    return tqdm(items, desc=label, unit=unit, delay=2, leave=False) if show else items
