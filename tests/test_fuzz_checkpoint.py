"""Mutated model folders are refused or read rightly; what has once gone wrong stays here."""

from __future__ import annotations

import json

import fuzz_checkpoint as fuzz
import pytest
import torch

import qlib
from qlib.errors import FormatError
from qlib.files import hf


@pytest.fixture(scope="module")
def seeds():
    return fuzz.seeds()


def test_every_seed_is_read(tmp_path, seeds):
    assert len(seeds) == len(fuzz.SEEDS) + 1
    assert hf.INDEX in seeds[0]
    for seed in seeds:
        assert fuzz.check(tmp_path / "model", seed) == "read"


def test_a_thousand_mutated_folders():
    outcomes, failures = fuzz.run(0, 1000)
    assert failures == {}
    assert outcomes["refused"] > 500
    assert outcomes["read"] > 30


def test_settings_that_are_no_object(tmp_path, seeds):
    """Found by fuzzing: MLX's settings beside a number. All the weights are dense, so it reads."""
    folder = dict(seeds[0])
    config = json.loads(folder["config.json"]) | {"quantization": {}, "quantization_config": 7}
    folder["config.json"] = json.dumps(config).encode()
    assert fuzz.check(tmp_path / "model", folder) == "read"


def wrong_values(path):
    model, tokenizer = RIGHT(path)
    model.model.norm.weight.data[0] += 1
    return model, tokenizer


def wrong_error(path):
    raise KeyError("x")


def long_message(path):
    raise FormatError(path, "x", "y" * 5000)


def wrong_codes(path):
    model, tokenizer = RIGHT(path)
    model.model.layers[0].mlp.up_proj.codes[0, 0] ^= 1
    return model, tokenizer


def hungry(path):
    torch.ones(1 << 27)
    return RIGHT(path)


RIGHT = qlib.load


@pytest.mark.parametrize(
    "wrong",
    [wrong_values, wrong_error, long_message, wrong_codes, hungry],
    ids=lambda f: f.__name__,
)
def test_the_check_itself_fails_for_a_wrong_loader(tmp_path, seeds, monkeypatch, wrong):
    monkeypatch.setattr(qlib, "load", wrong)
    with pytest.raises((AssertionError, KeyError)):
        fuzz.check(tmp_path / "model", seeds[4])
