"""The GGUF container, versions 2 and 3: typed metadata, then named tensors in one aligned blob.

Everything is little-endian:  "GGUF" u32 version, u64 n_tensors, u64 n_kv, the metadata, the tensor
infos, padding, the tensor data.  The file is mapped, not read; a tensor is decoded when it is asked
for.  Each count, length and offset is compared with the size of the file before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .. import ggml
from ..errors import FormatError

# Metadata value types: numbers by numpy name, then the three that are not numbers.
NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4"}
NUMBERS |= {6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
BOOL, STRING, ARRAY = 7, 8, 9
# The fewest bytes that a metadata entry (empty key, u8) and a tensor info (one dimension) can take.
SMALLEST_KV, SMALLEST_INFO = 13, 32
LONGEST_NAME = 64
MAX_DIMS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` with the input axis last, `start` and `size` in bytes."""

    name: str
    kind: ggml.GgmlType
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True, eq=False)
class Gguf:
    """An open GGUF file: its metadata (arrays of strings as lists), and where its tensors lie."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap

    def raw(self, name: str) -> np.ndarray:
        """The stored bytes of a tensor: a read-only view of the mapped file, uint8 [bytes]."""
        info = self.tensors[name]
        return np.frombuffer(self.data, np.uint8, info.size, info.start)

    def tensor(self, name: str) -> Float[Tensor, "*shape"]:
        """Decode one tensor to float32.

        Raises FormatError if its type has no decoder, and KeyError if there is no such tensor.
        """
        info = self.tensors[name]
        if info.kind.name not in ggml.READERS:
            message = (
                f"has type {info.kind.name}, which cannot be read; "
                f"convert the file to one of {', '.join(ggml.READERS)}"
            )
            raise FormatError(self.path, name, message, info.start)
        return torch.from_numpy(ggml.decode(info.kind, self.raw(name), info.shape))


def read(path: str | os.PathLike) -> Gguf:
    """Map a GGUF file, and check its header, metadata and tensor infos.

    Raises FormatError naming the field and its byte offset, and OSError if there is no such file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if not size:
            raise FormatError(path, "magic", "the file is empty", 0)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    cursor = _Cursor(path, data)
    _check_header(cursor)
    n_tensors = cursor.count("n_tensors", SMALLEST_INFO)
    metadata = _read_metadata(cursor, cursor.count("n_kv", SMALLEST_KV))
    return Gguf(path, metadata, _read_infos(cursor, n_tensors, _alignment(cursor, metadata)), data)


