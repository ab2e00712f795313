"""AWQ files: written by definition and by other tools, round trips, and folders that lie."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from packed_models import (
    LAYER,
    change_settings,
    change_tensors,
    packed,
    packed_decoder,
    refusal,
    same_parts,
    saved,
    tokenizer,
    weight,
)
from safetensors.torch import load_file, save_file

import qlib
from qlib.files import awq, quantized
from qlib.linear import QLinear
from qlib.qtensor import QTensor
from qlib.reordered import Reordered

NAMES = [f"int4-{block}{kind}" for block in ("g16", "g32", "row") for kind in ("", "-asym")]


# -- the definition -----------------------------------------------------------------------------

# In nibbles from the lowest up, the outputs that a word holds, and where to look for each output.
ORDER, PLACES = (0, 2, 4, 6, 1, 3, 5, 7), (0, 4, 1, 5, 2, 6, 3, 7)


def numbers(words: np.ndarray) -> np.ndarray:
    """The number of each output: [rows, out] of int32 [rows, out / 8]."""
    places = 4 * np.array(PLACES, dtype=np.uint32)
    return (words.view(np.uint32)[..., None] >> places & 15).reshape(len(words), -1).astype(int)


def decoded(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weight [out, in] by definition, float32."""
    codes, zeros = numbers(tensors["qweight"].numpy()), numbers(tensors["qzeros"].numpy())
    repeats = len(codes) // len(zeros)
    scales = tensors["scales"].float().numpy()
    values = (codes - zeros.repeat(repeats, 0)) * scales.repeat(repeats, 0)
    return torch.from_numpy(values).float().T


@pytest.mark.parametrize("name", NAMES)
def test_stored_as_defined(name):
    q = qlib.quantize(weight(40, 96), name)
    tensors = awq.store(q)
    assert torch.equal(decoded(tensors), q.dequantize())
    for part in ("qweight", "qzeros"):
        changed = tensors[part].clone()
        changed[0, 0] ^= 1
        assert not torch.equal(decoded(tensors | {part: changed}), q.dequantize())


def test_order_of_a_word():
    words = awq.interleave(torch.arange(8, dtype=torch.uint8).view(1, 8))
    assert [int(words) >> 4 * i & 15 for i in range(8)] == list(ORDER)
    assert awq.deinterleave(words).tolist() == [list(range(8))]


def test_symmetric_zero_points():
    tensors = awq.store(qlib.quantize(weight(16, 64), "int4-g32"))
    assert (tensors["qzeros"].numpy().view(np.uint32) == 0x88888888).all()


# A weight [16, 64] in groups of 32 with zero points, which AutoAWQ's unpacking decodes.
QWEIGHT = bytes.fromhex(
    "b9b9f0f046e10fa8ababd1d154d12e7b0c0ca4a4f3d15b3d8e8e878771c3782d9f9f68686085972eadad3a3a"
    "5265c50facac1e1e5356e11dbcbc1e1e4327e14ad9d98e8e26087169e5e58e8e1a177177e4e48e8e1b3671a3"
    "e3e38b8b1c3674d1f1f188880e5577e1f0f086860f9379e1e2e284841db27be1d4d481812bc17ee3c6c6e0e0"
    "39d01fb7b8b8d1d147f02e889b9bd2d264e12d7a9d9db3b362c24c5d9d9d767662b3891f8e8e5a5a71a4a50e"
    "9f9f4b4b6066b41dadad2c2c5237d32dcaca0e0e3527f12cc9c91f1f3627e068d7d73d3d280fc296f3f34c4c"
    "0c16b3a4f1f16b6b0e4594c2f1f199990e6466e0f2f2c5c50d733af1f1f1d3d30ea12cd3a1a1d3d35ef12cd3"
    "7373f1f18cf20ec56464e0e09bf11f994545c2c2baf13d6b1616a4a4e9f35b4c0f0f9696f0d7693d27276868"
    "d8c9971f27272c2cd8cad30e37372d2dc8add22c66661d1d999fe24ba4a40e0e5b8ef15ab3b31f1f4c9de076"
    "c2c25d5d3d9da2b3e1e17a7a1e9b85d2f0f088880fb877d1d0d0b7b72fc648e0c1c1e3e33ed41c81b2b2e1e1"
    "4de21e849393e1e16cf01e865555e1e1aaf11e883636d1d1c9e32e8b3636a3a3c9e45c8e17177777e8e5888e"
    "08086969f7d9968e27274a4ad8bcb51e56561d1da9ace21e65650f0f9aadf03a85852e2e7a9fd168c3c32d2d"
    "3c8ed287d1d13d3d2e0cc2a4d1d17b7b2eab84d1e1e1a8a81eb957f0"
)
QZEROS = bytes.fromhex("c8c8888837847788848488887bc87788")
SCALES = bytes.fromhex(
    "89316531cd355831892d652dcd31582d89316531cd355831313568317e315d31313568317e315d313131682d"
    "7e2d5d2d313568317e315d3189316531cd355831"
)
FIRST = [0.1729736328125, 0.51904296875, 0.69189453125, 1.0380859375]


