"""Hugging Face folders: round trips, transformers as the judge, and folders that lie."""

from __future__ import annotations

import json
import os

import pytest
import tokenizers
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlib.errors import FormatError
from qlib.files import hf
from qlib.files.assemble import parameter_shapes
from qlib.model import Config, Decoder
from qlib.tokenizer import Tokenizer

CONFIG = Config(61, 32, 48, 2, 4, 2, 8, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
UNTIED = Config(**{**CONFIG.__dict__, "tie_word_embeddings": False, "rope_theta": 500.0})
INDEX = "model.safetensors.index.json"


def decoder(config=CONFIG):
    generator = torch.Generator().manual_seed(0)
    return Decoder(config).normal_init(0.2, generator).requires_grad_(False)


def small_tokenizer():
    vocabulary = {"<s>": 0, "</s>": 1} | {c: i + 2 for i, c in enumerate("abcdefgh1")}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.add_special_tokens(["<s>", "</s>"])
    backend.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(backend, 0, 1)


def prompt():
    return torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path):
    hf.save_checkpoint(tmp_path, CONFIG, decoder().state_dict(), small_tokenizer())
    return tmp_path


def shard(folder, limit=9000):
    hf.save_checkpoint(folder, CONFIG, decoder().state_dict(), max_shard_bytes=limit)
    return sorted(path.name for path in folder.glob("*.safetensors"))


def refuse(folder, message, call=hf.load):
    with pytest.raises(FormatError) as caught:
        call(folder)
    assert str(caught.value) == f"{folder}{message}"


def change(path, **values):
    raw = json.loads(path.read_text())
    raw.update(values)
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
def test_parameter_shapes_are_the_decoders(config):
    shapes = {name: tuple(t.shape) for name, t in Decoder(config).state_dict().items()}
    assert dict(parameter_shapes(config)) == shapes


@pytest.mark.parametrize("config", [CONFIG, UNTIED])
@pytest.mark.parametrize("limit", [None, 9000])
def test_round_trip(tmp_path, config, limit):
    model = decoder(config)
    tensors = model.state_dict()
    hf.save_checkpoint(tmp_path, config, tensors, small_tokenizer(), {"a": "b"}, limit)
    assert (tmp_path / INDEX).exists() == (limit is not None)
    loaded, tokenizer = hf.load(tmp_path)
    assert loaded.config == config
    assert torch.equal(loaded(prompt()), model(prompt()))
    assert tokenizer.encode("abc</s>") == [2, 3, 4, 1]
    assert tokenizer.decode([2, 3, 4, 1]) == "abc</s>"
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (11, 0, 1)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt", "a": "b"}


@pytest.mark.parametrize("limit", [None, 9000])
def test_transformers_computes_the_same_logits(tmp_path, limit):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = decoder(UNTIED)
    hf.save_checkpoint(
        tmp_path, UNTIED, model.state_dict(), small_tokenizer(), max_shard_bytes=limit
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(prompt()).logits
    assert (logits - model(prompt())).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(tmp_path)("bad1</s>").input_ids == [3, 2, 5, 10, 1]
    # The twin: one weight of one shard moves, and the comparison sees it.
    path = max(tmp_path.glob("*.safetensors"))
    tensors = load_file(path)
    max(tensors.items())[1].view(-1)[5] += 1
    save_file(tensors, path, {"format": "pt"})
    assert (hf.load(tmp_path)[0](prompt()) - logits).abs().max() > 1e-4


def test_dtype_and_mapping(folder):
    assert {p.dtype for p in hf.load(folder, torch.bfloat16)[0].parameters()} == {torch.bfloat16}
    path = folder / "model.safetensors"
    before = path.read_bytes()
    model, _ = hf.load(folder)
    # What is mapped is private: training the model does not write into the file.
    for parameter in model.parameters():
        parameter.fill_(7)
    assert path.read_bytes() == before
    if os.path.exists("/proc/self/maps"):
        with open("/proc/self/maps") as maps:
            assert str(path) in maps.read()


def test_replacing_a_checkpoint_leaves_nothing_behind(tmp_path):
    many = shard(tmp_path)
    assert len(many) > 2
    hf.save_checkpoint(tmp_path, CONFIG, decoder().state_dict())
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]
    assert shard(tmp_path) == many


