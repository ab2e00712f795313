"""bitsandbytes' container: bitsandbytes and transformers as judges, and files that lie."""

from __future__ import annotations

import json
import re

import container_models as cm
import pytest
import torch
from container_models import LAYER
from safetensors.torch import load_file, save_file

import qlib
from qlib import fit, grid
from qlib.double import DoubleQuant
from qlib.errors import FormatError
from qlib.files import bnb, hf, quantized
from qlib.scheme import Scheme

TABLES = {"nf4": grid.NF4, "fp4": grid.BNB_FP4}
STATE = "weight.quant_state.bitsandbytes__"
NF4, NF4_DOUBLE, FP4 = (qlib.format(name) for name in ("nf4", "nf4-dq", "fp4_bnb-g32"))
INT8 = qlib.format("int8")
storages = pytest.mark.parametrize(
    "storage",
    [torch.float32, DoubleQuant(), DoubleQuant(64)],
    ids=["float32", "double", "double64"],
)


def decoded(stored):
    """What bitsandbytes decodes from the tensors of a 4-bit layer."""
    import bitsandbytes.functional as F

    stats = {part.removeprefix("weight."): t for part, t in stored.items() if part != "weight"}
    state = F.QuantState.from_dict(stats, torch.device("cpu"))
    return F.dequantize_4bit(stored["weight"], state)


def decoded_int8(stored):
    import bitsandbytes.functional as F

    return F.int8_vectorwise_dequant(stored["weight"], stored["SCB"])


def layers_of(folder):
    """The tensors of each packed layer of a folder, by layer."""
    found = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        layer, proj, part = key.partition("_proj.")
        if proj:
            found.setdefault(layer + "_proj", {})[part] = tensor
    return {name: parts for name, parts in found.items() if len(parts) > 1}


def through_file(folder, q):
    """One weight, stored in a file and read again."""
    save_file({f"a.{part}": t for part, t in bnb.store(q).items()}, folder / "model.safetensors")
    return read(folder, q.shape, bnb.describe({"a": q.format})["quantization_config"])


def read(folder, shape, settings):
    stored = quantized.Stored(hf.Tensors(folder, quantized.DTYPES), "a", shape)
    q = bnb.read(stored, quantized.Settings(folder, "quantization_config", settings))
    assert stored.taken == set(stored.tensors.shapes)
    return q