def golden() -> QTensor:
    """The golden weight, out of its tensors by definition and into our format."""
    codes = torch.from_numpy(numbers(np.frombuffer(QWEIGHT, np.int32).reshape(64, 2)))
    zeros = torch.from_numpy(numbers(np.frombuffer(QZEROS, np.int32).reshape(2, 2)))
    scales = torch.from_numpy(np.frombuffer(SCALES, np.float16).reshape(2, 16).copy())
    format = qlib.format("int4-g32-asym")
    parts = {
        "codes": format.pack(codes.T.to(torch.uint8), (16, 64)),
        "scale": scales.T.contiguous(),
    }
    parts["zero_point"] = qlib.pack.pack(zeros.T.to(torch.uint8), 4)
    return QTensor(format, (16, 64), parts)


def test_golden():
    q = golden()
    # Its judge rounds the products to float16.
    assert q.dequantize()[0, :4].half().tolist() == FIRST
    assert q.dequantize()[12, 30:34].half().tolist() == [
        -0.324462890625, -0.9736328125, -1.2109375, -1.0380859375
    ]  # fmt: skip
    tensors = awq.store(q)
    assert tensors["qweight"].numpy().tobytes() == QWEIGHT
    assert tensors["qzeros"].numpy().tobytes() == QZEROS
    assert tensors["scales"].numpy().tobytes() == SCALES
    assert tensors.keys() == {"qweight", "qzeros", "scales"}
    q.parts["codes"][3, 3] ^= 16
    assert awq.store(q)["qweight"].numpy().tobytes() != QWEIGHT


# -- another reader -----------------------------------------------------------------------------


def by_mlx(folder, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of mlx-lm, which turns zero points into biases, -zero * scale, as it loads."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(mx.array(tokens.tolist()))))


@pytest.mark.parametrize("name", ["int4-g32", "int4-g32-asym"])
def test_mlx_reads_it(tmp_path, name):
    model = saved(tmp_path, "awq", name)
    tokens = torch.arange(9).view(1, 9)
    ours = model(tokens)
    # Its biases are float16, so they cost some of the precision of the scales.
    close = 5e-3 * ours.abs().max()
    assert (by_mlx(tmp_path, tokens) - ours).abs().max() < close
    change_tensors(tmp_path, "qweight", lambda t: t ^ 8)
    assert (by_mlx(tmp_path, tokens) - ours).abs().max() > 4 * close


# -- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path, name):
    model = saved(tmp_path, "awq", name)
    loaded, again = quantized.load(tmp_path)
    assert again.encode("abc") == tokenizer().encode("abc")
    before, after = packed(model), packed(loaded)
    assert before.keys() == after.keys()
    assert all(same_parts(before[n], after[n]) for n in before)
    assert all(torch.equal(before[n].dequantize(), after[n].dequantize()) for n in before)
    assert all(before[n].format == after[n].format for n in before)
    tokens = torch.arange(9).view(1, 9)
    assert torch.equal(model(tokens), loaded(tokens))
    change_tensors(tmp_path, "qweight", lambda t: t ^ 1)
    assert not same_parts(before[LAYER], packed(quantized.load(tmp_path)[0])[LAYER])


def test_symmetric_and_asymmetric_layers_share_a_file(tmp_path):
    """Every layer has zero points in the file, so these two are one format there."""
    model = packed_decoder(lambda w: qlib.quantize(w, f"int4-g32{'-asym' * (w.shape[1] == 96)}"))
    quantized.save(tmp_path, model, tokenizer(), container="awq")
    before, after = packed(model), packed(quantized.load(tmp_path)[0])
    assert all(before[n].format == after[n].format for n in before)
    assert len({q.format for q in after.values()}) == 2
    change_tensors(tmp_path, "qzeros", lambda t: torch.full_like(t, -0x77777778))
    assert packed(quantized.load(tmp_path)[0])[LAYER].format == qlib.format("int4-g32")


def test_dense_layers(tmp_path):
    model = packed_decoder(lambda w: qlib.quantize(w, "int4-g32"), dense=(LAYER,))
    quantized.save(tmp_path, model, tokenizer(), container="awq")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["modules_to_not_convert"] == [LAYER]
    loaded, _ = quantized.load(tmp_path)
    assert not isinstance(loaded.get_submodule(LAYER), QLinear)
    assert torch.equal(loaded.get_submodule(LAYER).weight, model.get_submodule(LAYER).weight)


def test_settings(tmp_path):
    saved(tmp_path, "awq", "int4-row-asym")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "awq", "bits": 4, "group_size": -1, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    }  # fmt: skip


