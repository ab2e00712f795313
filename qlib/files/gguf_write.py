"""Writing GGUF version 3: typed metadata, then tensors in one blob, each padded to 32 bytes.

Sizes follow from types and shapes, so the header is complete before the first tensor is made, and
tensors are made and written one by one: two models are never in memory.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from ..ggml import GgmlType
from .atomic import replacing
from .gguf import ARRAY, BOOL, MAX_DIMS, STRING

ALIGNMENT = 32
# ggml keeps 64 bytes for a name, the last of them zero.
LONGEST_NAME = 63
# The types of metadata: id in the file, and struct's code.
SCALARS = {
    "u8": (0, "B"), "i8": (1, "b"), "u16": (2, "H"), "i16": (3, "h"), "u32": (4, "I"),
    "i32": (5, "i"), "f32": (6, "f"), "bool": (BOOL, "?"), "string": (STRING, ""),
    "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d"),
}  # fmt: skip

Metadata = Mapping[str, tuple[str, Any]]
Content = bytes | np.ndarray
Tensors = Mapping[str, tuple[GgmlType, tuple[int, ...], Content | Callable[[], Content]]]


def write(path: str | os.PathLike, metadata: Metadata, tensors: Tensors) -> int:
    """Write a GGUF file, atomically, and return its size in bytes.

    Args:
        path: the file; what lies there stays until the new file is complete.
        metadata: key -> (type, value). A type is u8 to u64, i8 to i64, f32, f64, bool or string,
            and with "[]" after it an array: ("u32", 3), ("string[]", ["a", "b"]).
        tensors: name -> (type, shape, bytes). The shape has the input axis last; the bytes (or an
            array that has them) may come from a function, which is called when its turn has come.

    Raises ValueError for a value that its type cannot hold, a name of more than 63 bytes, rows that
    are no whole number of blocks, and contents of another size than type and shape demand.

    >>> import tempfile
    >>> from qlib.ggml import TYPES
    >>> three = np.ones(3, "<f4")
    >>> with tempfile.TemporaryDirectory() as folder:      # a header of 62 bytes, padded, and 12
    ...     write(f"{folder}/x.gguf", {"a": ("u8", 1)}, {"w": (TYPES["F32"], (3,), three)})
    128
    """
    sizes = {name: tensor_bytes(name, kind, shape) for name, (kind, shape, _) in tensors.items()}
    head = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(metadata))]
    head += [_string(key) + _value(key, *typed) for key, typed in metadata.items()]
    offset = 0
    for name, (kind, shape, _) in tensors.items():
        # The file lists the contiguous axis first.
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head.append(_string(name) + dims + struct.pack("<IQ", kind.id, offset))
        offset += sizes[name] + -sizes[name] % ALIGNMENT
    with replacing(path) as temporary, open(temporary, "wb") as file:
        _write_padded(file, memoryview(b"".join(head)))
        for name, (_, _, content) in tensors.items():
            _write_padded(file, _content(name, content, sizes[name]))
        return file.tell()


def tensor_bytes(name: str, kind: GgmlType, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor. Raises ValueError, naming it, if no GGUF file can hold it."""
    if not 0 < len(name.encode()) <= LONGEST_NAME:
        raise ValueError(f"tensor {name!r}: a name has 1 to {LONGEST_NAME} bytes")
    if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1 or shape[-1] % kind.block:
        raise ValueError(
            f"tensor {name!r}: {kind.name} needs 1 to {MAX_DIMS} dimensions and rows of a "
            f"multiple of {kind.block}, got shape {list(shape)}"
        )
    return math.prod(shape) // kind.block * kind.size


def _content(name: str, content: Content | Callable[[], Content], size: int) -> memoryview:
    made = content() if callable(content) else content
    raw = memoryview(np.ascontiguousarray(made) if isinstance(made, np.ndarray) else made)
    if raw.nbytes != size:
        raise ValueError(f"tensor {name!r}: has {raw.nbytes} bytes; type and shape need {size}")
    return raw.cast("B")


def _write_padded(file: BinaryIO, content: memoryview) -> None:
    file.write(content)
    file.write(bytes(-len(content) % ALIGNMENT))


def _value(key: str, kind: str, value: Any) -> bytes:
    base = kind.removesuffix("[]")
    if not key or base not in SCALARS:
        raise ValueError(f"metadata {key!r}: need a key, and one of {', '.join(SCALARS)}: {kind!r}")
    number = SCALARS[base][0]
    values = value if kind.endswith("[]") else [value]
    try:
        body = _elements(base, values)
    except (struct.error, OverflowError, AttributeError, TypeError, UnicodeError) as error:
        raise ValueError(f"metadata {key!r}: {value!r:.80} is not of type {kind}") from error
    if kind.endswith("[]"):
        return struct.pack("<IIQ", ARRAY, number, len(values)) + body
    return struct.pack("<I", number) + body


def _elements(base: str, values: Sequence) -> bytes:
    if base == "string":
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{SCALARS[base][1]}", *values)


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