class _Cursor:
    """A position in the mapped file that cannot leave it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def error(self, field: str, message: str, offset: int | None = None) -> FormatError:
        return FormatError(self.path, field, message, self.at if offset is None else offset)

    def take(self, size: int, field: str) -> int:
        """Move past `size` bytes and return where they start."""
        left = len(self.data) - self.at
        if size > left:
            raise self.error(field, f"needs {size} bytes, but only {left} are left in the file")
        self.at += size
        return self.at - size

    def number(self, dtype: str, field: str) -> int | float:
        start = self.take(np.dtype(dtype).itemsize, field)
        return np.frombuffer(self.data, dtype, 1, start)[0].item()

    def count(self, field: str, smallest: int) -> int:
        """Read a u64 that counts things of at least `smallest` bytes each."""
        start, count = self.at, self.number("<u8", field)
        left = len(self.data) - self.at
        if count * smallest > left:
            message = f"is {count}, too many for the {left} bytes that are left in the file"
            raise self.error(field, message, start)
        return count

    def string(self, field: str) -> str:
        return self.strings(1, field)[0]

    def strings(self, count: int, field: str) -> list[str]:
        # A vocabulary has 100,000 strings: this loop is the time it takes to open a file.
        data, end, at, found = self.data, len(self.data), self.at, []
        try:
            for _ in range(count):
                start = at + 8
                size = int.from_bytes(data[at:start], "little")
                if start + size > end:
                    raise self.error(field, "a string runs past the end of the file", at)
                at = start + size
                found.append(data[start:at].decode())
        except UnicodeDecodeError as error:
            raise self.error(field, "a string is not valid UTF-8", start - 8) from error
        self.at = at
        return found


def _check_header(cursor: _Cursor) -> None:
    magic = cursor.data[cursor.take(4, "magic") : cursor.at]
    if magic != b"GGUF":
        raise cursor.error("magic", f"is {magic!r}; a GGUF file starts with b'GGUF'", 0)
    version = cursor.number("<u4", "version")
    if version & 0xFFFF == 0:
        raise cursor.error("version", "the file is big-endian; only little-endian is read", 4)
    if version not in (2, 3):
        raise cursor.error("version", f"is {version}; versions 2 and 3 are read", 4)


def _read_metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for index in range(count):
        start, key = cursor.at, cursor.string(f"metadata key {index}")
        if not key or key in metadata:
            raise cursor.error(f"metadata key {index}", f"{key[:80]!r} is empty or repeated", start)
        metadata[key] = _read_value(cursor, cursor.number("<u4", key), key)
    return metadata


def _read_value(cursor: _Cursor, kind: int, key: str) -> Any:
    if kind == ARRAY:
        return _read_array(cursor, cursor.number("<u4", key), key)
    if kind == STRING:
        return cursor.string(key)
    if kind == BOOL:
        return bool(_read_bools(cursor, 1, key)[0])
    if kind in NUMBERS:
        return cursor.number(NUMBERS[kind], key)
    raise cursor.error(key, f"has value type {kind}; types 0 to 12 are known", cursor.at - 4)


def _read_array(cursor: _Cursor, kind: int, key: str) -> list[str] | np.ndarray:
    if kind == STRING:
        return cursor.strings(cursor.count(key, 8), key)
    if kind == BOOL:
        return _read_bools(cursor, cursor.count(key, 1), key)
    if kind in NUMBERS:
        dtype = np.dtype(NUMBERS[kind])
        count = cursor.count(key, dtype.itemsize)
        return np.frombuffer(cursor.data, dtype, count, cursor.take(count * dtype.itemsize, key))
    raise cursor.error(key, f"is an array of value type {kind}, which is not read", cursor.at - 4)


def _read_bools(cursor: _Cursor, count: int, key: str) -> np.ndarray:
    start = cursor.take(count, key)
    values = np.frombuffer(cursor.data, np.uint8, count, start)
    if (values > 1).any():
        raise cursor.error(key, "a bool is neither 0 nor 1", start)
    return values.view(bool)


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise cursor.error("general.alignment", f"is {value!r:.80}; need a power of two")
    return value


def _read_infos(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    infos: dict[str, TensorInfo] = {}
    for index in range(count):
        start, info = cursor.at, _read_info(cursor, f"tensor {index}", alignment)
        if info.name in infos:
            raise cursor.error(f"tensor {index}", f"the name {info.name!r} is repeated", start)
        infos[info.name] = info
    # Offsets in the file count from the start of the blob, which is known only now.
    blob = -(-cursor.at // alignment) * alignment
    placed = [TensorInfo(i.name, i.kind, i.shape, blob + i.start, i.size) for i in infos.values()]
    _check_places(cursor, placed)
    return {info.name: info for info in placed}


def _read_info(cursor: _Cursor, field: str, alignment: int) -> TensorInfo:
    start, name = cursor.at, cursor.string(field)
    if not 0 < len(name.encode()) <= LONGEST_NAME:
        raise cursor.error(field, f"its name must have 1 to {LONGEST_NAME} bytes", start)
    n_dims = cursor.number("<u4", name)
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(name, f"has {n_dims} dimensions; need 1 to {MAX_DIMS}", cursor.at - 4)
    # The file lists the contiguous axis first.
    shape = tuple(cursor.number("<u8", name) for _ in range(n_dims))[::-1]
    number = cursor.number("<u4", name)
    if number not in ggml.BY_ID:
        raise cursor.error(name, f"has the unknown tensor type {number}", cursor.at - 4)
    kind = ggml.BY_ID[number]
    if min(shape) < 1 or shape[-1] % kind.block:
        message = f"has shape {list(shape)}; {kind.name} needs rows of a multiple of {kind.block}"
        raise cursor.error(name, message, start)
    offset = cursor.number("<u8", name)
    if offset % alignment:
        message = f"has offset {offset}, which is not a multiple of the alignment {alignment}"
        raise cursor.error(name, message, cursor.at - 8)
    return TensorInfo(name, kind, shape, offset, math.prod(shape) // kind.block * kind.size)


def _check_places(cursor: _Cursor, infos: list[TensorInfo]) -> None:
    """Refuse tensors that leave the file or share bytes."""
    end, last = 0, ""
    for info in sorted(infos, key=lambda info: info.start):
        if info.start + info.size > len(cursor.data):
            message = f"its {info.size} bytes end after the file, which has {len(cursor.data)}"
            message += "; it may be truncated"
            raise cursor.error(info.name, message, info.start)
        if info.start < end:
            raise cursor.error(info.name, f"overlaps tensor {last!r}", info.start)
        end, last = info.start + info.size, info.name
