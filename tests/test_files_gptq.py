"""GPTQ files: written by definition and by other tools, round trips, and folders that lie."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from packed_models import (
    CONFIG,
    LAYER,
    UNTIED,
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
from qlib.files import gptq, quantized
from qlib.qtensor import QTensor
from qlib.reordered import Reordered

NAMES = [
    f"int{bits}-{block}{kind}"
    for bits in (2, 3, 4, 8)
    for block in ("g16", "g32", "row")
    for kind in ("", "-asym")
]


def shuffled(name: str):
    """Quantizes a weight in groups of its columns in some order, ascending within a group."""
    format = qlib.format(name)

    def quantize(w: torch.Tensor) -> QTensor:
        order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(3))
        order = torch.cat([part.sort().values for part in order.split(format.block)])
        return Reordered(format).quantize(w, order=order)

    return quantize


# -- the definition -----------------------------------------------------------------------------


def bits_of(words: np.ndarray) -> np.ndarray:
    """Bit after bit of each row of int32, the least significant first."""
    shifts = np.arange(32, dtype=np.uint32)
    return (words.view(np.uint32)[..., None] >> shifts & 1).reshape(len(words), -1)


def numbers(words: np.ndarray, bits: int) -> np.ndarray:
    """The numbers of `bits` bits that follow each other in each row of int32."""
    each = bits_of(words).reshape(len(words), -1, bits)
    return (each * 2 ** np.arange(bits)).sum(-1)


def decoded(tensors: dict[str, torch.Tensor], bits: int, plus: int) -> np.ndarray:
    """The weight [out, in] by definition; `plus` is what stored zero points lack."""
    arrays = {name: t.numpy() for name, t in tensors.items()}
    codes = numbers(np.ascontiguousarray(arrays["qweight"].T), bits).T
    zeros = (numbers(arrays["qzeros"], bits) + plus) % 2**bits
    group = arrays["g_idx"]
    return ((codes - zeros[group]) * arrays["scales"].astype(np.float32)[group]).T


def three_bits(words: list[int]) -> list[int]:
    """The 32 codes of three words, value by value as AutoGPTQ's kernels take them."""
    a, b, c = (w & 0xFFFFFFFF for w in words)
    first = [a >> 3 * i & 7 for i in range(10)] + [a >> 30 | (b & 1) << 2]
    second = [b >> 3 * i + 1 & 7 for i in range(10)] + [b >> 31 | (c & 3) << 1]
    return first + second + [c >> 3 * i + 2 & 7 for i in range(10)]


