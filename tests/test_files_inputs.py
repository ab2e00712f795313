"""What layers do with their inputs, in files: kept, read by other tools, or refused by name."""

from __future__ import annotations

import json
import math
import re
import warnings
from dataclasses import replace

import pytest
import torch
from container_models import decoder, prompt, with_formats
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_files_hf import small_tokenizer
from tiny_models import raises

import qlib
from qlib import fit
from qlib.activations import Dynamic, Static, inputs
from qlib.errors import FormatError
from qlib.files import bnb, ct_inputs, quantized, resume
from qlib.files.inspect import inspect_file
from qlib.grid import Grid
from qlib.linear import DenseLinear, QLinear, replace_layer
from qlib.methods.llm_int8 import LLMInt8
from qlib.recipe import plan
from qlib.transform import Diagonal, Hadamard, Orthogonal, Permute

Q, UP = "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"
CT, ROW = "compressed-tensors", "int8, block row, absmax, scale float16"


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_inputs(weights: str, *chosen):
    """A decoder of packed layers, whose inputs are quantized, in turn, as `chosen` says."""
    model = with_formats(decoder(), [weights])
    for i, layer in enumerate(layers(model).values()):
        one = inputs(chosen[i % len(chosen)])
        layer.inputs = one and one.observed(-9.0 - i, 8.5 + i / 3)
    return model


def layers(model) -> dict[str, QLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}


def read(model) -> dict[str, object]:
    return {name: layer.inputs for name, layer in layers(model).items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).float().norm() / b.float().norm()).item()


def without_inputs(model):
    for layer in layers(model).values():
        layer.inputs = None
    return model


TRANSFORMS = [
    Hadamard(64), Hadamard.random(64, 3), Diagonal(randn(64).exp()),
    Permute(torch.arange(63, -1, -1)), Orthogonal(torch.linalg.qr(randn(64, 64))[0]), None,
]  # fmt: skip
KINDS = ["int8-row", "int8-tensor-static", "fp8_e4m3-tensor-static", "nvfp4-static",
         LLMInt8(5.5), LLMInt8(math.inf), "mxfp4", None, Dynamic(qlib.format("q8_0"))]  # fmt: skip


def rich():
    """Packed and dense layers with all kinds of inputs and transforms."""
    model = with_inputs("int8-row", *KINDS)
    for i, (name, layer) in enumerate(layers(model).items()):
        turn = TRANSFORMS[i % len(TRANSFORMS)]
        if turn is not None and layer.in_features == 64:
            layer.transform = turn
        if i % 5 == 4:
            weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
            dense = DenseLinear(weight, layer.bias, layer.transform, layer.inputs)
            replace_layer(model, name, dense)
    return model


def test_our_own_container_keeps_inputs_and_transforms(tmp_path):
    model = rich()
    qlib.save(model, tmp_path)
    back, _ = qlib.load(tmp_path)
    before, after = dict(model.named_modules()), dict(back.named_modules())
    kept = [n for n, m in before.items() if isinstance(m, QLinear | DenseLinear)]
    assert len(kept) == 14
    for name in kept:
        assert type(after[name]) is type(before[name]) or before[name].inputs is None
        found = [getattr(m, "inputs", None) for m in (after[name], before[name])]
        assert found[0] == found[1]
        turns = [getattr(m, "transform", None) for m in (after[name], before[name])]
        assert type(turns[0]) is type(turns[1])
        assert str(turns[0]) == str(turns[1])
    assert torch.equal(back(prompt()), model(prompt()))
    layer = next(m for m in layers(back).values() if isinstance(m.transform, Diagonal))
    layer.transform.scales[0] *= 2
    assert not torch.equal(back(prompt()), model(prompt()))
    # Plain models stay files of version 1.
    qlib.save(with_inputs("int8-row", None), tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["qlib"])["version"] == 1


def change_layers(folder, change) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["qlib"])
    change(entry["layers"])
    save_file(load_file(path), path, {"format": "pt", "qlib": json.dumps(entry)})


