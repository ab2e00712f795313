"""GGUF files that qlib writes: byte for byte those of the gguf package, and read back by both."""

from __future__ import annotations

import gguf as peer
import numpy as np
import pytest
from tiny_models import raises

from qlib import ggml
from qlib.files import gguf
from qlib.files.gguf_write import write

F32, F16, Q8_0 = ggml.TYPES["F32"], ggml.TYPES["F16"], ggml.TYPES["Q8_0"]
VALUE = peer.GGUFValueType
METADATA = {
    "general.architecture": ("string", "llama"),
    "a.u8": ("u8", 255),
    "a.i8": ("i8", -128),
    "a.u16": ("u16", 65535),
    "a.i16": ("i16", -(2**15)),
    "a.u32": ("u32", 2**32 - 1),
    "a.i32": ("i32", -(2**31)),
    "a.f32": ("f32", 1e-5),
    "a.bool": ("bool", True),
    "a.u64": ("u64", 2**64 - 1),
    "a.i64": ("i64", -(2**63)),
    "a.f64": ("f64", 0.1),
    "a.text": ("string", "€ and\nmore"),
    "l.text": ("string[]", ["a", "", "€"]),
    "l.i32": ("i32[]", np.array([-1, 7], np.int32)),
    "l.f32": ("f32[]", [0.5, 0.25]),
    "l.bool": ("bool[]", [False, True]),
}
THEIRS = {
    "u8": VALUE.UINT8, "i8": VALUE.INT8, "u16": VALUE.UINT16, "i16": VALUE.INT16,
    "u32": VALUE.UINT32, "i32": VALUE.INT32, "f32": VALUE.FLOAT32, "bool": VALUE.BOOL,
    "u64": VALUE.UINT64, "i64": VALUE.INT64, "f64": VALUE.FLOAT64, "string": VALUE.STRING,
}  # fmt: skip


def arrays():
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((3, 64)).astype(np.float32),
        "half": rng.standard_normal(5).astype(np.float16),
        "q": rng.integers(0, 256, (2, 68), np.uint8),
    }


def tensors():
    found = arrays()
    return {
        "w": (F32, (3, 64), found["w"]),
        "half": (F16, (5,), lambda: found["half"].tobytes()),
        "q": (Q8_0, (2, 64), lambda: found["q"]),
    }


