"""The native container: what is written comes back, whole; damaged bytes never crash a reader."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct

import numpy as np
import pytest
import safetensors.torch
import torch

import qlib
from qlib import FormatError, fit, grid
from qlib.files import native
from qlib.ggml import BlockFormat
from qlib.polarquant import PolarQuant
from qlib.qtensor import QTensor
from qlib.scheme import Scheme
from qlib.turboquant import TurboQuant


def weight(rows: int = 4, cols: int = 64) -> torch.Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def refusal(path) -> str:
    """The message of the FormatError that loading `path` raises, without the path."""
    with pytest.raises(FormatError) as caught:
        QTensor.load(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weight.safetensors"


# -- what is written comes back -----------------------------------------------------------------


@pytest.mark.parametrize("name", qlib.formats())
def test_every_format_comes_back(path, name):
    blocks = isinstance(qlib.format(name), BlockFormat)
    q = qlib.quantize(weight(3, 512 if blocks else 70), name)
    q.save(path)
    loaded = QTensor.load(path)
    assert (loaded.format, loaded.shape) == (q.format, q.shape)
    assert loaded.tobytes() == q.tobytes()
    loaded.parts["blocks" if blocks else "codes"][0, 0] ^= 1
    assert loaded.tobytes() != q.tobytes()


def test_many_tensors_one_learned_grid_and_dense_ones(path):
    own = grid.Grid("mine", torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0]))
    learned = Scheme(own, 32, fit.absmax)
    tensors = {name: learned.quantize(weight() * i) for i, name in enumerate("abc", 1)}
    dense = {"norm.weight": torch.ones(5), "b2": torch.zeros(2)}
    native.save_tensors(path, tensors, dense)
    loaded = native.load_tensors(path)
    assert {n: q.tobytes() for n, q in loaded.items()} == {
        n: q.tobytes() for n, q in tensors.items()
    }
    assert list(native.load_tensors(path, ["b"])) == ["b"]
    assert {name: t.tolist() for name, t in native.load_dense(path).items()} == {
        name: t.tolist() for name, t in dense.items()
    }
    with pytest.raises(FormatError, match=r"field 'qlib': holds no quantized tensor 'd'$"):
        native.load_tensors(path, ["d"])


def test_two_levels_come_back(path):
    inner = Scheme(grid.GRIDS["uint8"], 256, fit.minmax, torch.float32, torch.float32)
    q = Scheme(grid.NF4, 64, fit.absmax, scale=inner).quantize(weight(4, 640))
    q.save(path)
    assert QTensor.load(path).format == q.format
    assert torch.equal(QTensor.load(path).dequantize(), q.dequantize())


ROTATED = {
    "turbo3": TurboQuant(3),
    "sketch alone": TurboQuant(1, qjl=True, seed=5, norm=torch.float32),
    "hadamard": TurboQuant(2, rotation="hadamard"),
    "polar": PolarQuant(),
    "two levels": PolarQuant((3, 1), "hadamard", 7, torch.float32),
}


@pytest.mark.parametrize("name", ROTATED)
def test_rotated_rows_come_back(path, name):
    q = ROTATED[name].quantize(weight(3, 64 if "hadamard" in str(ROTATED[name]) else 70))
    q.save(path)
    loaded = QTensor.load(path)
    assert (loaded.format, loaded.shape) == (q.format, q.shape)
    assert loaded.tobytes() == q.tobytes()
    assert torch.equal(loaded.dequantize(), q.dequantize())
    # The same parts under another rotation mean other rows.
    other = dataclasses.replace(loaded.format, seed=loaded.format.seed + 1)
    assert not torch.allclose(other.decode(loaded.parts, loaded.shape), q.dequantize(), atol=0.1)


def test_a_rotated_format_is_described_by_its_fields():
    described = native.format_to_dict(TurboQuant(3, qjl=True, seed=4))
    fields = {"bits": 3, "qjl": True, "rotation": "qr", "seed": 4, "norm": "float16"}
    assert json.loads(json.dumps(described)) == {"turboquant": fields}
    described = native.format_to_dict(PolarQuant((4, 2), "hadamard", radius=torch.float32))
    fields = {"bits": [4, 2], "rotation": "hadamard", "seed": 0, "radius": "float32"}
    assert json.loads(json.dumps(described)) == {"polarquant": fields}


def test_any_safetensors_reader_sees_the_parts(path):
    q = qlib.quantize(weight(), "int4-g32-asym")
    q.save(path)
    raw = safetensors.torch.load_file(path)
    assert {k: t.tolist() for k, t in raw.items()} == {k: t.tolist() for k, t in q.parts.items()}


def test_only_nameable_schemes_are_saved(path):
    def homemade(blocks, levels, importance=None):
        return fit.absmax(blocks, levels)

    q = Scheme(grid.GRIDS["int4"], 32, homemade).quantize(weight())
    with pytest.raises(
        ValueError, match=r"^fit homemade is not in qlib.fit.FITS: it cannot be named$"
    ):
        q.save(path)
    other = QTensor("not a scheme", q.shape, q.parts)
    with pytest.raises(ValueError, match=r"^qlib's container stores Schemes, not str$"):
        other.save(path)
    assert not path.exists()


# -- hostile bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\0",
        b"GGUF" * 4,
        struct.pack("<Q", 1 << 62),
        struct.pack("<Q", 2) + b"{]",
        b"\xff" * 64,
    ],
)
def test_not_a_safetensors_file(path, raw):
    path.write_bytes(raw)
    message = refusal(path)
    assert re.fullmatch(r"field 'header': not a valid safetensors file \(.*\)", message)


def test_cut_files(path):
    qlib.quantize(weight(), "nvfp4").save(path)
    raw = path.read_bytes()
    for end in range(0, len(raw), 37):
        path.write_bytes(raw[:end])
        assert refusal(path).startswith("field 'header': not a valid safetensors file")


@pytest.mark.parametrize("name", ["int4-g32-asym", "nvfp4", "mxfp8_e4m3", "learned", *ROTATED])
def test_random_bytes_raise_format_error_or_load(path, name):
    """200 mutations of one to three bytes: FormatError, or a tensor without NaN."""
    own = Scheme(grid.Grid("mine", torch.tensor([-1.0, -0.2, 0.0, 0.2, 1.0])), 32, fit.absmax)
    formats = ROTATED | {"learned": own}
    (formats[name] if name in formats else qlib.format(name)).quantize(weight()).save(path)
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        mutated = bytearray(raw)
        for at in rng.integers(0, len(raw), rng.integers(1, 4)):
            mutated[at] = rng.integers(256)
        path.write_bytes(mutated)
        try:
            assert not QTensor.load(path).dequantize().isnan().any()
        except FormatError:
            refused += 1
    assert 20 < refused < 200


def test_missing_file(path):
    with pytest.raises(FileNotFoundError, match=re.escape(f"no such file: {path}")):
        QTensor.load(path)


# -- writing ------------------------------------------------------------------------------------


def test_interrupted_save_leaves_the_old_file(path, monkeypatch):
    old, new = qlib.quantize(weight(), "int4-g32"), qlib.quantize(weight() + 1, "int4-g32")
    old.save(path)

    def dies(tensors, name, metadata):
        name.write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", dies)
    with pytest.raises(KeyboardInterrupt):
        new.save(path)
    assert QTensor.load(path).tobytes() == old.tobytes()
    assert os.listdir(path.parent) == [path.name]
    monkeypatch.undo()
    new.save(path)
    assert QTensor.load(path).tobytes() == new.tobytes() != old.tobytes()
    assert os.listdir(path.parent) == [path.name]