@pytest.mark.parametrize("reordered", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_stored_as_defined(name, reordered):
    if reordered and name.split("-")[1] == "row":
        name = name.replace("row", "g48")
    w, bits = weight(64, 96), int(name[3])
    q = shuffled(name)(w) if reordered else qlib.quantize(w, name)
    tensors, plus = gptq.store(q), 0 if name.endswith("asym") else 1
    assert torch.equal(torch.from_numpy(decoded(tensors, bits, plus)).float(), q.dequantize())
    for part in ("qweight", "qzeros"):
        changed = tensors[part].clone()
        changed[0, 0] ^= 1
        wrong = decoded(tensors | {part: changed}, bits, plus)
        assert not np.array_equal(wrong, q.dequantize().numpy())


def test_three_bits_are_a_dense_stream():
    codes = torch.arange(32) * 5 % 8
    q = qlib.quantize((codes - 4.0).expand(32, 32).clone(), "int3-row")
    q.parts["codes"].copy_(qlib.pack.pack(codes.expand(32, 32), 3))
    words = gptq.store(q)["qweight"][:, 0].tolist()
    assert three_bits(words) == codes.tolist()
    assert three_bits([words[0], words[1] ^ 1, words[2]]) != codes.tolist()
    # All zero points are 4, stored as 3.
    assert three_bits(gptq.store(q)["qzeros"][0].tolist()) == [3] * 32


@pytest.mark.parametrize(
    ("name", "word"), [("int2", 0x55555555), ("int4", 0x77777777), ("int8", 0x7F7F7F7F)]
)
def test_symmetric_zero_points(name, word):
    zeros = gptq.store(qlib.quantize(weight(32, 64), f"{name}-g32"))["qzeros"]
    assert (zeros == word).all()


# What gptqmodel 7.7 packs of a weight [16, 64] in groups of 32 with zero points, in both versions.
QWEIGHT = bytes.fromhex(
    "b9ecdfcc1074a8eeab80a9badf8a3611b9ecdfcc1074a8eeab80a9badf8a361146132033ef8b5711547f5645"
    "2075c9ee11315576b8ddfeaddecd68257a23024159340142eebe6814edeeffde8888888859340142eebe6814"
    "edeeffde88888888a6cbfebd114197eb12110021777777777866351279131131103395cb76daeeee86dbeddf"
    "1032a6cbbc9989a9debd572486dbeddf1032a6cbbc9989a9debd572479241220efcd5934436676562142a8db"
    "0021437687daefddfdceab368b5701219a371112fecd9b35ccfdffff104396dc9a371112fecd9b35ccfdffff"
    "104396dc65c8eeed013264ca33020000efbc6923776f45138c460231221064a762a9ecdf3154f677132064c8"
    "7a460122fdce9a263154f677132064c87a460122fdce9a26ceab0988ecdf9b3785b9fedd023165d9211173a9"
    "53b9dcefffffdfcccd69340167341200ddfead7863baecdf121075b867341200ddfead7863baecdf121075b8"
    "98cbedff220152879c451320edef8a47fddebd68bc6a23019a9899cb4275dbed2153668713113197bc593301"
    "eeeead672153668713113197bc593301eeeead67deac9978eceece6843a6ccfe11115298241043954186ebee"
    "edffeede8888888867551311daefdd8b5286dced142032a767551311daefdd8b5286dced142032a798aaecee"
    "25102274ad792312ebdfcd58ccfdce9bee8a4701ab9a08ba1163a8fd"
)
QZEROS = bytes.fromhex("888c888c77738488848884887b77888c")
QZEROS_V1 = bytes.fromhex("777b777b66627377737773776a66777b")
SCALES = bytes.fromhex(
    "89316531cd355831892d652dcd31582d89316531cd355831313568317e315d31313568317e315d313131682d"
    "7e2d5d2d313568317e315d3189316531cd355831"
)
FIRST = [0.1729736328125, 0.51904296875, 0.69189453125, 1.0380859375]


def golden() -> QTensor:
    """The golden weight, out of its tensors by definition and into our format."""
    words = np.frombuffer(QWEIGHT, np.int32).reshape(8, 16)
    codes = torch.from_numpy(numbers(np.ascontiguousarray(words.T), 4))
    zeros = torch.from_numpy(numbers(np.frombuffer(QZEROS, np.int32).reshape(2, 2), 4))
    scales = torch.from_numpy(np.frombuffer(SCALES, np.float16).reshape(2, 16).copy())
    format = qlib.format("int4-g32-asym")
    parts = {"codes": format.pack(codes.to(torch.uint8), (16, 64)), "scale": scales.T.contiguous()}
    parts["zero_point"] = qlib.pack.pack(zeros.T.to(torch.uint8), 4)
    return QTensor(format, (16, 64), parts)


def test_golden():
    q = golden()
    # Its judge rounds the products to float16.
    assert q.dequantize()[0, :4].half().tolist() == FIRST
    assert q.dequantize()[12, 30:34].half().tolist() == [
        -0.324462890625, -0.9736328125, -1.2109375, -1.0380859375
    ]  # fmt: skip
    tensors = gptq.store(q)
    assert tensors["qweight"].numpy().tobytes() == QWEIGHT
    assert tensors["qzeros"].numpy().tobytes() == QZEROS
    assert tensors["scales"].numpy().tobytes() == SCALES
    assert tensors["g_idx"].tolist() == [0] * 32 + [1] * 32
    q.parts["codes"][3, 3] ^= 16
    assert gptq.store(q)["qweight"].numpy().tobytes() != QWEIGHT


# -- round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(tmp_path, name):
    model = saved(tmp_path, "gptq", name)
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


@pytest.mark.parametrize("name", ["int2-g16", "int3-g32-asym", "int4-g40", "int8-g16-asym"])
def test_act_order_round_trip(tmp_path, name):
    model = packed_decoder(shuffled(name))
    quantized.save(tmp_path, model, tokenizer(), container="gptq")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["desc_act"]
    before, after = packed(model), packed(quantized.load(tmp_path)[0])
    assert all(same_parts(before[n], after[n]) for n in before)
    assert all(torch.equal(before[n].dequantize(), after[n].dequantize()) for n in before)
    assert {type(q.format) for q in after.values()} == {Reordered}
    swap = lambda g: g[torch.arange(len(g)).roll(1)]  # noqa: E731
    change_tensors(tmp_path, "g_idx", swap)
    wrong = packed(quantized.load(tmp_path)[0])[LAYER]
    assert not torch.equal(before[LAYER].dequantize(), wrong.dequantize())


def test_order_within_a_group_is_not_kept():
    """g_idx says which columns share a scale, not in what order they were rounded."""
    q = Reordered(qlib.format("int4-g16")).quantize(weight(64, 96), order=torch.arange(96).flip(0))
    assert gptq.store(q)["g_idx"].tolist() == [5 - i // 16 for i in range(96)]
    assert torch.equal(torch.from_numpy(decoded(gptq.store(q), 4, 1)).float(), q.dequantize())


def test_groups_in_order_are_read_as_a_scheme(tmp_path):
    model = packed_decoder(Reordered(qlib.format("int4-g32")).quantize)
    quantized.save(tmp_path, model, tokenizer(), container="gptq")
    assert packed(quantized.load(tmp_path)[0])[LAYER].format == qlib.format("int4-g32")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_version_1_with_zero_points_that_wrap(tmp_path, bits):
    """Some of these zero points are 0, which version 1 stores as the largest code."""
    w = weight(64, 96)
    w[:8] = w[:8].abs()
    model = packed_decoder(
        lambda x: qlib.quantize(w if x.shape == w.shape else x, f"int{bits}-g32-asym")
    )
    quantized.save(tmp_path, model, tokenizer(), container="gptq")
    before, levels = packed(model)[LAYER], 2**bits

    def minus_one(words: torch.Tensor) -> torch.Tensor:
        zeros = (numbers(words.numpy(), bits) - 1) % levels
        assert bits == 8 or (zeros == levels - 1).any()
        stream = np.packbits((zeros[..., None] >> np.arange(bits) & 1).reshape(len(zeros), -1),
                             axis=1, bitorder="little")  # fmt: skip
        return torch.from_numpy(stream.view(np.int32))

    change_tensors(tmp_path, "qzeros", minus_one)
    assert not same_parts(before, packed(quantized.load(tmp_path)[0])[LAYER])
    change_settings(tmp_path, checkpoint_format=None, format=None)
    assert same_parts(before, packed(quantized.load(tmp_path)[0])[LAYER])
    change_settings(tmp_path, format="gptq_v2")
    assert not same_parts(before, packed(quantized.load(tmp_path)[0])[LAYER])


def test_symmetric_files_with_other_zero_points(tmp_path):
    saved(tmp_path, "gptq", "int4-g32")
    before = packed(quantized.load(tmp_path)[0])[LAYER].dequantize()
    change_settings(tmp_path, sym=False)
    asymmetric = packed(quantized.load(tmp_path)[0])[LAYER]
    assert asymmetric.format == qlib.format("int4-g32-asym")
    assert torch.equal(asymmetric.dequantize(), before)
    change_settings(tmp_path, sym=True)
    change_tensors(tmp_path, "qzeros", lambda t: t - 1)
    other = packed(quantized.load(tmp_path)[0])
    assert other[LAYER].format == qlib.format("int4-g32-asym")
    assert not torch.equal(other[LAYER].dequantize(), before)
    assert other["model.layers.0.mlp.up_proj"].format == qlib.format("int4-g32")


def test_settings(tmp_path):
    saved(tmp_path, "gptq", "int3-row-asym")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "gptq", "bits": 3, "group_size": -1, "sym": False,
        "checkpoint_format": "gptq_v2", "format": "gptq_v2", "desc_act": False,
        "true_sequential": True, "damp_percent": 0.01, "pack_dtype": "int32", "lm_head": False,
    }  # fmt: skip
    formats = {"a": qlib.format("int8-g16")}
    settings = gptq.describe(formats)["quantization_config"]
    assert (settings["sym"], settings["format"], settings["group_size"]) == (True, "gptq", 16)


def test_bias_of_zeros(tmp_path):
    """Every layer of an AutoGPTQ file has a bias, and in a Llama all of them are zeros."""
    model = saved(tmp_path, "gptq", "int4-g32")
    path = tmp_path / "model.safetensors"
    tensors = load_file(path) | {
        f"{n}.bias": torch.zeros(q.shape[0]) for n, q in packed(model).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})
    assert same_parts(packed(model)[LAYER], packed(quantized.load(tmp_path)[0])[LAYER])
    change_tensors(tmp_path, "bias", lambda t: t + 1)
    message = f": field '{LAYER}.bias': is not part of a llama decoder of this config"
    assert refusal(tmp_path) == message


