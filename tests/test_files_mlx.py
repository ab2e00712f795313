"""MLX's container: mlx and mlx_lm as judges, and files that lie."""

from __future__ import annotations

import contextlib
import io
import json
import re

import container_models as cm
import numpy as np
import pytest
import torch
from container_models import LAYER
from safetensors.torch import load_file, save_file

import qlib
from qlib import fit, grid
from qlib.files import hf, mlx, quantized
from qlib.presets import MXFP4, MXFP8_E4M3
from qlib.scheme import Scheme

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MODES = {"mxfp4": MXFP4, "mxfp8": MXFP8_E4M3, "nvfp4": mlx.NVFP4}
all_bits = pytest.mark.parametrize("bits", mlx.BITS)
all_groups = pytest.mark.parametrize("group", mlx.GROUPS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def core():
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    return mx


def affine(bits, group, dtype):
    levels = grid.int_grid(bits, signed=False)
    return Scheme(levels, group, fit.zero_anchored, dtype, offset=dtype)


def decoded(path, name, **settings):
    """What MLX decodes, in float32, from the tensors of a layer in a file."""
    mx = core()
    stored = mx.load(str(path))
    scales, biases = stored[f"{name}.scales"], stored.get(f"{name}.biases")
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    weight = mx.dequantize(stored[f"{name}.weight"], scales, biases, **settings)
    return torch.from_numpy(np.array(weight.astype(mx.float32)))


def settings_of(format):
    return mlx.describe({"a": format})["quantization"]


def through_file(folder, q):
    """One weight, stored in a file and read again."""
    tensors = {f"a.{part}": tensor for part, tensor in mlx.store(q).items()}
    save_file(tensors, folder / "model.safetensors")
    return read(folder, q.shape, settings_of(q.format))


def read(folder, shape, settings):
    stored = quantized.Stored(hf.Tensors(folder, quantized.DTYPES), "a", shape)
    q = mlx.read(stored, quantized.Settings(folder, "quantization", settings))
    assert stored.taken == set(stored.tensors.shapes)
    return q


def flip(folder):
    """Change one bit of the last code."""
    tensors = load_file(folder / "model.safetensors")
    tensors["a.weight"].view(torch.uint8)[-1, -1] ^= 0x40
    save_file(tensors, folder / "model.safetensors")


@all_bits
@all_groups
@all_dtypes
def test_mlx_decodes_our_values(tmp_path, bits, group, dtype):
    format = affine(bits, group, dtype)
    q = format.quantize(cm.weights(bits, (6, 384)))
    back = through_file(tmp_path, q)
    assert back.format == format
    assert all(torch.equal(back.parts[part], q.parts[part]) for part in q.parts)
    path, settings = tmp_path / "model.safetensors", {"group_size": group, "bits": bits}
    assert torch.equal(decoded(path, "a", **settings), q.dequantize())
    flip(tmp_path)
    assert (decoded(path, "a", **settings) != q.dequantize()).sum() == 1


@all_bits
@all_dtypes
def test_we_read_what_mlx_quantizes(tmp_path, bits, dtype):
    mx = core()
    name = str(dtype).removeprefix("torch.")
    w = mx.array(cm.weights(bits, (5, 256)).numpy()).astype(getattr(mx, name))
    found = dict(zip(("weight", "scales", "biases"), mx.quantize(w, group_size=64, bits=bits)))
    path = str(tmp_path / "model.safetensors")
    mx.save_safetensors(path, {f"a.{part}": array for part, array in found.items()})
    q = read(tmp_path, (5, 256), {"group_size": 64, "bits": bits})
    assert q.format == affine(bits, 64, dtype)
    assert torch.equal(q.dequantize(), decoded(path, "a", group_size=64, bits=bits))
    flip(tmp_path)
    assert (q.dequantize() != decoded(path, "a", group_size=64, bits=bits)).sum() == 1


def test_names_of_the_formats():
    assert affine(4, 64, torch.float16) == qlib.format("mlx4")
    assert affine(3, 32, torch.float16) == qlib.format("mlx3-g32")
    assert mlx.refusal(qlib.format("int4-g64-offset"), (4, 64)) is None


@pytest.mark.parametrize("mode", MODES)
def test_modes_both_ways(tmp_path, mode):
    mx = core()
    path = tmp_path / "model.safetensors"
    w = cm.weights(2, (6, 192))
    q = MODES[mode].quantize(w)
    back = through_file(tmp_path, q)
    assert back.format == MODES[mode]
    assert all(torch.equal(back.parts[part], q.parts[part]) for part in q.parts)
    assert torch.equal(decoded(path, "a", mode=mode), q.dequantize())
    flip(tmp_path)
    assert (decoded(path, "a", mode=mode) != q.dequantize()).sum() == 1
    found = dict(zip(("a.weight", "a.scales"), mx.quantize(mx.array(w.numpy()), mode=mode)))
    mx.save_safetensors(str(path), found)
    theirs = read(tmp_path, (6, 192), settings_of(MODES[mode]))
    assert torch.equal(theirs.dequantize(), decoded(path, "a", mode=mode))


@all_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_symmetric_integers_keep_their_values(tmp_path, bits, dtype):
    for group in mlx.GROUPS:
        format = Scheme(grid.int_grid(bits), group, fit.absmax, scale=dtype)
        q = format.quantize(cm.weights(bits, (6, 384)))
        back = through_file(tmp_path, q)
        assert back.format == affine(bits, group, dtype)
        assert torch.equal(back.dequantize(), q.dequantize())
        path = tmp_path / "model.safetensors"
        assert torch.equal(decoded(path, "a", group_size=group, bits=bits), q.dequantize())


def test_a_bias_that_overflows():
    q = qlib.quantize(torch.full((2, 64), 2.0**16), "int8-g64")
    message = "int8, block 64, absmax, scale float16 [2, 64]: 128 times a scale of 516 overflows"
    with pytest.raises(ValueError, match=f"^{re.escape(message)} float16; store scales as bfloat"):
        mlx.store(q)


def test_bytes_of_one_group():
    """Numbers 0.21 apart, as mlx 0.32.4 stores them: a negative scale, the larger end exact."""
    ramp = (0.21 * (torch.arange(32, dtype=torch.float64) - 13)).float().view(1, 32)
    stored = mlx.store(affine(4, 32, torch.float32).quantize(ramp))
    found = {
        part: tensor.view(torch.uint8).numpy().tobytes().hex() for part, tensor in stored.items()
    }
    assert found == {
        "weight": "ffefdeccbcaa9a887867564434221101", "scales": "3d0ad7be", "biases": "85eb7140",
    }  # fmt: skip


def mlx_logits(folder):
    mx = core()
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    logits = model(mx.array(cm.prompt().numpy())).astype(mx.float32)
    return torch.from_numpy(np.array(logits))


MIXED = [affine(4, 64, torch.float16), MXFP4, mlx.NVFP4, qlib.format("int6-g32"), None]


@pytest.mark.parametrize("tied", [True, False])
def test_mlx_lm_computes_the_same_logits(tmp_path, tied):
    model = cm.with_formats(cm.decoder(tied), MIXED)
    cm.saved(tmp_path, model, "mlx")
    ours = model(cm.prompt())
    back, _ = quantized.load(tmp_path)
    for name, q in cm.packed(model).items():
        assert torch.equal(back.get_submodule(name).weight.dequantize(), q.dequantize())
    assert (back(cm.prompt()) - ours).abs().max() < 1e-4
    assert (mlx_logits(tmp_path) - ours).abs().max() < 1e-3
    # The twin: one code.
    weight = cm.stored_tensor(tmp_path, "weight")
    weight.view(torch.uint8)[3, 3] ^= 0x80
    cm.change_tensors(tmp_path, weight=weight)
    assert (mlx_logits(tmp_path) - ours).abs().max() > 3e-3
    assert (mlx_logits(tmp_path) - quantized.load(tmp_path)[0](cm.prompt())).abs().max() < 1e-3


def test_settings_of_mixed_formats():
    formats = {"a": MXFP4, "b": affine(6, 32, torch.float16), "c": None, "d": MXFP4}
    found = mlx.describe(formats)
    assert found["quantization"] == found["quantization_config"]
    assert found["quantization"] == {
        "group_size": 32, "bits": 4, "mode": "mxfp4",
        "b": {"group_size": 32, "bits": 6, "mode": "affine"}, "c": False,
    }  # fmt: skip


CONVERSIONS = [
    {"group_size": 64, "bits": 4},
    {"group_size": 32, "bits": 3},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]


def converted(source, folder, tied, settings):
    """A dense checkpoint of ours, quantized and saved by mlx_lm; its layers, decoded by MLX."""
    mx = core()
    from mlx.utils import tree_flatten
    from mlx_lm.utils import load_model, quantize_model, save_config, save_model

    dense = cm.decoder(tied)
    hf.save_checkpoint(source, dense.config, dense.state_dict(), cm.small_tokenizer())
    model, config = load_model(source)
    sizes = {"group_size": None, "bits": None, **settings}

    def six_bits_below(path, module):
        wide = "down_proj" in path and settings.get("mode") is None
        return {"group_size": 32, "bits": 6, "mode": "affine"} if wide else True

    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, **sizes, quant_predicate=six_bits_below)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    (source / "tokenizer.json").rename(folder / "tokenizer.json")
    arrays = dict(tree_flatten(model.parameters()))
    names = [key.removesuffix(".scales") for key in arrays if key.endswith(".scales")]
    given = json.loads((folder / "config.json").read_text())["quantization"]
    assert mx.default_device() == mx.cpu
    return {
        name: decoded(folder / "model.safetensors", name, **given.get(name, settings))
        for name in names
    }


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("settings", CONVERSIONS, ids=["int4", "int3", "mxfp8", "nvfp4"])
def test_we_read_what_mlx_lm_converts(tmp_path, tied, settings):
    folder = tmp_path / "converted"
    theirs = converted(tmp_path / "source", folder, tied, settings)
    model, _ = quantized.load(folder)
    assert theirs.keys() == {"model.embed_tokens", *cm.packed(model)}
    assert torch.equal(model.model.embed_tokens.weight, theirs["model.embed_tokens"])
    for name, q in cm.packed(model).items():
        assert torch.equal(q.dequantize(), theirs[name])
    assert (mlx_logits(folder) - model(cm.prompt())).abs().max() < 1e-3
    # The twin: one code.
    weight = cm.stored_tensor(folder, "weight")
    weight.view(torch.uint8)[5, 5] ^= 0x80
    cm.change_tensors(folder, weight=weight)
    changed = cm.packed(quantized.load(folder)[0])[LAYER].dequantize()
    assert (changed != theirs[LAYER]).sum() == 1
    cm.saved(tmp_path / "again", model, "mlx")
    assert torch.equal(quantized.load(tmp_path / "again")[0](cm.prompt()), model(cm.prompt()))