def ulps(a, b):
    return (a.view(torch.int32) - b.view(torch.int32)).abs().max().item()


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("block", [32, 64, 128, 512, 4096])
@storages
def test_bitsandbytes_decodes_our_values(tmp_path, table, block, storage):
    format = Scheme(TABLES[table], block, fit.absmax, scale=storage)
    q = format.quantize(cm.weights(block, (3, 2 * block)))
    stored = bnb.store(q)
    assert torch.equal(decoded(stored), q.dequantize())
    read = through_file(tmp_path, q)
    assert read.format == format
    assert all(torch.equal(read.parts[part], q.parts[part]) for part in q.parts)
    assert torch.equal(read.dequantize(), q.dequantize())
    # The twin: the halves of one byte change places.
    stored["weight"] = stored["weight"].clone()
    at = int((stored["weight"][:, 0] != bnb.swapped(stored["weight"])[:, 0]).nonzero()[0])
    stored["weight"][at] = bnb.swapped(stored["weight"][at])
    assert not torch.equal(decoded(stored), q.dequantize())


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("double", [False, True])
def test_we_read_what_bitsandbytes_quantizes(tmp_path, table, double):
    import bitsandbytes.functional as F

    w = cm.weights(3, (40, 192))
    packed, state = F.quantize_4bit(w, quant_type=table, compress_statistics=double)
    tensors = {f"a.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    save_file(tensors | {"a.weight": packed}, tmp_path / "model.safetensors")
    q = read(tmp_path, (40, 192), {"load_in_4bit": True})
    assert torch.equal(q.dequantize(), F.dequantize_4bit(packed, state))
    packed[-1] ^= 1
    assert (q.dequantize() != F.dequantize_4bit(packed, state)).sum() == 1


def test_scales_of_16_bits_become_float32(tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        q = Scheme(grid.NF4, 32, fit.absmax, scale=dtype).quantize(cm.weights(0, (4, 64)))
        read = through_file(tmp_path, q)
        assert read.format.scale == torch.float32
        assert torch.equal(read.dequantize(), q.dequantize())


def test_bytes_of_one_block():
    """Numbers 0.21 apart, as bitsandbytes 0.50.2 stores them: the first in the high half."""
    ramp = (0.21 * (torch.arange(32, dtype=torch.float64) - 13)).float().view(1, 32)
    stored = bnb.store(Scheme(grid.NF4, 32, fit.absmax, scale=torch.float32).quantize(ramp))
    assert bytes(stored["weight"].flatten().tolist()).hex() == "11122334455667889aabbccddeeeefff"
    assert stored["weight.absmax"].view(torch.uint8).numpy().tobytes().hex() == "85eb7140"
    assert json.loads(bytes(stored[f"{STATE}nf4"].tolist())) == {
        "quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [1, 32],
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_int8_values(tmp_path, dtype):
    q = Scheme(grid.int_grid(8), "row", fit.absmax, scale=dtype).quantize(cm.weights(5, (64, 96)))
    stored = bnb.store(q)
    read = through_file(tmp_path, q)
    assert torch.equal(read.dequantize(), q.dequantize())
    # bitsandbytes rounds twice, code * SCB and then * (1 / 127); this is code * (SCB / 127).
    assert ulps(decoded_int8(stored), q.dequantize()) <= 2
    stored["weight"] = stored["weight"].clone()
    stored["weight"][3, 3] += 1
    assert ulps(decoded_int8(stored), q.dequantize()) > 2


def test_int8_of_bitsandbytes_can_be_written_again(tmp_path):
    import bitsandbytes.functional as F

    codes, scb, _ = F.int8_vectorwise_quant(cm.weights(6, (300, 64)).half())
    scb = scb * torch.linspace(0.5, 1.5, 300)
    parts = {"weight": codes, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    save_file({f"a.{k}": v for k, v in parts.items()}, tmp_path / "model.safetensors")
    q = read(tmp_path, (300, 64), {"load_in_8bit": True})
    assert ulps(q.dequantize(), F.int8_vectorwise_dequant(codes, scb)) <= 2
    again = through_file(tmp_path, q)
    assert all(torch.equal(again.parts[part], q.parts[part]) for part in q.parts)
    q = Scheme(grid.int_grid(8), "row", fit.absmax, scale=torch.float32).quantize(
        torch.randn(500, 8)
    )
    message = "a scale in float32 is no SCB / 127; store the scales of int8 as float16"
    with pytest.raises(ValueError, match=re.escape(message)):
        bnb.store(q)


@pytest.mark.parametrize("tied", [True, False])
def test_transformers_computes_the_same_logits(tmp_path, tied):
    import transformers

    model = cm.with_formats(cm.decoder(tied), [NF4, FP4, NF4_DOUBLE, None])
    cm.saved(tmp_path, model, "bitsandbytes")
    back, _ = quantized.load(tmp_path)
    ours = model(cm.prompt())
    assert torch.equal(back(cm.prompt()), ours)
    assert {n: q.format for n, q in cm.packed(back).items()} == {
        n: q.format for n, q in cm.packed(model).items()
    }

    def theirs():
        found = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            return found(cm.prompt()).logits

    assert (theirs() - ours).abs().max() < 1e-4
    # The twin: one code.
    weight = cm.stored_tensor(tmp_path, "weight")
    weight[40] ^= 0x70
    cm.change_tensors(tmp_path, weight=weight)
    assert (theirs() - ours).abs().max() > 1e-3
    assert (quantized.load(tmp_path)[0](cm.prompt()) - theirs()).abs().max() < 1e-4


def test_transformers_loads_int8(tmp_path):
    import transformers

    model = cm.with_formats(cm.decoder(), [INT8])
    cm.saved(tmp_path, model, "bitsandbytes")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    found = {n: m for n, m in theirs.named_modules() if type(m).__name__ == "Linear8bitLt"}
    assert found.keys() == cm.packed(model).keys()
    for name, layer in found.items():
        weight = decoded_int8({"weight": layer.weight.data, "SCB": layer.weight.SCB})
        assert ulps(weight, model.get_submodule(name).weight.dequantize()) <= 2
    weight[0, 0] *= 1.001
    assert ulps(weight, model.get_submodule(name).weight.dequantize()) > 2
    # It quantizes activations too, so that logits differ by that much.
    ours = model(cm.prompt())
    with torch.no_grad():
        assert (theirs(cm.prompt()).logits - ours).norm() < 0.1 * ours.norm()


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
        {"load_in_8bit": True},
    ],
    ids=["nf4", "nf4-double", "fp4-double", "int8"],
)
def test_we_read_what_transformers_saves(tmp_path, options):
    import transformers

    source, folder = tmp_path / "source", tmp_path / "quantized"
    hf.save_checkpoint(source, cm.decoder().config, cm.decoder().state_dict(), cm.small_tokenizer())
    config = transformers.BitsAndBytesConfig(**options)
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(source, quantization_config=config, dtype=torch.float32)
    theirs.save_pretrained(folder)
    (source / "tokenizer.json").rename(folder / "tokenizer.json")
    model, _ = quantized.load(folder)
    stored = layers_of(folder)
    assert stored.keys() == cm.packed(model).keys()
    for name, q in cm.packed(model).items():
        if "load_in_8bit" in options:
            assert ulps(decoded_int8(stored[name]), q.dequantize()) <= 2
        else:
            assert torch.equal(decoded(stored[name]), q.dequantize())
    if "load_in_4bit" in options:
        with torch.no_grad():
            difference = theirs(cm.prompt()).logits - model(cm.prompt())
        assert difference.abs().max() < 1e-4
    # The twin: one byte of codes.
    weight = cm.stored_tensor(folder, "weight")
    weight.view(torch.uint8)[5, 0] ^= 0x10
    cm.change_tensors(folder, weight=weight)
    changed = cm.packed(quantized.load(folder)[0])[LAYER].dequantize()
    assert (changed != cm.packed(model)[LAYER].dequantize()).sum() == 1
    # And it can be written again.
    cm.saved(tmp_path / "again", model, "bitsandbytes")
    again, _ = quantized.load(tmp_path / "again")
    assert torch.equal(again(cm.prompt()), model(cm.prompt()))


@pytest.mark.parametrize(
    ("format", "shape", "message"),
    [
        (NF4, (4, 96), "its blocks of 64 would cross the ends of rows of 96"),
        (FP4, (4, 48), "its blocks of 32 would cross the ends of rows of 48"),
        (
            Scheme(grid.NF4, 48, fit.absmax, scale=torch.float32),
            (4, 96),
            "it has nf4, fp4 in blocks of 32 to 4096, and int8-row",
        ),
    ],
)
def test_refusal(format, shape, message):
    assert bnb.refusal(format, shape) == message


@pytest.mark.parametrize("name", ["int4-g64", "int8-g64", "int8-tensor", "mxfp4", "nvfp4", "q4_0"])
def test_formats_of_others_are_refused(name):
    assert bnb.refusal(qlib.format(name), (256, 256)).startswith("it has nf4, fp4")
    assert bnb.refusal(NF4, (256, 256)) is None


def test_one_width_for_all(tmp_path):
    model = cm.with_formats(cm.decoder(), [NF4, INT8])
    four, eight = list(cm.packed(model))[-2:]
    message = f"bitsandbytes holds layers of one width: {four} has 4 bits and {eight} has 8"
    with pytest.raises(ValueError, match=re.escape(message)):
        cm.saved(tmp_path, model, "bitsandbytes")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    return cm.saved(tmp_path, cm.with_formats(cm.decoder(), [NF4_DOUBLE]), "bitsandbytes")


def state_of(folder, **changes):
    """The JSON with changes, as a tensor; None removes an entry."""
    data = json.loads(bytes(cm.stored_tensor(folder, f"{STATE}nf4").tolist())) | changes
    data = {name: value for name, value in data.items() if value is not None}
    return torch.tensor(list(json.dumps(data).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quant_type", "fp4", "is 'fp4'; need one of 'nf4'"),
        ("quant_type", None, "is None; need one of 'nf4'"),
        ("shape", [64, 32], "is [64, 32]; need one of [64, 64]"),
        ("shape", [64, 64, 1], None),
        ("blocksize", 48, None),
        ("blocksize", True, None),
        ("blocksize", 10**30, None),
        ("blocksize", 128, "is 128, which does not divide 64 inputs"),
        ("dtype", "int8", "is 'int8'; need one of 'float16', 'bfloat16', 'float32'"),
        ("nested_dtype", "bfloat16", "is 'bfloat16'; need one of 'float32'"),
        ("nested_blocksize", 0, None),
        ("nested_offset", "1", "is '1'; need a finite float32"),
        ("nested_offset", float("nan"), "is nan; need a finite float32"),
        ("nested_offset", 1e300, "is 1e+300; need a finite float32"),
        ("nested_offset", None, "is None; need a finite float32"),
    ],
)
def test_quant_state_that_lies(folder, field, value, message):
    cm.change_tensors(
        folder, **{STATE.replace(".", "__", 1) + "nf4": state_of(folder, **{field: value})}
    )
    if message is None:
        with pytest.raises(FormatError, match=rf"nf4\.{field}': is "):
            quantized.load(folder)
    else:
        cm.refused(folder, f": field '{LAYER}.{STATE}nf4.{field}': {message}")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{" * 60000, "is not valid JSON"),
        (b"[" * 60000, "is not valid JSON"),
        (b"\xff\xfe{", "is not valid JSON"),
        (b"[]", "is a list; need an object"),
        (b" " * 70000, "has shape [70000]; need 1 to 65536 bytes"),
    ],
)
def test_quant_state_that_is_no_object(folder, data, message):
    tensor = torch.tensor(list(data), dtype=torch.uint8)
    cm.change_tensors(folder, **{STATE.replace(".", "__", 1) + "nf4": tensor})
    cm.refused(folder, f": field '{LAYER}.{STATE}nf4': {message}")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("weight.absmax", None, "this tensor is missing"),
        ("weight.quant_map", None, "this tensor is missing"),
        ("weight.nested_quant_map", None, "this tensor is missing"),
        ("weight.quant_map", lambda t: -t, "is not the table of nf4"),
        ("weight.quant_map", lambda t: t * torch.nan, "is not the table of nf4"),
        ("weight.nested_quant_map", lambda t: t * 2, "is not the signed dynamic map"),
        (
            "weight.absmax",
            lambda t: t.float(),
            "is F32 [64]; a weight [64, 64] needs U8 [64]",
        ),
        (
            "weight",
            lambda t: t[:-1],
            "is U8 [2047, 1]; a weight [64, 64] needs U8 [2048, 1]",
        ),
    ],
)
def test_tensors_that_lie(folder, part, change, message):
    tensor = change and change(cm.stored_tensor(folder, part))
    cm.change_tensors(folder, **{part.replace(".", "__", 1): tensor})
    cm.refused(folder, f": field '{LAYER}.{part}': {message}")


