"""The README's example and commands run as printed, and its map names files that exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import qlib
from qlib import cli
from qlib.cli.arguments import parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(number: int = 0) -> str:
    return re.findall(r"```python\n(.*?)```", README, re.S)[number]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "4.125 bpw" in printed
    assert "21 layers quantized" in printed
    assert re.search(r"method +gptq\n +calibration +4,096 tokens", printed)
    assert re.search(r"KL 0\.0\d+ ± ", printed)
    assert (tmp_path / "out/small-int4" / "model.safetensors").is_file()


def test_the_example_of_activations_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"qlib": qlib}
    exec(compile(example(1), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"activations +int8, block row, .*, dynamic \(18 layers\)\n", printed)
    assert re.search(r" e4m3, block row, .*, dynamic \(3 layers\)\n", printed)
    back, _ = qlib.load("out/w4a8")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(back(ids), names["model"](ids))
    assert back.model.layers[0].mlp.down_proj.inputs == qlib.inputs("fp8_e4m3")
    assert {"w8a8", "w4a8", "w4a4", "fp8", "llm.int8"} <= set(qlib.recipes())


def test_the_example_of_rotations_and_caches_runs(capsys):
    names = {"torch": torch, "qlib": qlib}
    exec(compile(example(2), "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert re.search(r"activations +uint4, block row, .*, dynamic \(21 layers\)\n", printed)
    # In 16 bits a token of this model takes 1,536 bytes, in 3 bits 3 / 16 of that.
    cache = names["cache"]
    assert f"\n{cache.bytes_per_token}\n" in printed
    assert 1536 > cache.bytes_per_token > 1536 * 3 / 16


def test_the_example_of_adapters_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "qlib": qlib}
    exec(compile(example(3), "README.md", "exec"), names)
    assert names["report"].bits_per_weight <= 5.0
    assert names["losses"][-1] < names["losses"][0]
    assert (tmp_path / "out/adapter" / "adapter_config.json").is_file()


def test_the_example_of_kernels_runs(capsys):
    names = {"torch": torch, "qlib": qlib}
    exec(compile(example(4), "README.md", "exec"), names)
    expected = names["x"] @ names["q"].dequantize().T
    torch.testing.assert_close(names["y"], expected, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out.startswith("cpu.nibbles.gemv, 1 row of activations\n")


def test_a_wrong_format_name_in_the_example_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown format 'int4-128'"):
        exec(compile(example().replace("int4-g128", "int4-128"), "README.md", "exec"), {})


def commands() -> list[list[str]]:
    """The arguments of every line of the section "Command line"."""
    block = re.search(r"## Command line\n.*?```sh\n(.*?)```", README, re.S)[1]
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert all(line[0] == "qlib" for line in lines)
    return [line[1:] for line in lines]


def test_the_commands_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = {}
    for arguments in commands():
        assert cli.main([*arguments, "--json"]) == 0
        found[arguments[0]] = json.loads(capsys.readouterr().out)
    assert found.keys() == cli.COMMANDS.keys()
    assert found["quantize"]["calibration"].startswith("4,096 tokens")
    assert found["convert"]["file"]["mix"] == "BF16"
    assert found["inspect"]["bytes"] == found["convert"]["file"]["bytes"]
    assert 0 < found["eval"]["kl"] < 0.1


def test_a_wrong_option_in_a_command_would_be_noticed():
    with pytest.raises(SystemExit):
        parser().parse_args([*commands()[0], "--formt", "nf4"])


def test_the_map_names_what_exists():
    rows = re.findall(r"^\| (`.+?) \|", README, re.M)
    assert len(rows) > 15
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = Path(first).parent
        for name in (Path(first), *(folder / other for other in others)):
            assert (ROOT / name).exists(), name
