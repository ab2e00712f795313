"""A quantized model saved and loaded: same bytes, same logits; broken folders are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import qlib
from qlib.errors import FormatError
from qlib.files import checkpoint
from qlib.linear import QLinear
from qlib.model import Config, Decoder

TINY = Config(61, 32, 48, 2, 4, 2, 8, max_position_embeddings=64)
RULES = qlib.Recipe("int4-g16-asym", rules=(("*.0.mlp.*", "nvfp4"), ("*.k_proj", None)))


def quantized_model() -> Decoder:
    model = Decoder(TINY).normal_init(0.2, torch.Generator().manual_seed(0))
    qlib.quantize_model(model.requires_grad_(False), RULES, progress=False)
    return model


def logits(model: Decoder) -> torch.Tensor:
    return model(torch.arange(20).view(2, 10))


def test_a_model_comes_back_with_the_same_bytes(tmp_path):
    model = quantized_model()
    qlib.save(model, tmp_path)
    loaded, tokenizer = qlib.load(tmp_path)
    assert tokenizer is None
    assert torch.equal(logits(model), logits(loaded))
    pairs = dict(loaded.named_modules())
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QLinear)}
    assert len(packed) == 12
    for name, layer in packed.items():
        assert pairs[name].weight.tobytes() == layer.weight.tobytes()
        assert pairs[name].format == layer.format


def test_one_flipped_bit_changes_the_logits(tmp_path):
    model = quantized_model()
    qlib.save(model, tmp_path)
    name = "model.layers.1.mlp.down_proj.weight.codes"
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    with qlib.files.native._open(path) as file:
        metadata = file.metadata()
    tensors[name][0, 0] ^= 1
    save_file(tensors, path, metadata=metadata)
    loaded, _ = qlib.load(tmp_path)
    assert not torch.equal(logits(model), logits(loaded))


def test_the_tokenizer_travels_with_the_model(tmp_path):
    model, tokenizer = qlib.load("bpw-small")
    qlib.quantize_model(model, "int3-g64", progress=False)
    qlib.save(model, tmp_path, tokenizer)
    loaded, again = qlib.load(tmp_path)
    ids = again.encode("Once upon a time")
    assert ids == tokenizer.encode("Once upon a time")
    assert torch.equal(model(torch.tensor([ids])), loaded(torch.tensor([ids])))


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_config_that_does_not_fit_is_refused(tmp_path):
    qlib.save(quantized_model(), tmp_path)
    rewrite_config(tmp_path, num_hidden_layers=2**31)
    message = (
        f"{tmp_path}/model.safetensors: field 'model.layers.2.input_layernorm.weight': "
        "is missing; the config needs [32]"
    )
    with pytest.raises(FormatError) as caught:
        qlib.load(tmp_path)
    assert str(caught.value) == message
    rewrite_config(tmp_path, num_hidden_layers=1)
    with pytest.raises(FormatError, match="is not part of a llama decoder of this config"):
        qlib.load(tmp_path)


def test_a_packed_embedding_is_refused(tmp_path):
    model = quantized_model()
    packed = qlib.quantize(model.model.embed_tokens.weight, "int8-row")
    dense = {n: t for n, t in Decoder(TINY).state_dict().items() if "embed" not in n}
    qlib.save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    qlib.files.native.save_tensors(path, {"model.embed_tokens.weight": packed}, dense)
    with pytest.raises(FormatError, match="does not belong to a linear layer"):
        checkpoint.load(tmp_path)


def test_unknown_containers_name_the_known_one(tmp_path):
    with pytest.raises(ValueError, match="unknown container 'quib': did you mean 'qlib'"):
        qlib.save(quantized_model(), tmp_path, container="quib")


def test_other_models_are_not_saved_but_told_how(tmp_path):
    with pytest.raises(TypeError) as caught:
        qlib.save(torch.nn.Linear(2, 2), tmp_path)
    need = "save takes a model from qlib.load, not a Linear; quantize that one instead"
    assert str(caught.value) == need


def test_what_is_no_tensor_and_no_format_is_named():
    with pytest.raises(TypeError) as caught:
        qlib.quantize([1.0], "int4")
    takes = "quantize takes a torch.Tensor (torch.from_numpy), quantize_model a model"
    assert str(caught.value) == f"weight is a list; {takes}"
    with pytest.raises(TypeError) as caught:
        qlib.quantize(torch.nn.Linear(2, 2), "int4")
    assert str(caught.value) == f"weight is a Linear; {takes}"
    with pytest.raises(TypeError) as caught:
        qlib.quantize(torch.ones(2, 2), 4)
    assert str(caught.value) == "format is 4; give a name such as 'int4-g128', or a Scheme"


def test_generation_needs_a_batch():
    with pytest.raises(ValueError, match=r"tokens must be integers \[batch, length\], got \[3\]"):
        quantized_model().generate(torch.tensor([1, 2, 3]), 4)


def test_wrong_paths_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        qlib.load(tmp_path)
    assert str(caught.value) == f"{tmp_path} is not a model folder: it has no config.json"
    with pytest.raises(ValueError, match=r"no such file or folder: .*/nowhere\.gguf"):
        qlib.load(tmp_path / "nowhere.gguf")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is one file of a model; load its folder, "):
        qlib.load(tmp_path / "model.safetensors")