def test_quantized_head_is_read(tmp_path):
    model = packed_decoder(lambda w: qlib.quantize(w, "int4-g32"), UNTIED)
    quantized.save(tmp_path, model, tokenizer(), container="gptq")
    path = tmp_path / "model.safetensors"
    # 64 rows fill words, 61 do not.
    config = json.loads((tmp_path / "config.json").read_text()) | {"vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    head = qlib.quantize(weight(64, 64), "int4-g32")
    tensors = load_file(path) | {f"lm_head.{p}": t for p, t in gptq.store(head).items()}
    tensors["model.embed_tokens.weight"] = weight(64, 64)
    del tensors["lm_head.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    assert same_parts(packed(quantized.load(tmp_path)[0])["lm_head"], head)


# -- what cannot be written ---------------------------------------------------------------------

KINDS = "it holds int2, int3, int4 and int8, symmetric or with integer zero points"
WORDS = "do not fill int32 words; need a multiple of"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("int4-g32", (64, 96), None),
        ("int4-g40", (64, 96), None),
        ("int4-g32-asym-mse", (64, 96), None),
        ("int5-g32", (64, 96), KINDS),
        ("int1-g32", (64, 96), KINDS),
        ("int4-g32-offset", (64, 96), KINDS),
        ("mxfp4", (64, 96), KINDS),
        ("q4_0", (64, 96), KINDS),
        ("int4-tensor", (64, 96), "its scales belong to rows or groups, not to a whole weight"),
        ("int4-g32", (63, 96), f"63 outputs of 4 bits {WORDS} 8"),
        ("int4-g32-asym", (64, 100), f"100 inputs of 4 bits {WORDS} 8"),
        ("int3-g32", (72, 96), f"72 outputs of 3 bits {WORDS} 32"),
        ("int3-g32", (64, 104), f"104 inputs of 3 bits {WORDS} 32"),
        ("int2-g32", (24, 96), f"24 outputs of 2 bits {WORDS} 16"),
        ("int8-g32", (63, 96), f"63 outputs of 8 bits {WORDS} 4"),
    ],
)
def test_refusals(name, shape, message):
    assert gptq.refusal(qlib.format(name), shape) == message