FIELD = f"qlib.layers['{Q}']"
KINDS_OF_INPUTS = "is none of dynamic, static with low and high, llm.int8"
KINDS_OF_TRANSFORMS = "is none of diagonal, permute, hadamard, orthogonal with a size"
SCHEME = {"grid": "int8", "block": "tensor", "fit": "absmax", "scale": "float16", "offset": None}
HOSTILE = [
    (3, FIELD, "has other fields than inputs and transform"),
    ({"input": {}}, FIELD, "has other fields than inputs and transform"),
    ({"inputs": None}, f"{FIELD}.inputs", KINDS_OF_INPUTS),
    ({"inputs": {"dynamic": SCHEME, "static": SCHEME}}, f"{FIELD}.inputs", KINDS_OF_INPUTS),
    ({"inputs": {"static": SCHEME, "low": 0, "high": 1.0}}, f"{FIELD}.inputs",
     "has [0, 1.0]; need finite numbers"),
    ({"inputs": {"static": SCHEME, "low": 0.0, "high": float("inf")}}, f"{FIELD}.inputs",
     "has [0.0, inf]; need finite numbers"),
    ({"inputs": {"llm.int8": "6"}}, f"{FIELD}.inputs",
     "has threshold '6'; need a positive number"),
    ({"inputs": {"llm.int8": -1.0}}, f"{FIELD}.inputs",
     "has threshold -1.0; need a positive number"),
    ({"inputs": {"static": SCHEME | {"block": "row"}, "low": 0.0, "high": 1.0}},
     f"{FIELD}.inputs", f"{ROW} has scales for parts of the tensor; static inputs have one, as "
     "int8-tensor does"),
    ({"inputs": {"dynamic": {"ggml": "Q9"}}}, f"{FIELD}.inputs", "unknown ggml type 'Q9'"),
    ({"transform": {"rotate": 64}}, f"{FIELD}.transform", KINDS_OF_TRANSFORMS),
    ({"transform": {"hadamard": "64"}}, f"{FIELD}.transform", KINDS_OF_TRANSFORMS),
    ({"transform": {"hadamard": 32}}, f"{FIELD}.transform", "is of 32 inputs, the layer of 64"),
    ({"transform": {"diagonal": 64}}, f"{Q}.transform.scales", "missing"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "field", "message"), HOSTILE)
def test_layers_that_are_not_understood_are_refused(tmp_path, data, field, message):
    qlib.save(with_inputs("int8-row", "int8-row"), tmp_path)
    change_layers(tmp_path, lambda layers: layers.update({Q: data}))
    path = tmp_path / "model.safetensors"
    with pytest.raises(FormatError) as caught:
        qlib.load(tmp_path)
    assert str(caught.value) == f"{path}: field {field!r}: {message}"


def test_layers_that_the_model_has_not_are_refused(tmp_path):
    qlib.save(with_inputs("int8-row", "int8-row"), tmp_path)
    change_layers(tmp_path, lambda layers: layers.update({"model.norm": {}}))
    with pytest.raises(FormatError, match=r"qlib.layers\['model.norm'\].* no linear layer of the"):
        qlib.load(tmp_path)


