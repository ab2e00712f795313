"""The shipped small model, and the script that trained it (on a corpus of a few kilobytes)."""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from qlib.model import Config, Decoder

ROOT = Path(__file__).resolve().parents[1]
OWN = ROOT / "qlib" / "data" / "own"
SENTENCE = "The old man opened the door and looked at the children, but he did not say a word."


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import train_own_model

    config = Config(300, 32, 48, 1, 2, 1, 16, max_position_embeddings=16)
    tiny = train_own_model.Preset(config, batch=4, steps=6, rate=1e-2)
    monkeypatch.setitem(train_own_model.PRESETS, "small", tiny)
    return train_own_model


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n<|end|>\n".join(f"Title: Story {i}\n{SENTENCE} It was {i}." for i in range(20))
    for split in ("train", "val"):
        with lzma.open(folder / f"{split}.txt.xz", "wt", encoding="utf-8") as file:
            file.write(text)
    return folder


def run(script, monkeypatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_own_model.py", *map(str, words)])
    script.main()


def own_model() -> Decoder:
    config = Config.from_hf(json.loads((OWN / "config.json").read_text()))
    model = Decoder(config)
    model.load_state_dict(load_file(OWN / "model.safetensors"))
    return model.requires_grad_(False)


def loss_of(model: Decoder, tokens: list[int]) -> float:
    logits = model(torch.tensor([tokens[:-1]]))[0]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(tokens[1:])).item()


def test_shipped_model_predicts_english_and_not_its_reverse():
    model, tokenizer = own_model(), Tokenizer.from_file(str(OWN / "tokenizer.json"))
    tokens = tokenizer.encode(SENTENCE).ids
    assert loss_of(model, [0, *tokens]) < 4.0
    assert loss_of(model, [0, *tokens[::-1]]) > 5.0


def test_shipped_tokenizer_keeps_every_text_and_splits_digits():
    tokenizer = Tokenizer.from_file(str(OWN / "tokenizer.json"))
    text = "In 1905, naïve 象 \t\n x[3] = 2**10;"
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids) == text
    assert [t for t in encoding.tokens if t.isdigit()] == list("19053210")
    assert tokenizer.encode("<|bos|><|eos|>").ids == [0, 1]


def test_shipped_model_is_small_and_its_widths_suit_superblocks():
    assert (OWN / "model.safetensors").stat().st_size < 30e6
    for name, weight in load_file(OWN / "model.safetensors").items():
        assert weight.dtype == torch.bfloat16
        assert weight.shape[-1] % 256 == 0, name


def test_shipped_card_is_the_one_that_training_json_gives(script):
    import own_export

    record = json.loads((OWN / "training.json").read_text())
    config = json.loads((OWN / "config.json").read_text())
    assert record["parameters"] == sum(p.numel() for p in own_model().parameters())
    larger = script.preset_size(script.PRESETS["larger"])
    card = (OWN / "README.md").read_text()
    assert card == own_export.card(record, config, larger)
    record["validation_loss"] += 0.001
    assert card != own_export.card(record, config, larger)


def test_one_epoch_visits_every_window_once(script):
    import own_corpus

    # Values are positions, so a window tells where it was cut.
    stream, context, batch = np.arange(2, 402, dtype=np.uint16), 8, 3
    per_epoch = (len(stream) - 2 * context) // context // batch
    seen = [own_corpus.batch_at(stream, step, batch, context, 5) for step in range(per_epoch)]
    second = torch.cat(seen)[:, 1].sort().values
    assert torch.equal(second.diff(), torch.full((per_epoch * batch - 1,), context))
    assert all(tokens[: batch // 2, 0].eq(0).all() for tokens in seen)
    assert torch.equal(seen[1], own_corpus.batch_at(stream, 1, batch, context, 5))
    assert not torch.equal(seen[1], own_corpus.batch_at(stream, 1, batch, context, 6))
    assert not torch.equal(seen[0], own_corpus.batch_at(stream, per_epoch, batch, context, 5))


def test_a_resumed_run_ends_in_the_same_weights(script, monkeypatch, corpus, tmp_path):
    common = ["--corpus", corpus, "--log-every", 1, "--float32"]
    run(script, monkeypatch, *common, "--out", tmp_path / "whole", "--save-every", 4)
    whole = load_file(tmp_path / "whole/step_6/resume.safetensors")

    part = ["--out", tmp_path / "part", "--save-every", 4]
    run(script, monkeypatch, *common, *part)
    (tmp_path / "part/step_6").rename(tmp_path / "lost")
    run(script, monkeypatch, *common, *part, "--resume")
    again = load_file(tmp_path / "part/step_6/resume.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    four = load_file(tmp_path / "part/step_4/resume.safetensors")
    assert not torch.equal(whole["weight.model.norm.weight"], four["weight.model.norm.weight"])
    log = (tmp_path / "part/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_is_not_overwritten(script, monkeypatch, corpus, tmp_path):
    words = ["--corpus", corpus, "--out", tmp_path, "--steps", 1]
    run(script, monkeypatch, *words)
    with pytest.raises(SystemExit, match=r"step_1 exists: give --resume, or another --out$"):
        run(script, monkeypatch, *words)


def test_export_writes_a_folder_that_loads(script, monkeypatch, corpus, tmp_path):
    run(script, monkeypatch, "--corpus", corpus, "--out", tmp_path / "run", "--steps", 3)
    run(script, monkeypatch, "--export", tmp_path / "run/step_3", tmp_path / "own")
    assert sorted(path.name for path in (tmp_path / "own").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "training.json",
    ]
    record = json.loads((tmp_path / "own/training.json").read_text())
    assert (record["step"], record["tokens"], len(record["curve"])) == (3, 3 * 4 * 16, 1)
    config = Config.from_hf(json.loads((tmp_path / "own/config.json").read_text()))
    assert config == script.PRESETS["small"].config
    Decoder(config).load_state_dict(load_file(tmp_path / "own/model.safetensors"))


def test_the_clock_adds_up_over_a_resumption(script):
    import own_export

    assert own_export.seconds_of([{"seconds": s} for s in (10.0, 25.0, 5.0, 9.0)]) == 34.0