def test_interrupted_save_keeps_the_old_checkpoint(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(*args, **kwargs):
        save_file(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(hf, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hf.save_checkpoint(folder, UNTIED, decoder(UNTIED).state_dict())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_every_file_has_ordinary_permissions(folder):
    (folder / "other").touch()
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_nothing_to_store(tmp_path):
    with pytest.raises(ValueError, match="cannot store 0 tensors in files of None bytes"):
        hf.save_checkpoint(tmp_path, CONFIG, {})
    with pytest.raises(ValueError, match="cannot store 20 tensors in files of 0 bytes"):
        hf.save_checkpoint(tmp_path, CONFIG, decoder().state_dict(), max_shard_bytes=0)


def test_missing_files(folder):
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        (folder / name).unlink()
        refuse(folder, f"/{name}: field 'file': this file is missing")


def test_config_that_is_wrong(folder):
    path = folder / "config.json"
    good = path.read_text()
    change(path, num_hidden_layers=2**31)
    name = "model.layers.2.input_layernorm.weight"
    refuse(folder, f": field '{name}': this tensor is missing")
    change(path, num_hidden_layers=2, intermediate_size=2**60)
    name = "model.layers.0.mlp.gate_proj.weight"
    message = f"has shape [48, 32], but the config needs [{2**60}, 32]"
    refuse(folder, f": field '{name}': {message}")
    change(path, intermediate_size=48, num_attention_heads="4")
    message = "config: num_attention_heads must be a positive integer, got '4'"
    refuse(folder, f"/config.json: field 'config': {message}")
    change(path, num_attention_heads=4, tie_word_embeddings="no")
    refuse(folder, "/config.json: field 'tie_word_embeddings': need true or false")
    for text, start in {
        "[1]": "holds a list; need an object",
        '{"a": 1, "a": 2}': "the name 'a' is repeated",
        "[" * 100_000: "maximum recursion depth exceeded while decoding a JSON array",
        good[:-1]: "Expecting ',' delimiter",
    }.items():
        path.write_text(text)
        with pytest.raises(FormatError) as caught:
            hf.load(folder)
        assert str(caught.value).startswith(f"{path}: field 'json': {start}")
    path.write_bytes(b'{"a": "\xff"}')
    refuse(folder, "/config.json: field 'text' at byte 7: is not valid UTF-8")


def test_tokenizer_that_is_wrong(folder):
    path = folder / "tokenizer.json"
    path.write_text('{"version": "1.0"}')
    with pytest.raises(FormatError, match=r"tokenizer\.json: field 'tokenizer': "):
        hf.load(folder)
    big = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(i): i for i in range(62)}, unk_token="0")
    )
    big.save(str(path))
    message = "has 62 tokens, but the model has 61"
    refuse(folder, f"/tokenizer.json: field 'tokenizer': {message}")


def test_tensors_that_are_wrong(folder):
    path = folder / "model.safetensors"
    good = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(good | {name: good[name].to(torch.int8)}, path)
    message = "has dtype I8; need one of F64, F32, F16, BF16"
    refuse(folder, f"/model.safetensors: field '{name}': {message}")
    save_file(good | {"model.layers.1.self_attn.q_proj.bias": torch.zeros(32)}, path)
    message = "this tensor is not part of a llama decoder of this config"
    refuse(folder, f": field 'model.layers.1.self_attn.q_proj.bias': {message}")
    # Neither changes the function, so neither is refused.
    harmless = {"lm_head.weight": torch.zeros(61, 32), "a.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(good | harmless, path)
    assert torch.equal(hf.load(folder)[0](prompt()), decoder()(prompt()))


@pytest.mark.parametrize("cut", [0, 5, 100, -1])
def test_truncated_safetensors(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(FormatError, match=r"model\.safetensors: field 'header': "):
        hf.load(folder)


def test_index_that_is_wrong(tmp_path):
    names = shard(tmp_path)
    path = tmp_path / INDEX
    good = json.loads(path.read_text())["weight_map"]
    norm = "model.norm.weight"
    for bad in ("../" + names[0], "/etc/x.safetensors", "a\\b.safetensors", "config.json", 3):
        change(path, weight_map=good | {norm: bad})
        message = f"shard {bad!r} is not the name of a .safetensors file"
        refuse(tmp_path, f"/{INDEX}: field 'weight_map': {message}", hf.Tensors)
    change(path, weight_map=good | {norm: "model-9.safetensors"})
    refuse(tmp_path, "/model-9.safetensors: field 'file': this file is missing", hf.Tensors)
    change(path, weight_map=good | {"x": names[0]})
    refuse(tmp_path, f"/{INDEX}: field 'x': this tensor is missing from the shards", hf.Tensors)
    change(path, weight_map={k: v for k, v in good.items() if k != norm})
    message = f"/{INDEX}: field '{norm}': this tensor is missing from the index"
    refuse(tmp_path, message, hf.Tensors)
    change(path, weight_map=[])
    message = f"/{INDEX}: field 'weight_map': need an object that maps tensors to shards"
    refuse(tmp_path, message, hf.Tensors)
    change(path, weight_map=good)
    first, last = (load_file(tmp_path / name) for name in (names[0], names[-1]))
    save_file(last | first, tmp_path / names[-1])
    name = min(first)
    refuse(
        tmp_path, f"/{names[-1]}: field '{name}': this tensor is also in another shard", hf.Tensors
    )


def test_a_name_twice_in_a_header(tmp_path):
    """safetensors itself keeps one of the two and says nothing."""
    hf.save_checkpoint(tmp_path, CONFIG, decoder().state_dict(), small_tokenizer())
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].rstrip()
    name, entry = next(item for item in json.loads(header).items() if item[0] != "__metadata__")
    again = header[:-1] + f", {json.dumps(name)}: {json.dumps(entry)}}}".encode()
    path.write_bytes(len(again).to_bytes(8, "little") + again + content[8 + size :])
    with pytest.raises(FormatError) as caught:
        hf.load(tmp_path)
    assert str(caught.value) == f"{path}: field 'header': the name {name!r} is repeated"