def test_refused_scales():
    scheme = qlib.scheme.Scheme(qlib.grid.GRIDS["int4"], 32, qlib.fit.absmax, torch.bfloat16)
    assert gptq.refusal(scheme, (64, 96)) == "its scales are float16"
    assert gptq.refusal(Reordered(scheme), (64, 96)) == "its scales are float16"
    assert gptq.refusal(qlib.columns.Columns(qlib.format("int4-g32")), (64, 96)) == KINDS


def test_odd_layer_is_named_before_anything_is_written(tmp_path):
    model = packed_decoder(
        lambda w: qlib.quantize(w[:, :60] if w.shape[1] == 96 else w, "int4-g32")
    )
    with pytest.raises(
        ValueError, match=re.escape(f"{LAYER} [64, 60]: gptq cannot hold int4")
    ) as e:
        quantized.save(tmp_path / "new", model, tokenizer(), container="gptq")
    assert f"60 inputs of 4 bits {WORDS} 8; it fits " not in str(e.value)
    assert f"60 inputs of 4 bits {WORDS} 8; container='qlib' holds every format" in str(e.value)
    assert not (tmp_path / "new").exists()


def test_layers_of_different_formats():
    formats = {"a": qlib.format("int4-g32"), "b": qlib.format("int4-g32-mse"), "lm_head": None}
    assert gptq.describe(formats)["quantization_config"]["bits"] == 4
    remedy = "quantize them alike, or use container='compressed-tensors'"
    for name, what in (
        ("int8-g32", "bits 4, b has bits 8"),
        ("int4-row", "group_size 32, b has group_size -1"),
        ("int4-g32-asym", "sym True, b has sym False"),
    ):
        message = f"gptq has one format for all layers: a has {what}; {remedy}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            gptq.describe(formats | {"b": qlib.format(name)})


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (
            {"a": qlib.format("int4-g32"), "b": None},
            "gptq cannot leave b dense: quantize it, or use container='compressed-tensors' "
            "or 'awq'",
        ),
        (
            {"a": qlib.format("int4-g32"), "lm_head": qlib.format("int4-g32")},
            "gptq cannot quantize lm_head: leave it dense, or use container='compressed-tensors'",
        ),
        ({"lm_head": None}, "gptq: no layer is quantized; save a dense model with qlib.save"),
    ],
)
def test_models_that_do_not_fit(formats, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gptq.describe(formats)


def test_dense_layer_is_refused_before_anything_is_written(tmp_path):
    model = packed_decoder(lambda w: qlib.quantize(w, "int4-g32"), dense=(LAYER,))
    with pytest.raises(ValueError, match=f"^gptq cannot leave {re.escape(LAYER)} dense"):
        quantized.save(tmp_path / "new", model, tokenizer(), container="gptq")
    assert not (tmp_path / "new").exists()


# -- folders that lie ---------------------------------------------------------------------------

SETTINGS = {
    "bits": [5, 0, -4, "4", 4.0, True, [4], {"bits": 4}, 2**70],
    "group_size": [0, -2, 2**70, "128", 32.0, True, 16, 96, {"a": {"b": [1]}}],
    "desc_act": ["false", 0, 1, [], [True], {"a": 1}],
    "sym": ["true", 1, 0, [False]],
    "checkpoint_format": ["marlin", "gptq_v3", 1, ["gptq"], {"gptq": 1}, "GPTQ"],
    "format": ["marlin", "gptq_v2", 2, ["gptq"]],
    "pack_dtype": ["int16", 32, {}],
    "dynamic": [{"-:lm_head": {}}, [1]],
    "is_marlin_format": [True],
    "quant_method": ["gptqq", 3, ["gptq"], {}],
}


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    saved(folder, "gptq", "int4-g32")
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "copy")


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in SETTINGS.items() for v in vs])
def test_settings_that_lie(folder, name, value):
    change_settings(folder, **{name: value})
    message = refusal(folder)
    # A group of another size is well-formed, and first contradicts the tensors.
    place = (
        f": field '{LAYER[:14]}"
        if name == "group_size" and value in (16, 96)
        else "/config.json: field"
    )
    assert message.startswith(place)
    assert name in message or value in (16, 96)


