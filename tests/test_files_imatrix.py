"""The importance matrix: written, read by the gguf package, and equal to what hooks see."""

from __future__ import annotations

import gguf as peer
import numpy as np
import pytest
import torch
from tiny_models import raises, tiny_decoder, tokens

from qlib import Calibration
from qlib.errors import FormatError
from qlib.files import gguf_write, imatrix
from qlib.files.imatrix import Imatrix
from qlib.ggml import TYPES

F32, F16 = TYPES["F32"], TYPES["F16"]


def calibration():
    return Calibration.of(tokens(100), context=32)


def seen(model):
    """Sum of squared inputs of every linear layer, by its name, with hooks of our own."""
    sums = {}

    def hook(name):
        def add(_module, args):
            x = args[0].double().flatten(0, -2)
            sums[name] = sums.get(name, 0) + x.square().sum(0)

        return add

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(name))
    for window in calibration().windows:
        model(window[None])
    return sums


def test_sums_are_those_of_the_inputs():
    found = imatrix.measure(tiny_decoder(), calibration(), "mine.txt")
    model, sums = tiny_decoder(), None
    sums = seen(model)
    assert found.sums.keys() == found.counts.keys()
    assert len(found.sums) == len(sums) == 14
    theirs = {"blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj"}
    theirs["blk.0.attn_output.weight"] = "model.layers.0.self_attn.o_proj"
    for name, ours in theirs.items():
        assert torch.allclose(found.sums[name].double(), sums[ours], rtol=1e-5)
        assert not torch.allclose(found.sums[name].double(), sums[ours].roll(1), rtol=1e-5)
        assert torch.allclose(found.get(name), (sums[ours] / 100).float(), rtol=1e-5)
    assert set(found.counts.values()) == {100}
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("mine.txt",), 4, 32)
    assert repr(found) == "Imatrix(14 tensors, 100 tokens of mine.txt)"


def test_untouched_and_unknown_tensors():
    found = Imatrix({"a": torch.tensor([4.0, 0.0])}, {"a": 0})
    assert found.get("a").tolist() == [1, 1]
    assert found.get("b") is None


def example():
    sums = {"blk.0.b.weight": torch.tensor([1.0, 2.5]), "blk.0.a.weight": torch.tensor([0.1] * 3)}
    return Imatrix(sums, {"blk.0.b.weight": 7, "blk.0.a.weight": 0}, ("x.txt", "y.txt"), 3, 512)


def test_written_and_read(tmp_path):
    imatrix.write(tmp_path / "i.gguf", example())
    found = imatrix.read(tmp_path / "i.gguf")
    assert {n: s.tolist() for n, s in found.sums.items()} == {
        n: s.tolist() for n, s in example().sums.items()
    }
    assert found.counts == example().counts
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("x.txt", "y.txt"), 3, 512)


def test_the_file_is_what_llama_quantize_reads(tmp_path):
    """Names, types and order as tools/imatrix writes them, seen by the gguf package."""
    imatrix.write(tmp_path / "i.gguf", example())
    theirs = peer.GGUFReader(tmp_path / "i.gguf")
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(fields) == [
        "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
    ]  # fmt: skip
    assert fields["general.type"].contents() == "imatrix"
    assert fields["imatrix.datasets"].contents() == ["x.txt", "y.txt"]
    for key in ("chunk_count", "chunk_size"):
        assert fields[f"imatrix.{key}"].types == [peer.GGUFValueType.UINT32]
    names = [f"blk.0.{x}.weight.{end}" for x in "ab" for end in ("in_sum2", "counts")]
    assert [tensor.name for tensor in theirs.tensors] == names
    assert {t.tensor_type for t in theirs.tensors} == {peer.GGMLQuantizationType.F32}
    assert theirs.tensors[2].data.tolist() == [1, 2.5]
    assert theirs.tensors[3].data.tolist() == [7]


def peers_file(path, sums, counts, kind="imatrix"):
    writer = peer.GGUFWriter(path, "")
    writer.kv_data[0].clear()
    writer.add_type(kind)
    writer.add_array("imatrix.datasets", ["x.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 8)
    for end, values in (("in_sum2", sums), ("counts", counts), ("in_sum", sums)):
        writer.add_tensor(f"blk.0.ffn_up.weight.{end}", np.array(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_others_with_two_dimensions_and_more_tensors(tmp_path):
    found = imatrix.read(peers_file(tmp_path / "i.gguf", [[2.0, 4.0]], [[8.0]]))
    assert found.get("blk.0.ffn_up.weight").tolist() == [0.25, 0.5]
    assert (found.datasets, found.chunk_count, found.chunk_size) == (("x.txt",), 2, 8)


def refusal(path):
    with pytest.raises(FormatError) as caught:
        imatrix.read(path)
    return str(caught.value).removeprefix(f"{path}: field ")


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "i.gguf"
    peers_file(path, [[1.0]], [[1.0]], kind="model")
    assert refusal(path) == "'general.type': is 'model'; need 'imatrix'"
    peers_file(path, [[1.0], [2.0]], [[1.0], [2.0]])
    message = "'blk.0.ffn_up.weight': has 2 experts; only dense models are read"
    assert refusal(path) == message
    bad_numbers = "holds numbers that are negative or not finite"
    for bad in (-1.0, float("nan"), float("inf")):
        peers_file(path, [[bad]], [[1.0]])
        assert refusal(path) == f"'blk.0.ffn_up.weight.in_sum2' at byte 384: {bad_numbers}"


def test_missing_partner_type_and_counts(tmp_path):
    path, kind = tmp_path / "i.gguf", {"general.type": ("string", "imatrix")}
    one = np.ones(1, np.float32)
    gguf_write.write(path, kind, {"a.in_sum2": (F32, (1,), one)})
    assert refusal(path) == "'a': has only one of .in_sum2 and .counts"
    gguf_write.write(path, kind, {"a.counts": (F32, (1,), one)})
    assert refusal(path) == "'a': has only one of .in_sum2 and .counts"
    half = (F16, (1,), one.astype(np.float16))
    gguf_write.write(path, kind, {"a.in_sum2": half, "a.counts": (F32, (1,), one)})
    assert refusal(path).endswith(": is F16; need F32")
    gguf_write.write(path, {"general.type": ("u8[]", [1, 2])}, {})
    assert refusal(path) == "'general.type': is array([1, 2], dtype=uint8); need 'imatrix'"
    gguf_write.write(path, {}, {})
    assert refusal(path) == "'general.type': is None; need 'imatrix'"
    gguf_write.write(path, kind | {"imatrix.chunk_size": ("string", "many")}, {})
    assert refusal(path) == "'imatrix.chunk_size': is 'many'; need a count"


def test_no_dataset(tmp_path):
    with raises("an imatrix file names at least one dataset"):
        imatrix.write(tmp_path / "i.gguf", Imatrix({}, {}, ()))
