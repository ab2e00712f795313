"""Files that qlib writes, run by llama.cpp itself: its tokens and log-probabilities beside ours.

From a file of F32 both compute the same, to rounding. From a quantized one llama.cpp also rounds
the inputs of every matrix product to 8 bits, which our decoder does not. How much that explains is
measured in each test: our decoder computes once more with inputs rounded in the same way, and
llama.cpp may differ from us by at most half as much again. Seen here: at most 1.2 times as much.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlib
from qlib import Calibration, ggml
from qlib.files import gguf, gguf_export, gguf_llama
from qlib.ggml import mixes

CLIENT = Path(__file__).parent / "llama_cpp_client.py"
PROMPTS = [
    "Once upon a time, in 1987,",
    '"It\'s no use," said the captain',
    "The garden  was full of",
]
TOKENS = 32


@pytest.fixture(scope="module")
def small():
    return qlib.load("bpw-small")


def ask(path, prompts=PROMPTS, tokens=TOKENS, vocabulary=1024, banned=()) -> list[dict]:
    """What llama.cpp says to the prompts, in a process of its own."""
    request = {"path": str(path), "prompts": prompts, "tokens": tokens}
    request |= {"context": 256, "vocabulary": vocabulary, "banned": list(banned)}
    run = subprocess.run(
        [sys.executable, CLIENT], input=json.dumps(request), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def log_probabilities(model, answers):
    """Ours at every position at which llama.cpp chose a token, [tokens, vocabulary]."""
    rows = []
    for answer in answers:
        ids, new = torch.tensor([answer["prompt"] + answer["ids"]]), len(answer["ids"])
        rows.append(F.log_softmax(model(ids)[0, -new - 1 : -1], dim=-1))
    return torch.cat(rows)


def theirs(answers):
    return torch.cat([torch.tensor(answer["logs"]) for answer in answers])


def round_to_q8_0(x):
    """32 inputs share a float16 scale, amax / 127."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, 0).round()
    return (codes * scale.half().float()).flatten(-2)


def round_to_q8_k(x):
    """256 inputs share a float32 scale, at which the largest one becomes -127."""
    blocks = x.unflatten(-1, (-1, 256))
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    factor = torch.where(largest == 0, 0, -127 / largest)
    codes = (blocks * factor).round().clamp(max=127)
    return torch.where(factor == 0, 0, codes / factor).flatten(-2)


def rounding_of(kind):
    if kind.block == 1:
        return lambda x: x.to(gguf_export.DENSE[kind.name]).float()
    return round_to_q8_0 if kind.block == 32 else round_to_q8_k


def with_rounded_inputs(path):
    """Our decoder of the file, with inputs of its matrix products as llama.cpp rounds them."""
    model, file = gguf_llama.load(path)[0], gguf.read(path)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            kind = file.tensors[gguf_llama.gguf_name(f"{name}.weight")].kind
            rounded = rounding_of(kind)
            layer.register_forward_pre_hook(lambda _, args, rounded=rounded: (rounded(args[0]),))
    head, rounded = model.head, rounding_of(file.tensors["token_embd.weight"].kind)
    model.head = lambda hidden: head(rounded(hidden))
    return model


def compare(path):
    """llama.cpp beside our decoder, which reads the same file: ids, and log-probabilities."""
    answers = ask(path)
    model, tokenizer = qlib.load(path)
    for prompt, answer in zip(PROMPTS, answers):
        assert answer["prompt"] == tokenizer.encode(prompt)
    assert all(len(answer["ids"]) == TOKENS for answer in answers)
    ours, theirs_ = log_probabilities(model, answers), theirs(answers)
    explained = (log_probabilities(with_rounded_inputs(path), answers) - ours).abs()
    difference = (theirs_ - ours).abs()
    assert difference.max() <= 1.5 * explained.max()
    assert difference.square().mean() <= 1.5**2 * explained.square().mean()
    chosen = torch.tensor([i for answer in answers for i in answer["ids"]])[:, None]
    # Where we would have chosen another token, the two were as good as equal to us.
    behind = ours.amax(-1, keepdim=True) - ours.gather(-1, chosen)
    assert behind.max() <= 2 * explained.max()
    assert (behind > 0).float().mean() <= 0.1
    return model, answers


def test_float32_file_gives_our_logits(small, tmp_path):
    path = tmp_path / "f32.gguf"
    gguf_export.export(*small, path, "F32")
    answers = ask(path)
    ours = log_probabilities(small[0], answers)
    assert (theirs(answers) - ours).abs().max() < 1e-4
    for prompt, answer in zip(PROMPTS, answers):
        start = torch.tensor([small[1].encode(prompt)])
        assert small[0].generate(start, TOKENS)[0].tolist() == answer["prompt"] + answer["ids"]


