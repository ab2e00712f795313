"""gpt-oss's experts: transformers' own loader as the judge, round trips, and files that lie."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlib
from qlib.errors import FormatError
from qlib.files import gpt_oss

NAME = "model.layers.0.mlp.experts.down_proj"


def experts(shape=(3, 5, 96), seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def transformers_values(path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tensors = load_file(path)
    blocks, scales = tensors[f"{NAME}_blocks"], tensors[f"{NAME}_scales"]
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).transpose(1, 2)


@pytest.fixture
def path(tmp_path):
    gpt_oss.write(tmp_path / "experts.safetensors", {NAME: qlib.quantize(experts(), "mxfp4")})
    return tmp_path / "experts.safetensors"


@pytest.mark.parametrize("shape", [(1, 1, 32), (3, 5, 96), (2, 64, 128)])
def test_transformers_reads_the_same_values(tmp_path, shape):
    path = tmp_path / "a.safetensors"
    w = experts(shape) * torch.logspace(-9, 9, shape[2])
    w[0, 0, :32] = 0
    q = qlib.quantize(w, "mxfp4")
    gpt_oss.write(path, {NAME: q})
    read = gpt_oss.read(path, NAME)
    assert read.shape == shape
    assert all(torch.equal(read.parts[part], q.parts[part]) for part in q.parts)
    assert torch.equal(read.dequantize(), q.dequantize())
    assert torch.equal(transformers_values(path), q.dequantize())
    # The twin: one bit of one code.
    tensors = load_file(path)
    tensors[f"{NAME}_blocks"][0, -1, -1, -1] ^= 0x10
    save_file(tensors, path)
    assert (transformers_values(path) != q.dequantize()).sum() == 1
    assert torch.equal(transformers_values(path), gpt_oss.read(path, NAME).dequantize())


def test_every_code_under_every_scale(tmp_path):
    """All that a file can hold, but for NaN and the two scales whose largest values overflow."""
    path = tmp_path / "a.safetensors"
    codes = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 253, 16, 16)
    scales = torch.arange(253, dtype=torch.uint8).view(1, 253, 1).expand(1, 253, 16)
    tensors = {f"{NAME}_blocks": codes.contiguous(), f"{NAME}_scales": scales.contiguous()}
    save_file(tensors, path)
    assert torch.equal(gpt_oss.read(path, NAME).dequantize(), transformers_values(path))


def test_bytes_of_a_file(tmp_path):
    """The first of two codes is in the low half; 0.5 and 6 under the exponent 125 - 127."""
    q = qlib.quantize(torch.tensor([0.125, 1.5] * 16).view(1, 1, 32), "mxfp4")
    gpt_oss.write(tmp_path / "a.safetensors", {NAME: q})
    tensors = load_file(tmp_path / "a.safetensors")
    assert tensors[f"{NAME}_blocks"].tolist() == [[[[0x71] * 16]]]
    assert tensors[f"{NAME}_scales"].tolist() == [[[125]]]


@pytest.mark.parametrize(
    ("format", "shape", "message"),
    [
        ("mxfp4", (4, 32), "a [4, 32]: need [experts, out, in] with in a multiple of 32"),
        ("mxfp4", (2, 4, 48), "a [2, 4, 48]: need [experts, out, in] with in a multiple of 32"),
        (
            "mxfp8_e4m3",
            (1, 4, 32),
            "a [1, 4, 32]: is e4m3, block 32, pow2_floor, scale e8m0; gpt-oss stores mxfp4",
        ),
        ("q4_0", (1, 4, 32), "a [1, 4, 32]: is Q4_0; gpt-oss stores mxfp4"),
    ],
)
def test_what_cannot_be_written(tmp_path, format, shape, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gpt_oss.write(tmp_path / "a", {"a": qlib.quantize(torch.ones(shape), format)})
    assert list(tmp_path.iterdir()) == []


def refused(path, message):
    with pytest.raises(FormatError) as caught:
        gpt_oss.read(path, NAME)
    assert str(caught.value) == f"{path}: field {message}"


def test_files_that_lie(path, tmp_path):
    good = load_file(path)
    blocks, scales = f"{NAME}_blocks", f"{NAME}_scales"
    refused(tmp_path / "b", "'file': this file is missing")
    for name in (scales, blocks):
        save_file({key: value for key, value in good.items() if key != name}, path)
        refused(path, f"'{name}': this tensor is missing")
    save_file(good | {blocks: good[blocks][:, :, :2].contiguous()}, path)
    refused(path, f"'{blocks}': is U8 [3, 5, 2, 16]; need U8 [3, 5, 3, 16]")
    save_file(good | {scales: good[scales].float()}, path)
    refused(path, f"'{scales}': is F32 [3, 5, 3]; need U8 [experts, out, in / 32]")
    save_file(good | {scales: good[scales].view(-1)}, path)
    refused(path, f"'{scales}': is U8 [45]; need U8 [experts, out, in / 32]")
    save_file(good | {scales: good[scales][:0], blocks: good[blocks][:0]}, path)
    refused(path, f"'{scales}': is U8 [0, 5, 3]; need U8 [experts, out, in / 32]")
    save_file(good | {scales: good[scales].index_fill(2, torch.tensor([1]), 255)}, path)
    refused(path, f"'{scales}': holds a scale 255, which stands for NaN")
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FormatError, match=r"experts\.safetensors: field 'header': "):
        gpt_oss.read(path, NAME)