def peers_file(path):
    # Their writer puts the architecture first of its own accord.
    writer = peer.GGUFWriter(path, METADATA["general.architecture"][1])
    for key, (kind, value) in list(METADATA.items())[1:]:
        base = THEIRS[kind.removesuffix("[]")]
        if kind.endswith("[]"):
            writer.add_key_value(key, list(value), VALUE.ARRAY, sub_type=base)
        else:
            writer.add_key_value(key, value, base)
    for name, array in arrays().items():
        writer.add_tensor(
            name, array, raw_dtype=peer.GGMLQuantizationType.Q8_0 if name == "q" else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def test_bytes_are_those_of_ggufs_own_writer(tmp_path):
    size = write(tmp_path / "ours.gguf", METADATA, tensors())
    ours = (tmp_path / "ours.gguf").read_bytes()
    assert size == len(ours)
    assert ours == peers_file(tmp_path / "theirs.gguf")


@pytest.mark.parametrize("key", METADATA)
def test_another_value_gives_other_bytes(tmp_path, key):
    kind = METADATA[key][0]
    other = {
        "string": "x", "bool": False, "string[]": ["a", "b", "€"], "bool[]": [True, True],
    }.get(kind, [1, 2] if kind.endswith("[]") else 3)  # fmt: skip
    write(tmp_path / "a.gguf", METADATA | {key: (kind, other)}, tensors())
    write(tmp_path / "b.gguf", METADATA, tensors())
    assert (tmp_path / "a.gguf").read_bytes() != (tmp_path / "b.gguf").read_bytes()


def test_our_reader_reads_it_back(tmp_path):
    write(tmp_path / "x.gguf", METADATA, tensors())
    file = gguf.read(tmp_path / "x.gguf")
    for key, (kind, value) in METADATA.items():
        found = file.metadata[key]
        expected = np.float32(value) if kind == "f32" else value
        assert np.array_equal(found, expected), key
    for name, array in arrays().items():
        assert file.raw(name).tobytes() == array.tobytes()
        assert file.tensors[name].start % 32 == 0


def test_no_tensors(tmp_path):
    assert write(tmp_path / "x.gguf", {}, {}) == 32
    assert gguf.read(tmp_path / "x.gguf").tensors == {}


def test_tensors_are_made_one_at_a_time(tmp_path):
    """When the second is asked for, the first lies in the file already."""
    seen = []

    def content(name):
        def make():
            (temporary,) = tmp_path.iterdir()
            seen.append((name, temporary.stat().st_size))
            return bytes(1 << 16)

        return make

    shape = (1 << 14,)
    write(tmp_path / "x.gguf", {}, {name: (F32, shape, content(name)) for name in "abc"})
    assert [name for name, _ in seen] == ["a", "b", "c"]
    assert seen[2][1] >= 2 << 16


def test_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"old")

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(path, {}, {"a": (F32, (1,), bytes(4)), "b": (F32, (1,), fail)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.gguf"]
    assert path.read_bytes() == b"old"


NAMES = "u8, i8, u16, i16, u32, i32, f32, bool, string, u64, i64, f64"


@pytest.mark.parametrize(
    ("key", "typed", "message"),
    [
        ("k", ("u8", 256), "metadata 'k': 256 is not of type u8"),
        ("k", ("u32", -1), "metadata 'k': -1 is not of type u32"),
        ("k", ("u32", 0.5), "metadata 'k': 0.5 is not of type u32"),
        ("k", ("f32", 1e300), "metadata 'k': 1e+300 is not of type f32"),
        ("k", ("string", 3), "metadata 'k': 3 is not of type string"),
        ("k", ("string", "\ud800"), "metadata 'k': '\\ud800' is not of type string"),
        ("k", ("i32[]", 3), "metadata 'k': 3 is not of type i32[]"),
        ("k", ("i32[]", ["a"]), "metadata 'k': ['a'] is not of type i32[]"),
        ("k", ("int", 3), f"metadata 'k': need a key, and one of {NAMES}: 'int'"),
        ("", ("u8", 3), f"metadata '': need a key, and one of {NAMES}: 'u8'"),
    ],
)
def test_values_that_do_not_fit(tmp_path, key, typed, message):
    with raises(message):
        write(tmp_path / "x.gguf", {key: typed}, {})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("", (F32, (1,), b""), "tensor '': a name has 1 to 63 bytes"),
        ("€" * 22, (F32, (1,), b""), f"tensor '{'€' * 22}': a name has 1 to 63 bytes"),
        (
            "w",
            (Q8_0, (2, 33), b""),
            "tensor 'w': Q8_0 needs 1 to 4 dimensions and rows of a multiple of 32, "
            "got shape [2, 33]",
        ),
        (
            "w",
            (F32, (), b""),
            "tensor 'w': F32 needs 1 to 4 dimensions and rows of a multiple of 1, got shape []",
        ),
        (
            "w",
            (F32, (1, 0), b""),
            "tensor 'w': F32 needs 1 to 4 dimensions and rows of a multiple of 1, got shape [1, 0]",
        ),
        ("w", (F32, (2,), bytes(7)), "tensor 'w': has 7 bytes; type and shape need 8"),
        ("w", (F32, (2,), np.zeros(2)), "tensor 'w': has 16 bytes; type and shape need 8"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, name, tensor, message):
    with raises(message):
        write(tmp_path / "x.gguf", {}, {name: tensor})
    assert not any(tmp_path.iterdir())


def test_a_name_of_63_bytes(tmp_path):
    write(tmp_path / "x.gguf", {}, {"n" * 63: (F32, (1,), bytes(4))})
    assert list(gguf.read(tmp_path / "x.gguf").tensors) == ["n" * 63]
