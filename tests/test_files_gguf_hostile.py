"""Hostile GGUF files: what tools/fuzz_gguf.py makes, and the cases worth keeping."""

from __future__ import annotations

import contextlib
import re
import struct
import time
import tracemalloc

import fuzz_gguf as fuzz
import numpy as np
import pytest

from qlib.errors import FormatError
from qlib.files import gguf

SEEDS = dict(zip(("types", "llama", "imatrix"), fuzz.seeds()))
FEW = [0, 2**31, 2**61, 2**64 - 1]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "x.gguf"


@pytest.mark.parametrize("name", SEEDS)
def test_seeds_are_read(path, name):
    assert fuzz.check(path, SEEDS[name].content, load=True) == "read"


@pytest.mark.parametrize("name", SEEDS)
def test_every_number_in_turn_says_something_hostile(path, name):
    """Every count, length, type, dimension and offset of a file, one at a time."""
    seed, outcomes = SEEDS[name], []
    for span in (span for span in seed.numbers if span.field != "value"):
        for value in FEW:
            content = fuzz.with_number(seed.content, span, value)
            try:
                outcomes.append(fuzz.check(path, content))
            except Exception as error:
                raise AssertionError(f"{span} = {value}") from error
    assert outcomes.count("refused") > 0.3 * len(outcomes)


def test_every_truncation_is_refused(path):
    seed = SEEDS["imatrix"]
    used = max(span.stop for span in seed.tensors)
    for end in [*range(used), *range(used, len(seed.content) - 32, 7)]:
        assert fuzz.check(path, seed.content[:end]) == "refused"


def test_every_bit_of_a_header(path):
    """A flipped bit gives another file or none at all; the plain parser says which."""
    seed = SEEDS["imatrix"]
    for bit in range(0, 8 * seed.blob, 3):
        content = bytearray(seed.content)
        content[bit // 8] ^= 1 << bit % 8
        fuzz.check(path, bytes(content))


def test_random_mutations():
    outcomes, failures = fuzz.run(0, 800)
    assert failures == {}
    assert min(outcomes["read"], outcomes["refused"]) > 100


def test_an_input_is_the_same_in_every_run():
    (first,), (again,) = (list(fuzz.inputs(7, 1)) for _ in range(2))
    assert first == again


def entry(key, kind, payload):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + payload


def info(name, dims, kind, offset):
    packed = struct.pack(f"<Q{len(name)}sI{len(dims)}Q", len(name), name, len(dims), *dims)
    return packed + struct.pack("<IQ", kind, offset)


def pack(entries=(), infos=(), blob=64):
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries)) + b"".join([*entries, *infos])
    return head + b"\0" * (-len(head) % 32 + blob)


def array(kind, count, payload=b""):
    return entry(b"k", 9, struct.pack("<IQ", kind, count) + payload)


