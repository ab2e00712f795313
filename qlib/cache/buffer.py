"""A tensor that grows: room doubles, so a token costs a constant number of copies on average."""

from __future__ import annotations

import torch
from torch import Tensor


class Buffer:
    """A queue along axis 2 of a tensor [batch, heads, n, ...], in memory that doubles.

    What one head stores is contiguous. `nbytes` counts what is in use, not what is reserved.
    """

    def __init__(self, like: Tensor):
        self.data = like.new_empty((*like.shape[:2], 0, *like.shape[3:]))
        self.start = self.stop = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def view(self) -> Tensor:
        """The content, without a copy."""
        return self.data[:, :, self.start : self.stop]

    @property
    def nbytes(self) -> int:
        return self.view.numel() * self.data.element_size()

    def append(self, x: Tensor) -> None:
        """Add `x` at the end."""
        if self.stop + x.shape[2] > self.data.shape[2]:
            self._make_room(len(self) + x.shape[2])
        self.data[:, :, self.stop : self.stop + x.shape[2]] = x
        self.stop += x.shape[2]

    def take(self, n: int) -> Tensor:
        """Remove the oldest `n`; what is returned is overwritten by a later append."""
        self.start += n
        return self.data[:, :, self.start - n : self.start]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self.data = self.data.index_select(0, rows.to(self.data.device))

    def _make_room(self, need: int) -> None:
        old, capacity = self.view, self.data.shape[2]
        # Half of a full buffer was taken: the rest moves to its start, over what is gone.
        if 2 * need > capacity:
            shape = list(self.data.shape)
            shape[2] = max(need, 2 * capacity)
            # A cache filled in inference mode may be continued outside of it.
            with torch.inference_mode(False):
                self.data = torch.empty(shape, dtype=old.dtype, device=old.device)
        self.data[:, :, : len(self)] = old
        self.start, self.stop = 0, len(self)