def test_what_has_no_name_is_refused(tmp_path):
    class Own(Dynamic):
        pass

    model = with_inputs("int8-row", Own(qlib.format("int8-row")))
    with raises(f"{Q}: qlib's container stores no inputs of type Own"):
        qlib.save(model, tmp_path)
    learned = qlib.Scheme(Grid("own", torch.tensor([-1.0, 0.0, 0.5, 1.0])), "row", fit.absmax)
    for chosen, why in {
        Dynamic(learned): "qlib's container stores no inputs on a learned grid",
        inputs("int8-tensor-static"): "static inputs have no range yet: calibrate, or use dynamic "
        "ones",
    }.items():
        layers(model)[Q].inputs = chosen
        with raises(f"{Q}: {why}"):
            qlib.save(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_keeps_ranges(tmp_path):
    from tiny_models import tiny_decoder, tokens

    data = qlib.Calibration.of(tokens(64), context=16)

    def run(model, **options):
        qlib.quantize_model(
            model, "w8a8-static", calibration=data, progress=False, resume=tmp_path, **options
        )
        return model

    first = run(tiny_decoder())
    (tmp_path / "model.layers.1.json").unlink()
    again = run(tiny_decoder())
    assert read(first) == read(again)
    assert torch.equal(first(tokens(9)[None]), again(tokens(9)[None]))
    # Other activations are another run.
    with pytest.raises(ValueError, match="holds another run"):
        qlib.quantize_model(tiny_decoder(), "w8a8", progress=False, resume=tmp_path)


def fingerprint_of(*chosen, format="int8-row") -> str:
    """That of a run in which layer Q gets the first of `chosen` for its inputs, UP the other."""
    rules = tuple(zip((Q, UP), chosen))
    planned = plan(decoder(), qlib.Recipe(format, activation_rules=rules))
    return resume.fingerprint(decoder(), planned, None, ["rtn"])


def test_every_layer_of_a_run_counts():
    rows, blocks = "int8-row", "int8-g32"
    first = fingerprint_of(rows, blocks)
    assert first == fingerprint_of(rows, blocks)
    assert first != fingerprint_of(blocks, rows)
    assert first != fingerprint_of(rows, None)


def test_no_two_inputs_of_a_run_are_taken_for_one():
    """Ranges and thresholds that print alike, a range that is yet to be found, and one of zeros."""
    whole = inputs("int8-tensor-static")
    alike = [
        *(whole.observed(-1.0, 1.0), whole.observed(-1.0, 1.00001)),
        *(whole, whole.observed(0.0, 0.0), inputs("int8-tensor")),
        *(LLMInt8(6.0), LLMInt8(6.0000001), LLMInt8(math.inf), None),
    ]
    assert str(alike[0]) == str(alike[1])
    found = [fingerprint_of(one) for one in alike]
    assert len(set(found)) == len(alike)
    assert found == [fingerprint_of(one) for one in alike]


def test_points_of_a_learned_grid_count():
    def learned(*points: float):
        return qlib.Scheme(Grid("own", torch.tensor(points)), "row", fit.absmax)

    first = fingerprint_of(format=learned(-1.0, 0.0, 0.5, 1.0))
    assert first == fingerprint_of(format=learned(-1.0, 0.0, 0.5, 1.0))
    assert first != fingerprint_of(format=learned(-1.0, 0.0, 0.25, 1.0))
    with raises("qlib's container stores no inputs on a learned grid"):
        fingerprint_of(Dynamic(learned(-1.0, 0.0, 0.5, 1.0)))


PAIRS = [
    ("int8-row", "int8-row"), ("int8-row", "int8-tensor-static"), ("int4-g32", "int8-row"),
    ("fp8_e4m3", "fp8_e4m3"), ("fp8_e4m3", "fp8_e4m3-tensor-static"), ("mxfp4", "mxfp4"),
    ("mxfp8_e4m3", "mxfp8_e4m3"), ("mxfp4", "mxfp8_e4m3"),
    ("nvfp4-reciprocal", "nvfp4-reciprocal-static"),
]  # fmt: skip


@pytest.mark.parametrize(("weights", "chosen"), PAIRS)
def test_compressed_tensors_keeps_inputs(tmp_path, weights, chosen):
    model = with_inputs(weights, chosen)
    qlib.save(model, tmp_path, small_tokenizer(), CT)
    back, _ = qlib.load(tmp_path)
    for name, layer in layers(model).items():
        other = back.get_submodule(name)
        assert layer.weight.tobytes() == other.weight.tobytes()
        assert type(layer.inputs) is type(other.inputs)
        x = randn(7, layer.in_features)
        assert torch.equal(layer.inputs.rounded(x), other.inputs.rounded(x))
    assert torch.equal(back(prompt()), model(prompt()))
    assert not torch.equal(without_inputs(back)(prompt()), model(prompt()))


@pytest.mark.parametrize(("weights", "chosen"), PAIRS)
def test_compressed_tensors_rounds_the_same(weights, chosen):
    """The library's own fake quantization, from our settings and tensors."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    rule = "-even" if chosen.startswith("mx") else ""
    own = inputs(chosen + rule).observed(-2.0, 2.5)
    args, stored = QuantizationArgs(**ct_inputs.arguments(own)), ct_inputs.store(own)
    x = randn(1, 9, 128)
    if args.dynamic is False:
        scale, zero, outer = stored["input_scale"].float(), torch.zeros(1), None
    else:
        outer = stored.get("input_global_scale")
        scale, zero = compute_dynamic_scales_and_zp(x, args, None, outer)
    theirs = fake_quantize(x, scale, zero, args, outer)[0]
    ours = own.rounded(x[0])
    if chosen == "int8-row":
        # They divide by amax / 127.5, vLLM and we by amax / 127.
        assert (ours - theirs).abs().max() <= 1.6 * x.abs().max() / 127
    else:
        # For the exponents of MXFP8 they round magnitudes as if these were FP4: some are larger.
        same = (ours - theirs).abs() <= 1e-6 + 1e-6 * theirs.abs()
        assert same.float().mean() >= (0.97 if "mxfp8" in chosen else 1)
    assert (own.rounded(1.1 * x[0]) - theirs).abs().max() > 0.05


@pytest.mark.parametrize("chosen", ["fp8_e4m3", "fp8_e4m3-tensor-static", "int8-tensor-static"])
def test_transformers_quantizes_inputs(tmp_path, chosen):
    import transformers

    model = with_inputs("int8-row" if "int8" in chosen else "fp8_e4m3", chosen)
    qlib.save(model, tmp_path, small_tokenizer(), CT)
    ours = model(prompt())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(prompt()).logits
    assert distance(theirs, ours) < 1e-3
    config = json.loads((tmp_path / "config.json").read_text())
    del config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()(prompt()).logits
    assert distance(plain, ours) > 1e-2
    assert distance(plain, without_inputs(model)(prompt())) < 1e-3


def test_groups_of_several_kinds_of_inputs(tmp_path):
    model = with_inputs("int8-row", "int8-row", "int8-tensor-static", None)
    qlib.save(model, tmp_path, small_tokenizer(), CT)
    assert len(json.loads((tmp_path / "config.json").read_text())["quantization_config"]
               ["config_groups"]) == 3  # fmt: skip
    found = read(qlib.load(tmp_path)[0])
    assert {n: type(i) for n, i in found.items()} == {n: type(i) for n, i in read(model).items()}
    kinds = inspect_file(tmp_path).activations
    assert len(kinds) == 2
    assert '"strategy": "token"' in kinds[0]


@pytest.mark.parametrize(("weights", "chosen"), [
    ("int8-row", "fp8_e4m3"), ("int8-row", "int8-tensor"), ("int4-g32", "int4-row"),
    ("int4-g32", "int8-tensor-static"), ("nvfp4-reciprocal", "nvfp4"), ("mxfp6_e2m3", "mxfp4"),
    ("int8-row", LLMInt8()), ("fp8_e4m3", "fp8_e5m2"),
])  # fmt: skip
def test_inputs_that_vllm_has_not_are_refused(tmp_path, weights, chosen):
    model = with_inputs(weights, chosen)
    own = read(model)[Q]
    message = f"{CT} cannot hold inputs as {own}: {ct_inputs.KNOWN}; container='qlib' can"
    with raises(f"{Q} [64, 64]: {message}"):
        qlib.save(model, tmp_path, container=CT)
    assert not list(tmp_path.iterdir())


def test_inputs_of_other_tools_stay_as_they_are(tmp_path):
    qlib.save(with_inputs("int8-row", "int8-row"), tmp_path, small_tokenizer(), CT)
    config = json.loads((tmp_path / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["input_activations"]["symmetric"] = False
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"^inputs quantized as \{'num_bits': 8, .* stay as they"):
        back, _ = qlib.load(tmp_path)
    assert set(read(back).values()) == {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("weights", "chosen", "part"), [
    ("nvfp4-reciprocal", "nvfp4-reciprocal-static", "input_global_scale"),
    ("fp8_e4m3", "fp8_e4m3-tensor-static", "input_scale"),
])  # fmt: skip
def test_scales_that_other_tools_found_are_kept(tmp_path, weights, chosen, part, dtype):
    """A scale is amax / 448 or 2688 / amax, rounded: no range of float32 need have it."""
    from compressed_tensors.quantization.utils import generate_gparam

    qlib.save(with_inputs(weights, chosen), tmp_path, small_tokenizer(), CT)
    tensors = load_file(tmp_path / "model.safetensors")
    names = [name for name in tensors if name.endswith(part)]
    amax = randn(len(names), seed=5).abs().to(dtype)
    for name, one in zip(names, amax):
        whole = generate_gparam(-one, one).float()
        tensors[name] = whole if part == "input_global_scale" else 1 / (448 / one.float())[None]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model, _ = qlib.load(tmp_path)
    qlib.save(model, tmp_path / "again", small_tokenizer(), CT)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert len(names) == 14
    assert all(torch.equal(again[name], tensors[name]) for name in names)
    qlib.save(model, tmp_path / "own")
    kept = read(qlib.load(tmp_path / "own")[0])
    assert kept == read(model)
    # Without what was kept, some scales would be others.
    bare = [replace(one, scale=None) for one in kept.values()]
    found = torch.cat([ct_inputs.store(one)[part] for one in bare])
    assert not torch.equal(found, torch.cat([ct_inputs.store(x)[part] for x in kept.values()]))


@pytest.mark.parametrize(("part", "change", "message"), [
    ("input_scale", lambda t: t * 0, "is 0.0; need a positive number"),
    ("input_scale", lambda t: t * torch.nan, "is nan; need a positive number"),
    ("input_scale", lambda t: t.float() * 0 + 2.0**127, f"is {2.0**127}, the scale of no range"),
    ("input_scale", lambda t: t.expand(2),
     "is F16 [2]; a weight [64, 64] needs F16 or BF16 or F32 [1]"),
    ("input_scale", None, "this tensor is missing"),
])  # fmt: skip
def test_bad_scales_of_inputs_are_refused(tmp_path, part, change, message):
    qlib.save(with_inputs("int8-row", "int8-tensor-static"), tmp_path, small_tokenizer(), CT)
    tensors = load_file(tmp_path / "model.safetensors")
    tensor = tensors.pop(f"{Q}.{part}")
    if change:
        tensors[f"{Q}.{part}"] = change(tensor).contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FormatError) as caught:
        qlib.load(tmp_path)
    assert str(caught.value) == f"{tmp_path}: field '{Q}.{part}': {message}"


@pytest.mark.parametrize("chosen", [LLMInt8(6.0), LLMInt8(2.5), LLMInt8(math.inf)], ids=str)
def test_bitsandbytes_keeps_llm_int8(tmp_path, chosen):
    model = with_inputs("int8-row", chosen)
    qlib.save(model, tmp_path, small_tokenizer(), "bitsandbytes")
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings["llm_int8_threshold"] == (
        0.0 if chosen.threshold == math.inf else chosen.threshold
    )
    back, _ = qlib.load(tmp_path)
    assert str(read(back)[Q]) == str(read(model)[Q])
    assert torch.equal(back(prompt()), model(prompt()))
    assert "llm_int8_threshold" in inspect_file(tmp_path).activations[0]


def test_transformers_runs_llm_int8(tmp_path):
    import transformers

    model = with_inputs("int8-row", LLMInt8(1.5))
    qlib.save(model, tmp_path, small_tokenizer(), "bitsandbytes")
    ours, plain = model(prompt()), without_inputs(model)(prompt())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.model.layers[0].self_attn.q_proj.state.threshold == 1.5
    theirs = loaded(prompt()).logits
    assert distance(theirs, ours) < 0.6 * distance(plain, ours) + 0.02
    assert distance(theirs, ours) < 0.05


def test_bitsandbytes_refuses_other_inputs(tmp_path):
    only = "it has LLM.int8(), with int8-row weights; container='qlib' can"
    with raises(f"{Q} [64, 64]: bitsandbytes cannot hold inputs as {ROW}, dynamic: {only}"):
        qlib.save(with_inputs("nf4", "int8-row"), tmp_path, container="bitsandbytes")
    mixed = with_inputs("int8-row", LLMInt8(), None)
    one = "int8 for each token, channels from 6 at full width"
    with pytest.raises(ValueError, match="holds layers of one kind of inputs: ") as caught:
        qlib.save(mixed, tmp_path, container="bitsandbytes")
    assert str(LLMInt8()) in str(caught.value) or one in str(caught.value)
    assert bnb.inputs_refusal(LLMInt8(), None) is not None
    qlib.save(with_inputs("int8-row", LLMInt8()), tmp_path, small_tokenizer(), "bitsandbytes")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["llm_int8_threshold"] = -1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="is -1; need a number from 0"):
        qlib.load(tmp_path)


@pytest.mark.parametrize("container", ["gptq", "awq", "hf"])
def test_containers_of_weights_warn(tmp_path, container):
    model = with_inputs("int4-g32", "int8-row")
    kind = f"{ROW}, dynamic"
    message = (f"{container} holds weights only: 14 layers quantize their inputs ({kind}), and "
               "whatever opens the file will not; container='qlib' can")  # fmt: skip
    with pytest.warns(UserWarning, match=f"^{re.escape(message)}$"):
        qlib.save(model, tmp_path / "m", small_tokenizer(), container)
    if container == "hf":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            qlib.save(without_inputs(model), tmp_path / "m", small_tokenizer(), container)


@pytest.mark.parametrize("container", ["compressed-tensors", "bitsandbytes", "gptq", "hf", "gguf"])
def test_another_basis_is_refused_by_name(tmp_path, container):
    model = with_inputs("int8-row", None)
    model.get_submodule(UP).transform = Hadamard(64)
    message = "cannot hold a layer that moves its inputs to another basis (Hadamard)"
    tokenizer = small_tokenizer()
    with raises(f"{UP} [128, 64]: {container} {message}; container='qlib' can"):
        qlib.save(model, tmp_path / "m", tokenizer, container)
    assert not list(tmp_path.iterdir())


def test_kinds_of_inputs():
    assert ct_inputs.kind_of(inputs("int8-row")) == ("int8", "token")
    assert ct_inputs.kind_of(inputs("int8-tensor-asym-static")) is None
    assert quantized.CONTAINERS[CT].inputs_refusal(inputs("int8-row"), None) == ct_inputs.KNOWN
    assert isinstance(inputs("nvfp4-static"), Static)