# Numbers that a reader with 64-bit arithmetic would wrap around to something harmless.
WRAPS = {
    "2^61 numbers of 8 bytes": (pack([array(10, 2**61)]), "too many for the"),
    "2^63 numbers of 2 bytes": (pack([array(2, 2**63)]), "too many for the"),
    "2^61 strings": (pack([array(8, 2**61)]), "too many for the"),
    "a string of -1 bytes": (pack([entry(b"k", 8, b"\xff" * 8)]), "past the end of the file"),
    "a string that ends at 2^64": (
        pack([entry(b"k", 8, struct.pack("<Q", 2**64 - 45))]), "past the end of the file"
    ),
    "2^32 - 1 dimensions": (
        pack([], [struct.pack("<Q1sI", 1, b"w", 2**32 - 1) + b"\1" * 40]), "has 4294967295 dim"
    ),
    "a product of 2^64": (pack([], [info(b"w", (2**32, 2**32), 0, 0)]), "end after the file"),
    "a product of 2^64 + 1 rows": (
        pack([], [info(b"w", (32, 2**59 + 1), 8, 0)]), "end after the file"
    ),
    "four dimensions of 2^63": (pack([], [info(b"w", (2**63,) * 4, 0, 0)]), "end after the file"),
    "a dimension of -1": (pack([], [info(b"w", (2**64 - 1,), 24, 0)]), "end after the file"),
    "an offset of -32": (pack([], [info(b"w", (8,), 0, 2**64 - 32)]), "end after the file"),
    "an alignment of 2^63": (
        pack([entry(b"general.alignment", 10, struct.pack("<Q", 2**63))], [info(b"w", (8,), 0, 0)]),
        "end after the file",
    ),
    "a type of -1": (pack([], [info(b"w", (8,), 2**32 - 1, 0)]), "unknown tensor type 4294967295"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPS)
def test_numbers_that_wrap_around(path, name):
    content, message = WRAPS[name]
    assert fuzz.check(path, content) == "refused"
    with pytest.raises(FormatError, match=re.escape(message)):
        gguf.read(path)


SAME = [
    entry(b"k", 0, b"\1"),
    entry(b"l", 0, b"\2"),
    info(b"v", (8,), 0, 0),
    info(b"w", (8,), 0, 32),
]
K, L, V, W = SAME
ORDERS = {
    "key twice": (pack([K, L, K], [V, W]), "'k' is empty or repeated"),
    "tensor twice": (pack([K], [V, W, V]), "the name 'v' is repeated"),
    "two tensors at one place": (pack([], [V, info(b"w", (8,), 0, 0)]), "overlaps tensor 'v'"),
    "a tensor inside another": (pack([], [info(b"v", (16,), 0, 0), W]), "overlaps tensor 'v'"),
    "tensors before metadata": (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + V + K + bytes(64),
        "its name must have 1 to 64 bytes",
    ),
    "an array that holds itself": (
        pack([array(9, 1, struct.pack("<IQ", 9, 1) * 4)]), "is an array of value type 9"
    ),
    "a key with a NUL and 2 MB": (
        pack([entry(b"\0" * 2_000_000, 13, b"")]), "has value type 13"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
def test_sections_and_entries_in_disorder(path, name):
    content, message = ORDERS[name]
    assert fuzz.check(path, content) == "refused"
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        gguf.read(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "content",
    [
        pack([L, K], [W, V]),
        pack([array(4, 0)]),
        pack([], []),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + array(8, 0),
        pack([], [info(b"v", (1, 1, 1, 1), 24, 0)]),
        pack([entry(b"general.alignment", 4, struct.pack("<I", 1))], [info(b"v", (3,), 24, 0)]),
    ],
)
def test_strange_files_that_are_well_formed(path, content):
    assert fuzz.check(path, content) == "read"


def peak(path):
    tracemalloc.start()
    try:
        gguf.read(path)
    except FormatError:
        outcome = "refused"
    else:
        outcome = "read"
    found = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return outcome, found


def test_memory_and_time_for_strings_grow_with_the_file_only(path):
    """Zeros are empty strings; the worst there is are many short ones, 50 bytes each to Python."""
    for text, count, most in ((b"", 50_000, 2), (b"ab", 20_000, 8)):
        one = struct.pack("<Q", len(text)) + text
        path.write_bytes(pack([array(8, count, one * count)]))
        outcome, found = peak(path)
        assert outcome == "read"
        assert found < most * path.stat().st_size
        # A count that promises more than there is must not cost more.
        path.write_bytes(pack([array(8, count + 4000, one * count)], blob=32_032))
        assert peak(path)[1] < most * path.stat().st_size
        start = time.process_time()
        with contextlib.suppress(FormatError):
            gguf.read(path)
        assert time.process_time() - start < 5


@pytest.mark.parametrize("way", ["metadata", "order", "place", "error", "memory", "time", "talk"])
def test_the_check_itself_fails_for_a_wrong_reader(path, monkeypatch, way):
    right = gguf.read
    content = SEEDS["imatrix"].content

    def wrong(path):
        file = right(path)
        if way == "metadata":
            file.metadata["imatrix.chunk_size"] += 1
        if way == "order":
            file.metadata["general.type"] = file.metadata.pop("general.type")
        if way == "place":
            name, other = list(file.tensors)[:2]
            file.tensors[name] = file.tensors[other]
        if way == "error":
            raise KeyError("x")
        if way == "memory":
            np.zeros(1 << 20)
        if way == "time":
            start = time.process_time()
            while time.process_time() - start < fuzz.SECONDS:
                pass
        if way == "talk":
            raise FormatError(path, "x", "y" * 5000)
        return file

    monkeypatch.setattr(gguf, "read", wrong)
    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    with pytest.raises((AssertionError, KeyError)):
        fuzz.check(path, content)