NASTY = (None, True, 0, -1, 63, 2**70, 0.5, float("inf"), "", "x" * 1000, [], [[]], {}, [64, -64])


@pytest.mark.parametrize("field", ["quant_type", "blocksize", "dtype", "shape"])
@pytest.mark.parametrize("double", [False, True])
def test_no_quant_state_does_anything_else(tmp_path, field, double):
    q = (NF4_DOUBLE if double else NF4).quantize(cm.weights(0, (4, 128)))
    stored = bnb.store(q)
    good = json.loads(bytes(stored[f"{STATE}nf4"].tolist()))
    for name in (field, f"nested_{field}") if double else (field,):
        for value in NASTY if name in good else ():
            data = json.dumps(good | {name: value}).encode()
            stored[f"{STATE}nf4"] = torch.tensor(list(data), dtype=torch.uint8)
            tensors = {f"a.{part}": tensor for part, tensor in stored.items()}
            save_file(tensors, tmp_path / "model.safetensors")
            with pytest.raises(FormatError) as caught:
                read(tmp_path, q.shape, {"load_in_4bit": True})
            assert str(caught.value).startswith(f"{tmp_path}: field 'a.{STATE}nf4.{name}': is ")
            assert len(str(caught.value)) < 400


def test_other_lies(folder):
    scale = cm.stored_tensor(folder, "weight.nested_absmax")
    cm.change_tensors(folder, weight__nested_absmax=scale * torch.nan)
    cm.refused(folder, f": field '{LAYER}.scale': holds NaN or infinite values")
    cm.change_tensors(folder, weight__nested_absmax=scale, weight__extra=torch.zeros(1))
    message = "is not part of a llama decoder of this config"
    cm.refused(folder, f": field '{LAYER}.weight.extra': {message}")
    cm.change_tensors(folder, weight__extra=None, **{"weight__quant_state.bitsandbytes__nf4": None})
    need = f"{STATE}nf4 or {STATE}fp4"
    message = f"has 0 tensors; need one, {need}"
    cm.refused(folder, f": field '{LAYER}.weight.quant_state': {message}")