def test_one_changed_bit_is_noticed(small, tmp_path):
    path = tmp_path / "f32.gguf"
    gguf_export.export(*small, path, "F32")
    start = gguf.read(path).tensors["blk.1.ffn_down.weight"].start
    raw = bytearray(path.read_bytes())
    # The fourth exponent bit of one float32: the weight becomes 65536 times larger or smaller.
    raw[start + 4003] ^= 0x08
    path.write_bytes(raw)
    answers = ask(path)
    assert (theirs(answers) - log_probabilities(small[0], answers)).abs().max() > 1e-4


MIXES = "F16 BF16 Q8_0 Q6_K Q5_K_M Q4_K_M Q3_K_L Q2_K Q4_0 Q5_1 IQ4_XS IQ3_M TQ2_0".split()


@pytest.mark.parametrize("mix", MIXES)
def test_file_types(small, tmp_path, mix):
    gguf_export.export(*small, tmp_path / "x.gguf", mix)
    compare(tmp_path / "x.gguf")


@pytest.mark.parametrize("mix", ["Q4_K_S", "IQ3_XXS", "IQ2_XS", "IQ1_S"])
def test_file_types_with_an_importance(small, tmp_path, mix):
    text = Calibration.text(small[1], tokens=2048)
    gguf_export.export(*small, tmp_path / "x.gguf", mix, text)
    compare(tmp_path / "x.gguf")


def test_a_reader_that_is_wrong_is_noticed(small, tmp_path, monkeypatch):
    """The comparison fails if we decode a type 3% too large."""
    gguf_export.export(*small, tmp_path / "x.gguf", "Q5_K_S")
    right = ggml.READERS["Q5_K"]

    def wrong(blocks, out):
        right(blocks, out)
        out *= np.float32(1.03)

    monkeypatch.setitem(ggml.READERS, "Q5_K", wrong)
    with pytest.raises(AssertionError):
        compare(tmp_path / "x.gguf")


def test_own_mix(small, tmp_path):
    model, tokenizer = small
    kinds = ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q8_0"]
    errors = gguf_export.relative_errors(model, kinds)
    shapes = {name: w.shape for name, w in gguf_export.named_weights(model) if name in errors}
    own = mixes.for_bits(5.0, errors, shapes, kinds)
    assert len(set(own.types.values())) > 2
    report = gguf_export.export(model, tokenizer, tmp_path / "x.gguf", own.types)
    assert 4.9 < report.bits_per_weight < 5.1
    compare(tmp_path / "x.gguf")


def test_layers_that_were_quantized_before(tmp_path):
    """Their bytes go into the file as they are: llama.cpp runs the model that we have in memory."""
    model, tokenizer = qlib.load("bpw-small")
    qlib.quantize_model(model, "q4_k", progress=False)
    gguf_export.export(model, tokenizer, tmp_path / "x.gguf", "F32")
    loaded, answers = compare(tmp_path / "x.gguf")
    ours, read = log_probabilities(model, answers), log_probabilities(loaded, answers)
    assert (ours - read).abs().max() < 1e-3


def test_rows_in_the_wrong_order_are_noticed(small, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_export, "pairs_from_halves", lambda rows, heads: rows)
    gguf_export.export(*small, tmp_path / "x.gguf", "Q8_0")
    answers = ask(tmp_path / "x.gguf")
    assert (theirs(answers) - log_probabilities(small[0], answers)).abs().max() > 3


def test_bos_is_added_if_the_file_says_so(small, tmp_path):
    gguf_export.export(*small, tmp_path / "x.gguf", "Q8_0", add_bos=True)
    (answer,) = ask(tmp_path / "x.gguf", ["Once"], 1)
    assert answer["prompt"] == [small[1].bos_id, *small[1].encode("Once")]


HARD = [
    "  two  spaces\n\n\nand\tlines ",
    "Größe, naïve 東京 🙂 ﷺ",
    "<|eos|><|bos|> 12345 don't I'LL",
]
HARD += ['x=3.14;y[0]!="a"//\\n', "½²③ Ⅷ ١٢٣", "a\u0301 e\u200b  \u00a0\u3000end"]


def test_tokens_are_the_same(small, tmp_path):
    gguf_export.export(*small, tmp_path / "x.gguf", "Q8_0")
    answers = ask(tmp_path / "x.gguf", HARD, 1)
    assert [answer["prompt"] for answer in answers] == [small[1].encode(text) for text in HARD]