def test_other_names_of_the_settings(tmp_path):
    model = saved(tmp_path, "awq", "int4-g32-asym")
    change_settings(tmp_path, bits=None, group_size=None, w_bit=4, q_group_size=32, version="GEMM")
    assert same_parts(packed(model)[LAYER], packed(quantized.load(tmp_path)[0])[LAYER])
    change_settings(tmp_path, w_bit=3)
    expected = "/config.json: field 'quantization_config.w_bit': is 3; need one of 4"
    assert refusal(tmp_path) == expected
    change_settings(tmp_path, w_bit=4, version=None, format="gemm")
    assert same_parts(packed(model)[LAYER], packed(quantized.load(tmp_path)[0])[LAYER])
    change_settings(tmp_path, format="gemv_fast")
    assert "field 'quantization_config.format': is 'gemv_fast'; need" in refusal(tmp_path)


# -- what cannot be written ---------------------------------------------------------------------

KINDS = "it holds int4, symmetric or with integer zero points"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("int4-g32", (64, 96), None),
        ("int4-row-asym", (8, 7), None),
        ("int3-g32", (64, 96), KINDS),
        ("int8-g32-asym", (64, 96), KINDS),
        ("int4-g32-offset", (64, 96), KINDS),
        ("nf4", (64, 96), KINDS),
        ("q4_0", (64, 96), KINDS),
        ("int4-tensor", (64, 96), "its scales belong to rows or groups, not to a whole weight"),
        (
            "int4-g32",
            (60, 96),
            "60 outputs of 4 bits do not fill int32 words; need a multiple of 8",
        ),
        ("int4-g40", (64, 96), "96 inputs are no multiple of the group 40"),
    ],
)
def test_refusals(name, shape, message):
    assert awq.refusal(qlib.format(name), shape) == message


def test_reordered_columns_are_refused():
    assert awq.refusal(Reordered(qlib.format("int4-g32")), (64, 96)) == KINDS


def test_layer_is_named_before_anything_is_written(tmp_path):
    model = packed_decoder(lambda w: qlib.quantize(w, "int4-g64"))
    message = f"{LAYER} [64, 96]: awq cannot hold int4, block 64, absmax, scale float16: "
    message += "96 inputs are no multiple of the group 64; it fits gptq"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        quantized.save(tmp_path / "new", model, tokenizer(), container="awq")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (
            {"a": qlib.format("int4-g32"), "b": qlib.format("int4-g16-asym")},
            "awq has one format for all layers: a has group_size 32, b has group_size 16; "
            "quantize them alike, or use container='compressed-tensors'",
        ),
        (
            {"a": qlib.format("int4-g32"), "lm_head": qlib.format("int4-g32")},
            "awq cannot quantize lm_head: leave it dense, or use container='compressed-tensors'",
        ),
        ({"a": None}, "awq: no layer is quantized; save a dense model with qlib.save"),
    ],
)
def test_models_that_do_not_fit(formats, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        awq.describe(formats)


# -- folders that lie ---------------------------------------------------------------------------

SETTINGS = {
    "bits": [3, 5, 0, "4", 4.0, True, [4], {"bits": 4}, 2**70],
    "group_size": [0, -2, 2**70, "128", 32.0, True, 16, 64, 96, {"a": {"b": [1]}}],
    "zero_point": [False, 1, "true", []],
    "version": ["gemv", "gemv_fast", "llm-awq", "marlin", 1, ["gemm"], {"gemm": 1}],
    "format": ["gemv", 1, ["gemm"]],
    "quant_method": ["awqq", 3, ["awq"], {}],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    saved(folder, "awq", "int4-g32-asym")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in SETTINGS.items() for v in vs])