def test_settings_that_lie(folder):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization_config"]["load_in_4bit"] = False
    path.write_text(json.dumps(raw))
    field = "quantization_config.load_in_4bit"
    cm.refused(folder, f"/config.json: field '{field}': is False; need one of True")
    raw["quantization_config"] = {"quant_method": 4}
    path.write_text(json.dumps(raw))
    message = "need an object that names a quant_method"
    cm.refused(folder, f"/config.json: field 'quantization_config': {message}")


def test_int8_files_that_lie(tmp_path):
    folder = cm.saved(tmp_path, cm.with_formats(cm.decoder(), [INT8]), "bitsandbytes")
    cm.change_tensors(folder, weight_format=torch.tensor(1, dtype=torch.uint8))
    message = "is of another order than rows; need 0"
    cm.refused(folder, f": field '{LAYER}.weight_format': {message}")
    scb = cm.stored_tensor(folder, "SCB")
    cm.change_tensors(folder, weight_format=None, SCB=scb * torch.inf)
    cm.refused(folder, f": field '{LAYER}.scale': holds NaN or infinite values")
    cm.change_tensors(folder, SCB=scb.half())
    cm.refused(folder, f": field '{LAYER}.SCB': is F16 [64]; a weight [64, 64] needs F32 [64]")
    cm.change_tensors(folder, SCB=None)
    cm.refused(folder, f": field '{LAYER}.SCB': this tensor is missing")


def test_values_that_do_not_fit_name_their_layer(tmp_path):
    scheme = Scheme(grid.int_grid(8), "row", fit.absmax, torch.float32)
    model = qlib.load("bpw-small")[0]
    qlib.quantize_model(model, scheme, progress=False)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: int8, block row"):
        qlib.save(model, tmp_path / "x", container="bitsandbytes")
    assert not (tmp_path / "x").exists()
