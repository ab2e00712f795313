"""What lies in a GGUF file that was written: types, bytes, bits per weight, and what fell back."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass

from ..ggml.mixes import Fallback


@dataclass(frozen=True)
class Stored:
    """One tensor of the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class GgufReport:
    """What was written: every tensor with its type and bytes, and which are not as wanted."""

    path: str
    mix: str
    file_bytes: int
    tensors: tuple[Stored, ...]
    fallbacks: tuple[Fallback, ...]
    importance: str
    seconds: float

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; the file has its metadata besides."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """8 * bytes of all tensors / weights, norms included, as llama.cpp counts."""
        return 8 * self.nbytes / sum(math.prod(tensor.shape) for tensor in self.tensors)

    def rows(self) -> list[tuple[str, str]]:
        """The summary as (label, value) pairs."""
        rows = [("mix", self.mix)]
        for kind in sorted({t.kind for t in self.tensors}, key=self._share, reverse=True):
            count, share = sum(t.kind == kind for t in self.tensors), self._share(kind)
            rows.append((kind, f"{share:,} bytes ({share / self.nbytes:.1%}) in {count} tensor(s)"))
        rows.append(("total", f"{self.nbytes:,} bytes, and {self.file_bytes:,} with the metadata"))
        rows.append(("bits per weight", f"{self.bits_per_weight:.3f}"))
        rows.append(("importance", self.importance))
        rows += [("fallback", str(fallback)) for fallback in self.fallbacks[:3]]
        if len(self.fallbacks) > 3:
            of = f"{len(self.fallbacks)} of {len(self.tensors)} tensor(s)"
            rows.append(("", f"{of} required fallback quantization"))
        rows.append(("time", f"{self.seconds:.1f} s"))
        return rows

    def _share(self, kind: str) -> int:
        return sum(tensor.nbytes for tensor in self.tensors if tensor.kind == kind)

    def __str__(self) -> str:
        head = f"{len(self.tensors)} tensors written to {self.path}\n"
        return head + "\n".join(f"  {label:<16} {value}" for label, value in self.rows())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cells = ((label, html.escape(value)) for label, value in self.rows())
        lines = (f"<tr><th>{label}</th><td>{value}</td></tr>" for label, value in cells)
        title = (
            f"<caption>{len(self.tensors)} tensors written to {html.escape(self.path)}</caption>"
        )
        return f"<table>{title}<tbody>{''.join(lines)}</tbody></table>"
