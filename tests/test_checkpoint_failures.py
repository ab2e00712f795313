"""Saving that goes wrong: a full disk, a process killed half way. The old file stays whole."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import torch
from tiny_models import tiny_decoder

import qlib
from qlib.recipe import quantize_model

START = """
    import os, resource, signal, sys
    sys.path.insert(0, {tests!r})
    import safetensors.torch
    from tiny_models import tiny_decoder
    import qlib
    model = tiny_decoder()
    qlib.quantize_model(model, "int8-g16", progress=False)
"""
# A file may not grow beyond 4 kB: what a writer sees is what a full disk shows it.
FULL = START + "    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
KILLED = (
    START
    + """
    write = safetensors.torch.save_file
    def half(tensors, path, **options):
        write(tensors, path, **options)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    safetensors.torch.save_file = half
"""
)
SAVE = "    qlib.save(model, {folder!r})\n"


def run(code: str, folder: Path) -> subprocess.CompletedProcess:
    code = textwrap.dedent(code.format(tests=str(Path(__file__).parent), folder=str(folder)))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def old_model(folder: Path) -> dict[str, torch.Tensor]:
    model = tiny_decoder()
    quantize_model(model, "int4-g16", progress=False)
    qlib.save(model, folder)
    return model.state_dict()


def assert_is(folder: Path, state: dict[str, torch.Tensor]) -> None:
    loaded = qlib.load(folder)[0].state_dict()
    assert list(loaded) == list(state)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_full_disk_leaves_the_old_model_whole_and_no_litter(tmp_path):
    state = old_model(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    failed = run(FULL + SAVE, tmp_path)
    assert failed.returncode == 1
    assert "File too large" in failed.stderr
    assert_is(tmp_path, state)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_killed_while_writing_leaves_the_old_model_whole(tmp_path):
    state = old_model(tmp_path)
    assert run(KILLED + SAVE, tmp_path).returncode == -9
    assert_is(tmp_path, state)


def test_the_same_run_without_a_failure_replaces_the_model(tmp_path):
    state = old_model(tmp_path)
    assert run(START + SAVE, tmp_path).returncode == 0
    found = qlib.load(tmp_path)[0].state_dict()
    name = "model.layers.0.mlp.up_proj.codes"
    assert found[name].shape != state[name].shape
