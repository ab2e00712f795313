"""A tensor that grows: room doubles, so a token costs a constant number of copies on average."""

from __future__ import annotations

import torch
from torch import Tensor


def joined(parts: list[Tensor], dim: int) -> Tensor:
    """The parts one after the other; a single one as it is, without a copy."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class Buffer:
    """A queue along axis 2 of a tensor [batch, heads, n, ...], in memory that doubles.

    What one head stores is contiguous. `nbytes` counts what is in use; what is reserved is at most
    twice as much as was ever in use.
    """

    def __init__(self, like: Tensor):
        self.data = like.new_empty((*like.shape[:2], 0, *like.shape[3:]))
        self.start = self.stop = 0

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def view(self) -> Tensor:
        """The content, without a copy."""
        return self.data.narrow(2, self.start, len(self))

    @property
    def nbytes(self) -> int:
        return self.view.numel() * self.data.element_size()

    def append(self, x: Tensor) -> None:
        """Add `x` at the end."""
        if not x.shape[2]:
            return
        if self.stop + x.shape[2] > self.data.shape[2]:
            self._make_room(len(self) + x.shape[2])
        self.data.narrow(2, self.stop, x.shape[2]).copy_(x)
        self.stop += x.shape[2]

    def drop(self, n: int) -> None:
        """Remove the oldest `n`."""
        self.start += n

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        # A cache filled in inference mode may be continued outside of it.
        with torch.inference_mode(False):
            self.data = self.view.index_select(0, rows.to(self.data.device))
        self.start, self.stop = 0, self.data.shape[2]

    def _make_room(self, need: int) -> None:
        old, capacity = self.view, self.data.shape[2]
        # Half of a full buffer was taken: the rest moves to its start, over what is gone.
        if 2 * need > capacity:
            shape = list(self.data.shape)
            # What comes first is often a whole prompt, and often all.
            shape[2] = 2 * need if len(self) else need
            with torch.inference_mode(False):
                self.data = torch.empty(shape, dtype=old.dtype, device=old.device)
        self.data[:, :, : len(self)] = old
        self.start, self.stop = 0, len(self)
