"""LoRA: gradients through packed weights, PEFT as the judge, a base that never moves, bad files."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import MODELS, raises, tiny_decoder, tokens
from torch import nn

import qlib
from qlib import finetune, kernels, lora
from qlib.errors import FormatError
from qlib.files import hf, peft
from qlib.kernels import dequantize
from qlib.linear import QLinear, dequantized, replace_layer

FORMATS = ["nf4", "int4-g16", "int3-row-asym", "nvfp4", "ternary", "int8-tensor", "q4_k", "mxfp4"]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
KEY = f"base_model.model.{Q}.lora_A.weight"


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def packed(out, columns, name, bias=True):
    q = qlib.quantize(randn(out, columns), name)
    return QLinear(q, randn(out, seed=1) if bias else None)


def logits(model, ids=None):
    with torch.no_grad():
        y = model(tokens(18, 7).view(2, 9) if ids is None else ids)
    return getattr(y, "logits", y)


def moved(model, rank=4, alpha=6.0, targets="all"):
    """The model with adapters as training might leave them."""
    lora.add_adapters(model, rank, alpha, targets)
    for i, layer in enumerate(lora.adapters(model).values()):
        layer.lora_B.data = 0.2 * randn(*layer.lora_B.shape, seed=i)
    return model


def stored(model):
    """Copies of everything that a model keeps, but for its adapters."""
    state = model.state_dict().items()
    return {n.replace(".base.", "."): t.clone() for n, t in state if "lora_" not in n}


# -- the gradient through a packed layer ----------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("chunk", [1 << 22, 600])
def test_gradient_is_that_of_the_dense_layer(name, chunk, monkeypatch):
    monkeypatch.setattr(dequantize, "CHUNK_WEIGHTS", chunk)
    layer = packed(13, 256, name)
    gradient = randn(2, 3, 13, seed=3)
    ours, theirs = (randn(2, 3, 256, seed=2).requires_grad_() for _ in range(2))
    layer(ours).backward(gradient)
    dense = dequantized(layer)
    dense(theirs).backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    # The twin: one weight of another value.
    twin = theirs.detach().clone().requires_grad_()
    dense.weight.data[5, 7] += dense.weight.abs().max()
    dense(twin).backward(gradient)
    assert not torch.allclose(ours.grad, twin.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(24,), (1, 24), (0, 24), (2, 3, 24)])
def test_gradient_by_finite_differences(shape):
    layer = packed(5, 24, "nf4").double()
    x = randn(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_gradient_has_the_dtype_of_the_input(dtype):
    layer = packed(13, 96, "int4-g16")
    x = randn(4, 96).to(dtype).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    expected = layer.weight.dequantize().sum(0).expand(4, 96)
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(x.grad.double(), expected.double(), rtol=tolerance, atol=tolerance)


def test_no_dense_weight_is_kept_for_the_gradient():
    layer = packed(40, 96, "nf4", bias=False)
    x = randn(3, 96).requires_grad_()

    def kept(function):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            function(x)
        return saved

    assert {t.data_ptr() for t in kept(layer)} == {t.data_ptr() for t in layer.buffers()}
    assert sum(t.nbytes for t in kept(layer)) == layer.weight.nbytes
    # The twin: the differentiable fallback keeps what it multiplied by.
    assert any(t.numel() == 40 * 96 for t in kept(lambda x: kernels.matmul(x, layer.weight)))


def test_training_computes_what_inference_computes():
    layer = packed(13, 96, "int4-g16")
    x = randn(6, 96)
    y = layer(x)
    assert torch.equal(y, kernels.matmul(x, layer.weight) + layer.bias)
    assert y.grad_fn is None
    with torch.no_grad():
        assert layer(x.clone().requires_grad_()).grad_fn is None
    assert torch.equal(layer(x.clone().requires_grad_()), y)


def test_weight_that_changes_before_the_gradient_is_refused():
    layer = packed(13, 96, "nf4")
    y = layer(randn(3, 96).requires_grad_()).sum()
    layer.codes.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


# -- the layer ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_layer_by_hand(base):
    dense = nn.Linear(96, 13).requires_grad_(False)
    inner = dense if base == "dense" else QLinear(qlib.quantize(dense.weight, base), dense.bias)
    layer = lora.LoRALinear(inner, 4, 6, torch.Generator().manual_seed(3))
    x = randn(2, 3, 96)
    assert torch.equal(layer(x), inner(x))
    # As PyTorch draws a linear layer, which is how PEFT draws A.
    torch.manual_seed(3)
    assert torch.equal(layer.lora_A, nn.Linear(96, 4, bias=False).weight)
    assert not layer.lora_B.any()
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layer.lora_B.data = randn(13, 4)
    weight = inner.weight if base == "dense" else inner.weight.dequantize()
    expected = x @ (weight + 1.5 * layer.lora_B @ layer.lora_A).T + inner.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert repr(layer).startswith("LoRALinear(\n  rank=4, alpha=6")


def test_half_precision_keeps_its_dtype():
    layer = lora.LoRALinear(nn.Linear(8, 4).bfloat16(), 2, 2)
    assert layer.lora_A.dtype == torch.float32
    assert layer(randn(3, 8).bfloat16()).dtype == torch.bfloat16


def test_rank_that_is_not_positive():
    with raises("rank 0: give 1 or more"):
        lora.LoRALinear(nn.Linear(8, 4), 0, 2)


# -- adapters of a model --------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_new_adapters_change_nothing(name, quantized):
    model = MODELS[name]()
    if quantized:
        qlib.quantize_model(model, "int4-g16", progress=False)
    before, names = logits(model), {n for n, m in model.named_modules() if "layers." in n}
    trained = lora.add_adapters(model, rank=3)
    assert torch.equal(logits(model), before)
    assert [p for p in model.parameters() if p.requires_grad] == trained
    blocks = 2 * (4 if name == "gpt-neox" else 7)
    assert len(trained) == 2 * blocks
    assert set(lora.adapters(model)) < names
    assert model.get_submodule(next(iter(lora.adapters(model)))).rank == 3


def test_targets_and_seeds():
    model = tiny_decoder()
    lora.add_adapters(model, targets=("q_proj", "mlp.up_proj", "layers.0.mlp.down_proj"))
    ends = [name.removeprefix("model.layers.") for name in lora.adapters(model)]
    expected = "0.self_attn.q_proj 0.mlp.up_proj 0.mlp.down_proj 1.self_attn.q_proj 1.mlp.up_proj"
    assert ends == expected.split()
    one, same, other = (tiny_decoder() for _ in range(3))
    drawn = [lora.add_adapters(m, targets="q_proj", seed=s)[2] for m, s in
             ((one, 0), (same, 0), (other, 1))]  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_targets_that_are_wrong():
    model = tiny_decoder()
    known = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with raises(f"target 'proj' matches no layer; known are {known}, and 'all'"):
        lora.add_adapters(model, targets=("q_proj", "proj"))
    assert not lora.adapters(model)
    with raises("Linear has no decoder blocks with linear layers"):
        lora.add_adapters(nn.Linear(3, 3))
    lora.add_adapters(model)
    with raises("the model has adapters already: train those, or merge them first"):
        lora.add_adapters(model)


# -- training -------------------------------------------------------------------------------------


def code(text):
    """The paragraphs of a text that look like programs: a domain that bpw-small never saw."""
    pieces = text.split("\n\n")
    return "\n\n".join(p for p in pieces if sum(map(p.count, "{}();=<>_#")) > len(p) / 50)


def test_training_lowers_the_held_out_loss_and_leaves_the_base():
    model, tokenizer = qlib.load("bpw-small")
    qlib.quantize_model(model, "nf4", progress=False)
    ids = torch.tensor(tokenizer.encode(code(qlib.texts("calibration"))))
    training, held_out = ids[:4096], ids[4096:].unfold(0, 65, 64)
    before, parts = finetune.next_token_loss(model, held_out), stored(model)
    trained = lora.add_adapters(model, targets=("q_proj", "v_proj", "up_proj"))
    losses = lora.train(model, training, 15, 4, 4e-3, context=64, warmup=2, progress=False)
    assert len(losses) == 15
    with torch.no_grad():
        after = finetune.next_token_loss(model, held_out)
    assert after < before - 0.3
    left = stored(model)
    assert left.keys() == parts.keys()
    assert all(torch.equal(left[name], parts[name]) for name in parts)
    assert {left[name].dtype for name in parts} == {t.dtype for t in parts.values()}
    assert all(p.abs().max() > 0 and p.grad is None for p in trained)


def theirs(model, folder):
    """The same function as a transformers model: packed weights as what they stand for."""
    from transformers import AutoModelForCausalLM

    dense = copy.deepcopy(model)
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, QLinear):
            replace_layer(dense, name, dequantized(layer))
    hf.save_checkpoint(folder, dense.config, dense.state_dict())
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def peft_steps(model, ids, rates, seed):
    """Plain training of a PEFT model on windows of 12, with the given learning rates."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    generator, losses = torch.Generator().manual_seed(seed), []
    for rate in rates:
        starts = torch.randint(len(ids) - 12, (3, 1), generator=generator)
        window = torch.stack([ids[s : s + 13] for s in starts.flatten()])
        loss = -model(window[:, :-1]).logits.log_softmax(-1).gather(2, window[:, 1:, None]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.cat([p.grad.flatten() for p in trained]).norm()
        for p in trained:
            p.grad *= min(1, 0.3 / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_training_of_a_packed_model_is_pefts_of_its_dense_twin(tmp_path):
    import peft as judge

    model = tiny_decoder(tied=False)
    qlib.quantize_model(model, "nf4", progress=False)
    reference = theirs(model, tmp_path / "dense")
    lora.save_adapters(tmp_path / "new", moved(model))
    reference = judge.PeftModel.from_pretrained(reference, tmp_path / "new", is_trainable=True)
    ids = tokens(100)
    ours = lora.train(model, ids, 4, 3, 0.01, context=12, warmup=2, seed=5, progress=False)
    rates = [0.005, 0.01 * (1 + 0.5**0.5) / 2, 0.005, 0.01 * (1 - 0.5**0.5) / 2]
    assert ours == pytest.approx(peft_steps(reference, ids, rates, 5), abs=1e-5)
    state = judge.get_peft_model_state_dict(reference)
    for name, layer in lora.adapters(model).items():
        for part in ("lora_A", "lora_B"):
            expected = state[f"base_model.model.{name}.{part}.weight"]
            torch.testing.assert_close(getattr(layer, part).data, expected, rtol=0, atol=1e-4)
    # The twin: another learning rate ends elsewhere.
    peft_steps(reference, ids, [0.01], 5)
    name, layer = next(iter(lora.adapters(model).items()))
    left = judge.get_peft_model_state_dict(reference)[f"base_model.model.{name}.lora_B.weight"]
    assert (left - layer.lora_B).abs().max() > 1e-3


def test_the_same_seed_trains_the_same_adapters():
    ends = []
    for seed in (0, 0, 1):
        model = tiny_decoder()
        trained = lora.add_adapters(model)
        lora.train(model, tokens(80), 2, 2, context=8, seed=seed, progress=False)
        ends.append(trained[1].detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_a_dense_model_trains_whole():
    model = tiny_decoder().requires_grad_()
    losses = lora.train(model, tokens(80), 12, 4, 0.01, context=8, warmup=0, progress=False)
    assert losses[-1] < losses[0]


def test_training_that_is_refused():
    model = tiny_decoder()
    with raises("no parameter requires a gradient: call qlib.lora.add_adapters first"):
        lora.train(model, tokens(80), 1)
    trained = lora.add_adapters(model)
    need = "need more than context=8 tokens in one row, got"
    for ids in (tokens(8), tokens(80).view(1, 80)):
        with raises(f"{need} {list(ids.shape)}: give more text or less context"):
            lora.train(model, ids, 1, context=8)
    assert len(lora.train(model, tokens(9), 1, context=8, progress=False)) == 1
    model.model.norm.weight.data[3] = torch.nan
    before = [p.clone() for p in trained]
    with pytest.raises(RuntimeError, match="is non-finite"):
        lora.train(model, tokens(80), 1, context=8, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(trained, before))


# -- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [None, "nf4"])
def test_peft_computes_the_same_logits(tmp_path, quantized):
    import peft as judge

    model = tiny_decoder(tied=False)
    if quantized:
        qlib.quantize_model(model, quantized, progress=False)
    reference = theirs(model, tmp_path / "base")
    ours = logits(moved(model, targets=("q_proj", "v_proj", "down_proj")))
    lora.save_adapters(tmp_path / "adapters", model)

    def apart():
        wrapped = judge.PeftModel.from_pretrained(copy.deepcopy(reference), tmp_path / "adapters")
        return (logits(wrapped) - ours).abs().max()

    assert apart() < 1e-5
    assert (logits(reference) - ours).abs().max() > 1e-2
    # The twins: A and B of a square layer in each other's place; another alpha.
    path = tmp_path / "adapters" / peft.WEIGHTS
    good = load_file(path)
    a, b = KEY, KEY.replace("_A", "_B")
    swapped = {a: good[b].T.contiguous(), b: good[a].T.contiguous()}
    save_file(good | swapped, path, {"format": "pt"})
    assert apart() > 1e-3
    save_file(good, path, {"format": "pt"})
    assert apart() < 1e-5
    change(tmp_path / "adapters", lora_alpha=6.1)
    assert apart() > 1e-4


@pytest.mark.parametrize("init", [True, "gaussian"])
@pytest.mark.parametrize("name", ["own-untied", "llama", "gpt-neox"])
def test_adapters_that_peft_saved(tmp_path, name, init):
    import peft as judge

    model = MODELS[name]()
    base = theirs(model, tmp_path / "base") if name == "own-untied" else copy.deepcopy(model)
    layers = ["query_key_value", "dense_h_to_4h"] if name == "gpt-neox" else ["q_proj", "up_proj"]
    config = judge.LoraConfig(
        r=3, lora_alpha=7, target_modules=layers, lora_dropout=0.1, task_type="CAUSAL_LM",
        init_lora_weights=init,
    )  # fmt: skip
    wrapped = judge.get_peft_model(base, config).eval()
    for i, (part, parameter) in enumerate(wrapped.named_parameters()):
        if "lora_B" in part:
            parameter.data = 0.2 * randn(*parameter.shape, seed=i)
    wrapped.save_pretrained(tmp_path / "adapters")
    trained = lora.load_adapters(tmp_path / "adapters", model)
    assert len(trained) == 8
    assert all(p.requires_grad for p in trained)
    assert (logits(model) - logits(wrapped)).abs().max() < 1e-5
    layer = next(iter(lora.adapters(model).values()))
    layer.lora_A.data, layer.alpha = layer.lora_A.data.flip(0), 7
    assert (logits(model) - logits(wrapped)).abs().max() > 1e-4


def test_round_trip_replaces_what_was_there(tmp_path):
    model = moved(tiny_decoder())
    lora.save_adapters(tmp_path, model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [peft.CONFIG, peft.WEIGHTS]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
    other = moved(tiny_decoder(), 2, 9, ("q_proj",))
    plain = stored(other)
    for _ in range(2):
        lora.load_adapters(tmp_path, other)
        assert torch.equal(logits(other), logits(model))
    assert lora.adapters(other).keys() == lora.adapters(model).keys()
    assert stored(other).keys() == plain.keys()
    lora.save_adapters(tmp_path, moved(tiny_decoder(), 2, 9, ("q_proj",)))
    assert len(lora.load_adapters(tmp_path, other)) == 4
    assert len(lora.adapters(other)) == 2


def test_half_precision_files_are_read_as_float32(tmp_path):
    model = moved(tiny_decoder())
    lora.save_adapters(tmp_path, model)
    path = tmp_path / peft.WEIGHTS
    save_file({n: t.bfloat16() for n, t in load_file(path).items()}, path)
    lora.load_adapters(tmp_path, other := tiny_decoder())
    for ours, saved in zip(lora.adapters(other).values(), lora.adapters(model).values()):
        assert torch.equal(ours.lora_A, saved.lora_A.bfloat16().float())


def test_saving_that_is_refused(tmp_path):
    with raises("need adapters of one rank and alpha, the model has []"):
        lora.save_adapters(tmp_path, tiny_decoder())
    model = moved(tiny_decoder())
    model.get_submodule(V).alpha = 3
    with raises("need adapters of one rank and alpha, the model has [(4, 3), (4, 6.0)]"):
        lora.save_adapters(tmp_path, model)
    assert not list(tmp_path.iterdir())


def test_interrupted_save_keeps_the_old_files(tmp_path, monkeypatch):
    lora.save_adapters(tmp_path, moved(tiny_decoder()))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*args, **kwargs):
        save_file(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(peft, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lora.save_adapters(tmp_path, moved(tiny_decoder(), 2))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.fixture
def folder(tmp_path):
    lora.save_adapters(tmp_path, moved(tiny_decoder(), targets=("q_proj", "v_proj")))
    return tmp_path


def change(folder, **values):
    path = folder / peft.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refuse(folder, file, field, message):
    model = tiny_decoder()
    with pytest.raises(FormatError) as caught:
        lora.load_adapters(folder, model)
    assert str(caught.value) == f"{folder / file}: field '{field}': {message}"
    assert not lora.adapters(model)


OPTION = "only plain LoRA is read, which has no such option"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("peft_type", "LOHA", "need 'LORA'"),
        ("r", True, "is True; need a positive integer"),
        ("r", 0, "is 0; need a positive integer"),
        ("r", None, "is None; need a positive integer"),
        ("lora_alpha", "16", "is '16'; need a finite number"),
        ("lora_alpha", float("nan"), "is nan; need a finite number"),
        ("lora_alpha", float("-inf"), "is -inf; need a finite number"),
        ("lora_alpha", 10**999, f"is 1{'0' * 39}; need a finite number"),
        ("init_lora_weights", "pissa", "changes the base weights, which are not here"),
        ("init_lora_weights", [1], "changes the base weights, which are not here"),
        ("use_rslora", True, f"is True; {OPTION}"),
        ("use_dora", 1, f"is 1; {OPTION}"),
        ("bias", "lora_only", f"is 'lora_only'; {OPTION}"),
        ("fan_in_fan_out", True, f"is True; {OPTION}"),
        ("modules_to_save", ["lm_head"], f"is ['lm_head']; {OPTION}"),
        ("alpha_pattern", {Q: 3}, f"is {{'{Q}': 3}}; {OPTION}"),
        ("a_field_of_next_year", 2.5, f"is 2.5; {OPTION}"),
    ],
)
def test_config_that_is_wrong(folder, field, value, message):
    change(folder, **{field: value})
    refuse(folder, peft.CONFIG, field, message)


def test_files_that_are_wrong(folder):
    good = (folder / peft.CONFIG).read_text()
    for text, message in {
        "[]": "holds a list; need an object",
        '{"r": 1, "r": 2}': "the name 'r' is repeated",
        good[:-1]: f"Expecting ',' delimiter: line {good.count(chr(10)) + 1} column 1",
    }.items():
        (folder / peft.CONFIG).write_text(text)
        with pytest.raises(FormatError, match=re.escape(f"field 'json': {message}")):
            lora.load_adapters(folder, tiny_decoder())
    (folder / peft.CONFIG).write_text(good)
    path = folder / peft.WEIGHTS
    whole = path.read_bytes()
    for cut in (0, 5, 100, -1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FormatError, match=r"adapter_model\.safetensors: field 'header': "):
            lora.load_adapters(folder, tiny_decoder())
    path.unlink()
    refuse(folder, peft.WEIGHTS, "file", "this file is missing")
    (folder / peft.CONFIG).unlink()
    refuse(folder, peft.CONFIG, "file", "this file is missing")


def test_tensors_that_are_wrong(folder):
    path = folder / peft.WEIGHTS
    good = load_file(path)
    twin = KEY.replace("_A", "_B")

    def refused(tensors, key, message):
        save_file(tensors, path)
        refuse(folder, peft.WEIGHTS, key, message)

    missing = "this tensor is missing"
    refused({k: t for k, t in good.items() if k != KEY}, KEY, missing)
    refused({k: t for k, t in good.items() if k != twin}, twin, missing)
    refused({}, "header", "holds no adapters")
    a, b = good[KEY], good[twin]
    refused(good | {KEY: b, twin: a}, KEY, f"has shape [{b.shape[0]}, 4]; need [4, 32]")
    refused(good | {twin: b[1:].clone()}, twin, "has shape [31, 4]; need [32, 4]")
    dtypes = "need one of F32, F16, BF16"
    refused(good | {KEY: a.to(torch.int8)}, KEY, f"has dtype I8; {dtypes}")
    refused(good | {KEY: a.double()}, KEY, f"has dtype F64; {dtypes}")
    for bad in (torch.nan, -torch.inf):
        broken = a.clone()
        broken[3, 31] = bad
        refused(good | {KEY: broken}, KEY, "holds NaN or infinity")
    name = "is not named base_model.model.<layer>.lora_A.weight or B"
    for key in (KEY.replace("_A", "_C"), KEY[:-7], KEY + ".x", KEY.removeprefix("base_")):
        refused(good | {key: a.clone()}, key, name)
    key = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    refused(good | {key: a.clone()}, key, "the model has no such linear layer")
    change(folder, r=2**60)
    save_file(good, path)
    first = min(good)
    refuse(folder, peft.WEIGHTS, first, f"has shape [4, 32]; need [{2**60}, 32]")


# -- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_merged_model_computes_the_same(name):
    model = MODELS[name]()
    plain = {n: type(m) for n, m in model.named_modules()}
    before, with_adapters = logits(model), logits(moved(model))
    lora.merge(model)
    assert {n: type(m) for n, m in model.named_modules()} == plain
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(logits(model), with_adapters, rtol=1e-4, atol=1e-4)
    assert (before - with_adapters).abs().max() > 1e-2
    with raises("the model has no adapters to merge"):
        lora.merge(model)


def test_packed_layers_merge_only_on_request():
    model = tiny_decoder()
    qlib.quantize_model(model, "nf4", progress=False)
    before = logits(moved(model, targets=("q_proj", "v_proj")))
    found = f"{Q} [32, 32] is packed"
    with raises(f"{found}: merge(model, dequantize=True) makes it a dense float32 layer"):
        lora.merge(model)
    assert len(lora.adapters(model)) == 4
    lora.merge(model, dequantize=True)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    kinds = [type(m).__name__ for m in model.model.layers[0].self_attn.children()]
    assert kinds == ["Linear", "QLinear", "Linear", "QLinear"]


def test_merged_model_is_an_ordinary_checkpoint(tmp_path):
    model = moved(tiny_decoder(tied=False))
    before = logits(model)
    lora.merge(model)
    reference = theirs(model, tmp_path)
    torch.testing.assert_close(logits(reference), before, rtol=1e-4, atol=1e-4)
    qlib.quantize_model(model, "int8-g16", progress=False)
    assert 0 < (logits(model) - before).abs().mean() < 0.1


def test_adapters_of_a_model_quantized_afterwards():
    model = tiny_decoder()
    lora.add_adapters(model, targets=("q_proj",))
    qlib.quantize_model(model, "int4-g16", progress=False)
    assert isinstance(model.get_submodule(Q).base, QLinear)
    other = tiny_decoder()
    qlib.quantize_model(other, "int4-g16", progress=False)
    assert torch.equal(logits(model), logits(other))