@pytest.mark.parametrize("name", ["bits", "group_size"])
def test_settings_that_are_missing(folder, name):
    change_settings(folder, **{name: None})
    assert refusal(folder).startswith(f"/config.json: field 'quantization_config.{name}': is None")


@pytest.mark.parametrize("value", [3, [], "gptq", [[[]]]])
def test_settings_that_are_no_object(folder, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": value}))
    assert refusal(folder).startswith("/config.json: field")


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
    "g_idx": [
        None,
        lambda t: t[:-1],
        lambda t: t.float(),
        lambda t: t.long(),
        lambda t: t + 1,
        lambda t: t - 1,
        lambda t: t * 0,
        lambda t: t.clone().fill_(2**31 - 1),
        lambda t: t.flip(0),
        lambda t: torch.where(torch.arange(96) == 0, 1, t).int(),
    ],
}


@pytest.mark.parametrize(("part", "change"), [(p, c) for p, cs in TENSORS.items() for c in cs])
@pytest.mark.parametrize("desc_act", [False, True])
def test_tensors_that_lie(folder, part, change, desc_act):
    change_settings(folder, desc_act=desc_act)
    change_tensors(folder, part, change or (lambda t: None))
    if desc_act and change is TENSORS["g_idx"][8]:
        # In falling order the groups are balanced, which is all that act-order asks of them.
        assert type(packed(quantized.load(folder)[0])[LAYER].format) is Reordered
        return
    field = "scale" if part == "scales" else part
    # Without codes it counts as dense, and what is missing is its weight.
    missing = part == "qweight" and change is None
    assert f"field '{LAYER}.{'weight' if missing else field}" in refusal(folder)