KINDS = (
    "it has integers (scale of 16 bits) or scale and offset of one dtype in 2, 3, 4, 5, 6, 8 bits "
    "by 32, 64, 128; MXFP4, MXFP8, NVFP4"
)


@pytest.mark.parametrize(
    ("format", "message"),
    [
        ("nvfp4", "its nvfp4 has no global scale; quantize by qlib.files.mlx.NVFP4"),
        ("int4-g64", "96 inputs are no multiple of the group 64"),
        ("int7-g32", KINDS),
        ("int4-g16", KINDS),
        ("int4-row", KINDS),
        ("int1-g32", KINDS),
        ("int4-g32-asym", KINDS),
        ("nf4", KINDS),
        ("mxfp8_e5m2", KINDS),
        ("q4_0", KINDS),
        (Scheme(grid.int_grid(4), 32, fit.absmax, scale=torch.float32), KINDS),
    ],
)
def test_refusal(format, message):
    format = qlib.format(format) if isinstance(format, str) else format
    assert mlx.refusal(format, (4, 96)) == message
    assert mlx.refusal(MXFP4, (4, 96)) is None


def test_refusal_of_a_model(tmp_path):
    model = cm.with_formats(cm.decoder(), [qlib.format("nf4")])
    name = next(iter(cm.packed(model)))
    message = (
        f"{name} [64, 64]: mlx cannot hold {qlib.format('nf4')}: {KINDS}; it fits bitsandbytes"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        cm.saved(tmp_path, model, "mlx")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path):
    return cm.saved(tmp_path, cm.with_formats(cm.decoder(), [affine(4, 64, torch.float16)]), "mlx")


