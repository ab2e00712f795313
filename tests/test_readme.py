"""The README's example runs as printed, and its map names files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def example() -> str:
    return re.search(r"```python\n(.*?)```", README, re.S)[1]


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(example(), "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "4.125 bpw" in printed
    assert "21 layers quantized" in printed
    assert re.search(r"method +gptq\n +calibration +4,096 tokens", printed)
    assert re.search(r"KL 0\.0\d+ ± ", printed)
    assert (tmp_path / "out/small-int4" / "model.safetensors").is_file()


def test_a_wrong_format_name_in_the_example_would_be_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="unknown format 'int4-128'"):
        exec(compile(example().replace("int4-g128", "int4-128"), "README.md", "exec"), {})


def test_the_map_names_what_exists():
    rows = re.findall(r"^\| (`.+?) \|", README, re.M)
    assert len(rows) > 15
    for row in rows:
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = Path(first).parent
        for name in (Path(first), *(folder / other for other in others)):
            assert (ROOT / name).exists(), name