def test_messages(folder):
    """What a user reads, word for word."""
    intact = {p: load_file(folder / "model.safetensors")[f"{LAYER}.{p}"].clone() for p in TENSORS}
    field = f": field '{LAYER}."

    def broken(part: str, change) -> str:
        change_tensors(folder, part, change)
        message = refusal(folder)
        change_tensors(folder, part, lambda t: intact[part])
        return message

    assert broken("g_idx", lambda t: t - 1) == field + "g_idx': holds the group -1; need 0 to 2"
    assert broken("g_idx", lambda t: t + 1) == field + "g_idx': holds the group 3; need 0 to 2"
    assert broken("g_idx", lambda t: t.clamp(max=1)) == (
        field + "g_idx': gives group 1 64 inputs; need 32"
    )
    assert broken("g_idx", lambda t: t.flip(0)) == (
        field + "g_idx': is not in order, as it must be where desc_act is false"
    )
    assert broken("qzeros", lambda t: t[:, :7]) == (
        field + "qzeros': is I32 [3, 7]; a weight [64, 96] needs I32 [3, 8]"
    )
    assert (
        broken("scales", lambda t: t * torch.inf) == field + "scale': holds NaN or infinite values"
    )
    assert packed(quantized.load(folder)[0]).keys()
    settings = "/config.json: field 'quantization_config."
    for values, message in (
        ({"bits": 5}, "bits': is 5; need one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size': is 0; need a positive integer, or -1 for whole rows"),
        ({"group_size": "32"}, "group_size': is '32'; need an integer from -1 to 1048576"),
        ({"desc_act": 1}, "desc_act': is 1; need one of True, False"),
        (
            {"checkpoint_format": "marlin"},
            "checkpoint_format': is 'marlin'; need one of 'gptq', 'gptq_v2'",
        ),
        ({"dynamic": {"a": 1}}, "dynamic': is not supported; need none"),
    ):
        before = (folder / "config.json").read_text()
        change_settings(folder, **values)
        assert refusal(folder) == settings + message
        (folder / "config.json").write_text(before)


def test_versions_that_contradict_each_other(folder):
    change_settings(folder, format="gptq_v2", checkpoint_format="gptq")
    message = "/config.json: field 'quantization_config.format': is 'gptq_v2'; need 'gptq'"
    assert refusal(folder) == message


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


def test_as_a_user_would(tmp_path):
    model, own = qlib.load("bpw-small")
    tokens = qlib.texts("calibration")[:4000]
    calibration = torch.tensor(own.encode(tokens)[:512]).view(4, 128)
    qlib.quantize_model(model, "int4-g128", method="gptq", calibration=calibration, progress=False)
    quantized.save(tmp_path, model, own, container="gptq")
    loaded, again = quantized.load(tmp_path)
    x = torch.tensor([again.encode("The cat sat on the")])
    assert torch.equal(model(x), loaded(x))
    assert len(packed(loaded)) == 7 * CONFIG.num_hidden_layers * 3
