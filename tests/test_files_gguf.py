"""The GGUF container: files packed by hand, one field wrong at a time; gguf's reader as oracle."""

from __future__ import annotations

import struct
import time

import gguf as peer
import numpy as np
import pytest

from qlib import ggml
from qlib.errors import FormatError
from qlib.files import gguf

U32, BOOL, STRING, ARRAY = 4, 7, 8, 9


def text(value) -> bytes:
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def entry(key, kind, payload: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + payload


def array(kind, count, payload: bytes) -> bytes:
    return struct.pack("<IQ", kind, count) + payload


def info(name="w", dims=(4, 2), kind=0, offset=0) -> bytes:
    packed = text(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return packed + struct.pack("<IQ", kind, offset)


def pack(entries=(), infos=(), data=b"", version=3, n_kv=None, n_tensors=None, alignment=32):
    n_kv = len(entries) if n_kv is None else n_kv
    n_tensors = len(infos) if n_tensors is None else n_tensors
    head = b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_kv)
    head += b"".join(entries) + b"".join(infos)
    return head + b"\0" * (-len(head) % alignment) + data


@pytest.fixture
def write(tmp_path):
    def write(content: bytes):
        path = tmp_path / "x.gguf"
        path.write_bytes(content)
        return path

    return write


GOOD = pack(
    [
        entry("general.architecture", STRING, text("llama")),
        entry("a.u8", 0, b"\xff"),
        entry("a.i8", 1, b"\xff"),
        entry("a.u16", 2, b"\xfe\xff"),
        entry("a.i16", 3, b"\xfe\xff"),
        entry("a.u32", U32, struct.pack("<I", 2**32 - 1)),
        entry("a.i32", 5, struct.pack("<i", -5)),
        entry("a.f32", 6, struct.pack("<f", 0.5)),
        entry("a.bool", BOOL, b"\x01"),
        entry("a.u64", 10, struct.pack("<Q", 2**64 - 1)),
        entry("a.i64", 11, struct.pack("<q", -(2**63))),
        entry("a.f64", 12, struct.pack("<d", 0.1)),
        entry("l.text", ARRAY, array(STRING, 3, text("a") + text("") + text("€"))),
        entry("l.i32", ARRAY, array(5, 2, struct.pack("<ii", -1, 7))),
        entry("l.bool", ARRAY, array(BOOL, 2, b"\x00\x01")),
    ],
    [info("w", (4, 2), 0, 0), info("h", (3,), 1, 32)],
    np.arange(8, dtype="<f4").tobytes() + np.array([1, 2, 3], "<f2").tobytes(),
)


def test_every_value_type(write):
    file = gguf.read(write(GOOD))
    values = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
    assert values == {
        "general.architecture": "llama",
        "a.u8": 255,
        "a.i8": -1,
        "a.u16": 65534,
        "a.i16": -2,
        "a.u32": 2**32 - 1,
        "a.i32": -5,
        "a.f32": 0.5,
        "a.bool": True,
        "a.u64": 2**64 - 1,
        "a.i64": -(2**63),
        "a.f64": 0.1,
        "l.text": ["a", "", "€"],
        "l.i32": [-1, 7],
        "l.bool": [False, True],
    }
    assert file.tensor("w").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert file.tensor("h").tolist() == [1, 2, 3]
    with pytest.raises(KeyError):
        file.tensor("v")


@pytest.mark.parametrize("version", [2, 3])
def test_agrees_with_ggufs_own_reader(write, version):
    path = write(GOOD[:4] + struct.pack("<I", version) + GOOD[8:])
    ours, theirs = gguf.read(path), peer.GGUFReader(path)
    fields = {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert set(ours.metadata) == set(fields)
    for key, value in fields.items():
        found = ours.metadata[key]
        assert (found.tolist() if isinstance(found, np.ndarray) else found) == value
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].start == tensor.data_offset
        assert np.array_equal(ours.tensor(tensor.name).numpy(), tensor.data)


def test_a_changed_byte_of_data_is_noticed(write):
    path = write(GOOD[:-1] + bytes([GOOD[-1] ^ 1]))
    assert gguf.read(path).tensor("h").tolist() != [1, 2, 3]


ONE = [entry("k", U32, b"\0\0\0\0")]
HUGE = 1 << 60
BAD = {
    "empty": (b"", "magic' at byte 0: the file is empty"),
    "short magic": (b"GG", "magic' at byte 0: needs 4 bytes, but only 2 are left in the file"),
    "magic": (b"GGML" + GOOD[4:], "magic' at byte 0: is b'GGML'; a GGUF file starts with b'GGUF'"),
    "version 1": (pack(version=1), "version' at byte 4: is 1; versions 2 and 3 are read"),
    "big-endian": (
        pack(version=3 << 24),
        "version' at byte 4: the file is big-endian; only little-endian is read",
    ),
    "n_tensors": (
        pack(ONE, n_tensors=HUGE),
        f"n_tensors' at byte 8: is {HUGE}, too many for the 48 bytes that are left in the file",
    ),
    "n_kv": (
        pack(ONE, n_kv=2**64 - 1),
        f"n_kv' at byte 16: is {2**64 - 1}, too many for the 40 bytes that are left in the file",
    ),
    "key length": (
        pack([struct.pack("<Q", 2**63) + b"k" * 20]),
        "metadata key 0' at byte 24: a string runs past the end of the file",
    ),
    "key twice": (pack(ONE + ONE), "metadata key 1' at byte 41: 'k' is empty or repeated"),
    "key empty": (
        pack([entry("", U32, b"\0\0\0\0")]),
        "metadata key 0' at byte 24: '' is empty or repeated",
    ),
    "key bytes": (
        pack([entry(b"\xff", U32, b"\0\0\0\0")]),
        "metadata key 0' at byte 24: a string is not valid UTF-8",
    ),
    "value type": (
        pack([entry("k", 13, b"\0\0\0\0")]),
        "k' at byte 33: has value type 13; types 0 to 12 are known",
    ),
    "string value": (
        pack([entry("k", STRING, struct.pack("<Q", 2**64 - 1))]),
        "k' at byte 37: a string runs past the end of the file",
    ),
    "bool": (pack([entry("k", BOOL, b"\x02")]), "k' at byte 37: a bool is neither 0 nor 1"),
    "strings": (
        pack([entry("k", ARRAY, array(STRING, HUGE, text("a")))]),
        f"k' at byte 41: is {HUGE}, too many for the 15 bytes that are left in the file",
    ),
    "last string": (
        pack([entry("k", ARRAY, array(STRING, 2, text("a") + struct.pack("<Q", HUGE)))]),
        "k' at byte 58: a string runs past the end of the file",
    ),
    "numbers": (
        pack([entry("k", ARRAY, array(10, HUGE, b""))]),
        f"k' at byte 41: is {HUGE}, too many for the 15 bytes that are left in the file",
    ),
    "nested": (
        pack([entry("k", ARRAY, array(ARRAY, 1, array(U32, 1, b"\0\0\0\0")))]),
        "k' at byte 37: is an array of value type 9, which is not read",
    ),
    "alignment": (
        pack([entry("general.alignment", U32, struct.pack("<I", 24))]),
        "general.alignment' at byte 57: is 24; need a power of two",
    ),
    "alignment 0": (
        pack([entry("general.alignment", U32, struct.pack("<I", 0))]),
        "general.alignment' at byte 57: is 0; need a power of two",
    ),
    "alignment type": (
        pack([entry("general.alignment", STRING, text("32"))]),
        "general.alignment' at byte 63: is '32'; need a power of two",
    ),
    "name": (pack([], [info("n" * 65)]), "tensor 0' at byte 24: its name must have 1 to 64 bytes"),
    "name twice": (
        pack([], [info(), info()], b"\0" * 32),
        "tensor 1' at byte 65: the name 'w' is repeated",
    ),
    "no dims": (
        pack([], [info(dims=())], b"\0" * 32),
        "w' at byte 33: has 0 dimensions; need 1 to 4",
    ),
    "many dims": (
        pack([], [info(dims=(1, 1, 1, 1, 1))], b"\0" * 32),
        "w' at byte 33: has 5 dimensions; need 1 to 4",
    ),
    "dim 0": (
        pack([], [info(dims=(4, 0))], b"\0" * 32),
        "w' at byte 24: has shape [0, 4]; F32 needs rows of a multiple of 1",
    ),
    "row": (
        pack([], [info(dims=(33, 2), kind=2)], b"\0" * 96),
        "w' at byte 24: has shape [2, 33]; Q4_0 needs rows of a multiple of 32",
    ),
    "tensor type": (
        pack([], [info(kind=4)], b"\0" * 32),
        "w' at byte 53: has the unknown tensor type 4",
    ),
    "product": (
        pack([], [info(dims=(2**63, 2**63))], b"\0" * 32),
        f"w' at byte 96: its {2**128} bytes end after the file, which has 128; it may be truncated",
    ),
    "offset": (
        pack([], [info(offset=2**63)], b"\0" * 32),
        f"w' at byte {96 + 2**63}: its 32 bytes end after the file, which has 128; "
        "it may be truncated",
    ),
    "unaligned": (
        pack([], [info(offset=8)], b"\0" * 64),
        "w' at byte 57: has offset 8, which is not a multiple of the alignment 32",
    ),
    "overlap": (
        pack([], [info("w", (16,)), info("v", (16,), 0, 32)], b"\0" * 128),
        "v' at byte 128: overlaps tensor 'w'",
    ),
    "truncated": (
        GOOD[:-1],
        "h' at byte 544: its 6 bytes end after the file, which has 549; it may be truncated",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_name_field_and_byte(write, name):
    content, message = BAD[name]
    path = write(content)
    start = time.process_time()
    with pytest.raises(FormatError) as caught:
        gguf.read(path)
    assert str(caught.value) == f"{path}: field '{message}"
    assert time.process_time() - start < 5


def test_gap_between_tensors_is_allowed(write):
    path = write(pack([], [info("w", (8,)), info("v", (8,), 0, 64)], b"\0" * 96))
    assert gguf.read(path).tensor("v").tolist() == [0] * 8


def test_type_without_decoder_names_tensor_type_and_remedy(write):
    path = write(pack([], [info("w", (32,), ggml.TYPES["I8"].id)], b"\0" * 32))
    file = gguf.read(path)
    with pytest.raises(FormatError) as caught:
        file.tensor("w")
    assert str(caught.value) == (
        f"{path}: field 'w' at byte 64: has type I8, which cannot be read; convert the file to "
        f"one of {', '.join(ggml.READERS)}"
    )


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        gguf.read(tmp_path / "none.gguf")