def test_settings_that_lie(folder, name, value):
    change_settings(folder, **{name: value})
    message = refusal(folder)
    # A group of another size is well-formed, and first contradicts the tensors.
    sized = name == "group_size" and value in (16, 64, 96)
    assert message.startswith(f": field '{LAYER[:14]}" if sized else "/config.json: field")
    assert sized or name in message


@pytest.mark.parametrize("name", ["bits", "group_size"])
def test_settings_that_are_missing(folder, name):
    change_settings(folder, **{name: None})
    assert refusal(folder).startswith(f"/config.json: field 'quantization_config.{name}': is None")


TENSORS = {
    "qweight": [None, lambda t: t.float(), lambda t: t.T, lambda t: t[:-1], lambda t: t.long()],
    "qzeros": [None, lambda t: t.short(), lambda t: t.T, lambda t: t[:, :-1], lambda t: t[None]],
    "scales": [
        None,
        lambda t: t.T,
        lambda t: t.double(),
        lambda t: t.int(),
        lambda t: t * torch.nan,
        lambda t: t + torch.inf,
    ],
}


@pytest.mark.parametrize(("part", "change"), [(p, c) for p, cs in TENSORS.items() for c in cs])
def test_tensors_that_lie(folder, part, change):
    change_tensors(folder, part, change or (lambda t: None))
    # Without codes it counts as dense, and what is missing is its weight.
    missing = part == "qweight" and change is None
    field = {"scales": "scale"}.get(part, part)
    assert f"field '{LAYER}.{'weight' if missing else field}" in refusal(folder)


def test_tensors_that_belong_to_nothing(folder):
    path = folder / "model.safetensors"
    save_file(load_file(path) | {f"{LAYER}.g_idx": torch.zeros(96, dtype=torch.int32)}, path)
    message = f": field '{LAYER}.g_idx': is not part of a llama decoder of this config"
    assert refusal(folder) == message


def test_messages(folder):
    """What a user reads, word for word."""
    settings = "/config.json: field 'quantization_config."
    for values, message in (
        ({"bits": 5}, "bits': is 5; need one of 4"),
        ({"group_size": -2}, "group_size': is -2; need an integer from -1 to 1048576"),
        ({"group_size": 0}, "group_size': is 0; need a positive integer, or -1 for whole rows"),
        ({"zero_point": False}, "zero_point': is False; need one of True"),
        ({"version": "gemv"}, "version': is 'gemv'; need one of 'gemm', 'GEMM'"),
    ):
        before = (folder / "config.json").read_text()
        change_settings(folder, **values)
        assert refusal(folder) == settings + message
        (folder / "config.json").write_text(before)
    change_tensors(folder, "qzeros", lambda t: t[:, :7])
    message = "qzeros': is I32 [3, 7]; a weight [64, 96] needs I32 [3, 8]"
    assert refusal(folder) == f": field '{LAYER}.{message}"


def test_random_damage(folder):
    """Bits flipped anywhere in the tensors: FormatError, or a model without NaN."""
    path = folder / "model.safetensors"
    raw, rng = path.read_bytes(), np.random.default_rng(0)
    start = 8 + int.from_bytes(raw[:8], "little")
    refused = 0
    for _ in range(40):
        damaged = bytearray(raw)
        for at in rng.integers(start, len(raw), 40):
            damaged[at] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            loaded = quantized.load(folder)[0]
        except qlib.FormatError:
            refused += 1
            continue
        assert all(math.isfinite(q.dequantize().sum().item()) for q in packed(loaded).values())
    assert refused > 0
