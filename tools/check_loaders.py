"""Do other tools compute with our GPTQ and AWQ files what we do? Writes some and asks them.

    .venv/bin/python tools/check_loaders.py
    .venv/bin/python tools/check_loaders.py --only act-order

Every file is loaded by transformers with the plain kernels of gptqmodel, in the environment that
tools/bench_methods.py makes for it, and the AWQ files by mlx-lm too. The table compares their
logits with ours: the largest difference beside the largest change that quantization made. The last
files of each model are false on purpose and must differ. Exits with 1 unless all is as it must be.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from bench_methods import PEERS, python
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlib
from qlib.files import quantized
from qlib.linear import QLinear, replace_layer
from qlib.model import Config, Decoder
from qlib.qtensor import QTensor
from qlib.reordered import Reordered
from qlib.tokenizer import Tokenizer

# Kernels round weights or products to float16; what a wrong bit does is hundreds of times larger.
TOLERANCE = 0.02
# The heads must fill whole words, as all widths must.
TINY = Config(1024, 64, 128, 2, 4, 2, 32, tie_word_embeddings=False, max_position_embeddings=64)


def minus_one(folder: Path) -> None:
    """From version 2 to version 1: store 4-bit zero points minus one, each by itself."""

    def change(words: Tensor) -> Tensor:
        codes = words.reshape(-1).view(torch.uint8)
        low, high = codes - 1 & 15, (codes >> 4) - 1 & 15
        return (low | high << 4).view(torch.int32).view(words.shape)

    _change_zeros(folder, change)
    _change_config(folder, format="gptq", checkpoint_format="gptq")


def claim_version_1(folder: Path) -> None:
    """False: the zero points stay as they are."""
    _change_config(folder, format="gptq", checkpoint_format="gptq")


def flip(folder: Path) -> None:
    """False: one bit of every zero point."""
    _change_zeros(folder, lambda words: words ^ 0x22222222)


def _change_zeros(folder: Path, change: Callable[[Tensor], Tensor]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors |= {n: change(t) for n, t in tensors.items() if n.endswith(".qzeros")}
    save_file(tensors, path, metadata={"format": "pt"})


def _change_config(folder: Path, **values: str) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"].update(values)
    path.write_text(json.dumps(config))


# name: container, format, columns reordered?, what is done to the folder, whether it stays true
CASES = {
    "gptq, 4 bits symmetric, v1": ("gptq", "int4-g32", False, None, True),
    "gptq, 4 bits asymmetric, v1": ("gptq", "int4-g32-asym", False, minus_one, True),
    "gptq, 4 bits asymmetric, v2": ("gptq", "int4-g32-asym", False, None, True),
    "gptq, whole rows": ("gptq", "int4-row", False, None, True),
    "gptq, 2 bits symmetric": ("gptq", "int2-g32", False, None, True),
    "gptq, 3 bits symmetric": ("gptq", "int3-g32", False, None, True),
    "gptq, 3 bits asymmetric": ("gptq", "int3-g32-asym", False, None, True),
    "gptq, 8 bits symmetric": ("gptq", "int8-g32", False, None, True),
    "gptq, act-order symmetric": ("gptq", "int4-g32", True, None, True),
    "gptq, act-order asymmetric": ("gptq", "int4-g32-asym", True, None, True),
    "awq": ("awq", "int4-g32-asym", False, None, True),
    "awq, symmetric": ("awq", "int4-g32", False, None, True),
    "awq, one layer dense": ("awq", "int4-g32-asym", "dense", None, True),
    "false gptq: v2 called v1": ("gptq", "int4-g32-asym", False, claim_version_1, False),
    "false awq: zero points": ("awq", "int4-g32-asym", False, flip, False),
}


def models() -> Iterator[tuple[str, Callable[[], tuple[Decoder, Tokenizer]]]]:
    """Makers of the models, so that each case gets a fresh one."""
    own = qlib.load("bpw-small")[1]

    def tiny() -> tuple[Decoder, Tokenizer]:
        model = Decoder(TINY).normal_init(0.1, torch.Generator().manual_seed(0))
        return model.eval().requires_grad_(False), own

    yield "tiny", tiny
    yield "bpw-small", lambda: qlib.load("bpw-small")


def write(folder: Path, model: Decoder, tokenizer: Tokenizer, case: str) -> None:
    """Quantize the layers of `model` and save them as `case` wants it."""
    container, name, kind, change, _ = CASES[case]
    for layer, module in list(model.named_modules()):
        left_out = layer == "lm_head" or (kind == "dense" and layer.endswith("0.mlp.down_proj"))
        if isinstance(module, nn.Linear) and not left_out:
            q = quantize(module.weight, name, kind is True)
            replace_layer(model, layer, QLinear(q, module.bias))
    quantized.save(folder, model, tokenizer, container=container)
    if change is not None:
        change(folder)


def quantize(weight: Tensor, name: str, reordered: bool) -> QTensor:
    """Round to nearest, in groups of columns of about the same size if `reordered`."""
    if not reordered:
        return qlib.quantize(weight, name)
    return Reordered(qlib.format(name)).quantize(weight, order=weight.abs().sum(0).argsort())


def by_transformers(folders: list[Path], interpreter: Path) -> dict[str, Tensor | str]:
    """The logits of each folder, or what went wrong."""
    command = [interpreter, PEERS / "run_loader.py", *folders]
    # gptqmodel leaves a folder of logs where it is started.
    subprocess.run(command, check=True, capture_output=True, cwd=folders[0].parent)
    return {f.name: _result(f) for f in folders}


def _result(folder: Path) -> Tensor | str:
    error = folder / "error.txt"
    return error.read_text() if error.exists() else load_file(folder / "logits.st")["logits"]


def by_mlx(folders: list[Path], tokens: Tensor) -> dict[str, Tensor | str]:
    """The logits of each AWQ folder."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    found = {}
    for folder in folders:
        model, _ = load_model(folder)
        model.set_dtype(mx.float32)
        logits = model(mx.array(tokens.tolist()))
        found[folder.name] = torch.from_numpy(np.array(logits.astype(mx.float32)))
    return found