def change_settings(folder, **changes):
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization"] |= changes
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
    ("change", "field", "message"),
    [
        ({"bits": 7}, "bits", "is 7; need one of 2, 3, 4, 5, 6, 8"),
        ({"bits": "4"}, "bits", "is '4'; need one of 2, 3, 4, 5, 6, 8"),
        ({"bits": 4.0}, "bits", "is 4.0; need one of 2, 3, 4, 5, 6, 8"),
        ({"group_size": 0}, "group_size", "is 0; need one of 32, 64, 128"),
        ({"group_size": 10**40}, "group_size", f"is {10**40}; need one of 32, 64, 128"),
        ({"mode": "fp4"}, "mode", "is 'fp4'; need one of 'affine', 'mxfp4', 'mxfp8', 'nvfp4'"),
        ({"mode": "nvfp4"}, "group_size", "is 64; need one of 16"),
        ({"mode": "mxfp8", "group_size": 32}, "bits", "is 4; need one of 8"),
        ({LAYER: False}, LAYER, "is false, but the layer has scales"),
        ({LAYER: 4}, LAYER, "is a int; need an object"),
        ({LAYER: None}, LAYER, "is a NoneType; need an object"),
        ({LAYER: {"bits": 1}}, f"{LAYER}.bits", "is 1; need one of 2, 3, 4, 5, 6, 8"),
        (
            {LAYER: {"group_size": 128}},
            f"{LAYER}.group_size",
            "is 128, which does not divide 64 inputs",
        ),
    ],
)
def test_settings_that_lie(folder, change, field, message):
    change_settings(folder, **change)
    cm.refused(folder, f"/config.json: field 'quantization.{field}': {message}")


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("biases", None, "this tensor is missing"),
        ("weight", None, "this tensor is missing"),
        ("weight", lambda t: t[:, 1:], "is U32 [64, 7]; a weight [64, 64] needs U32 [64, 8]"),
        (
            "weight",
            lambda t: t.view(torch.int32),
            "is I32 [64, 8]; a weight [64, 64] needs U32 [64, 8]",
        ),
        ("biases", lambda t: t.float(), "is F32 [64, 1]; a weight [64, 64] needs F16 [64, 1]"),
        (
            "scales",
            lambda t: t.view(torch.uint8)[:, :1],
            "is U8 [64, 1]; a weight [64, 64] needs F16 or BF16 or F32 [64, 1]",
        ),
        ("scales", lambda t: t.repeat(1, 2), None),
        ("scales", lambda t: t.repeat(2, 1), None),
        ("extra", lambda t: torch.zeros(1), "is not part of a llama decoder of this config"),
    ],
)
def test_tensors_that_lie(folder, part, change, message):
    tensor = change and change(None if part == "extra" else cm.stored_tensor(folder, part))
    cm.change_tensors(folder, **{part: tensor})
    if message is None:
        with pytest.raises(qlib.errors.FormatError, match=rf"q_proj\.{part}': is F16"):
            quantized.load(folder)
    else:
        cm.refused(folder, f": field '{LAYER}.{part}': {message}")


def test_other_lies(folder):
    change_settings(folder, **{LAYER: {"bits": 8}})
    message = "is U32 [64, 8]; a weight [64, 64] needs U32 [64, 16]"
    cm.refused(folder, f": field '{LAYER}.weight': {message}")
    change_settings(folder, **{LAYER: True})
    good = cm.stored_tensor(folder, "scales")
    for bad in (torch.nan, torch.inf):
        cm.change_tensors(folder, scales=good.index_fill(0, torch.tensor([5]), bad))
        cm.refused(folder, f": field '{LAYER}.scale': holds NaN or infinite values")
    cm.change_tensors(folder, scales=good)
    biases = cm.stored_tensor(folder, "biases")
    cm.change_tensors(folder, biases=biases * torch.nan)
    cm.refused(folder, f": field '{LAYER}.offset': holds NaN or infinite values")
    cm.change_tensors(folder, biases=biases, scales=None)
    message = "is U32 [64, 8]; a weight [64, 64] needs F64 or F32 or F16 or BF16 [64, 64]"
    cm.refused(folder, f": field '{LAYER}.weight': {message}")