def main() -> int:
    """Write, load, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--python", type=Path, help="interpreter with transformers and gptqmodel")
    options = parser.parse_args()
    cases = [name for name in CASES if options.only in name]
    interpreter = (options.python or python("gptqmodel")).absolute()
    tokens = torch.randint(1024, (2, 24), generator=torch.Generator().manual_seed(0))
    good = True
    for name, make in models():
        with tempfile.TemporaryDirectory() as scratch:
            good &= check(name, make, cases, tokens, interpreter, Path(scratch))
    return 0 if good else 1


@torch.no_grad()
def check(name, make, cases, tokens: Tensor, interpreter: Path, scratch: Path) -> bool:
    """One model in all cases; whether everything is as it must be."""
    original = make()[0](tokens)
    folders, ours = [], {}
    for case in cases:
        model, tokenizer = make()
        folders.append(scratch / case)
        write(folders[-1], model, tokenizer, case)
        save_file({"tokens": tokens}, folders[-1] / "tokens.st")
        ours[case] = model(tokens)
    found = {"transformers": by_transformers(folders, interpreter)}
    found["mlx-lm"] = by_mlx([f for f in folders if CASES[f.name][0] == "awq" and
                              CASES[f.name][2] != "dense"], tokens)  # fmt: skip
    good = True
    for reader, results in found.items():
        for case, logits in results.items():
            good &= report(f"{name:10} {reader:13} {case:30}", logits, ours[case], original,
                           CASES[case][4])  # fmt: skip
    return good


def report(label: str, logits, ours: Tensor, original: Tensor, true: bool) -> bool:
    """Print one line; whether it is as it must be."""
    if isinstance(logits, str):
        print(f"{label} {logits}", flush=True)
        return False
    difference, change = ((x - ours).abs().max().item() for x in (logits, original))
    good = (difference < TOLERANCE) == true
    verdict = "ok" if good else "WRONG"
    print(f"{label} {difference:9.2g} of {change:7.2g}  {verdict}", flush=True)
    return good


if __name__ == "__main__":
    sys.exit(main())
