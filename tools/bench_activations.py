"""Quality of SmoothQuant and LLM.int8() beside llm-compressor and bitsandbytes.

    .venv/bin/python tools/bench_activations.py                   # both models
    .venv/bin/python tools/bench_activations.py --model smollm2-135m --tokens 1536 --only LLM.int8

Every contestant quantizes the same weights with the same calibration tokens; the peers run in
processes of their own and leave their hidden states before the head. One piece of code judges all
of them against the original model. Rows go to book/results/activations_bench.json as they are
measured, each in place of its older self.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from bench_methods import PEERS, python
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlib
from qlib.calibrate import Calibration
from qlib.files import hf
from qlib.files.atomic import replacing
from qlib.methods import Method, llm_int8
from qlib.methods.smoothquant import smoothquant
from qlib.recipe import Recipe, quantized
from qlib.rules import RECIPES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "book" / "results" / "activations_bench.json"
WINDOWS, CONTEXT, TOKENS = 16, 256, 12_288
MODELS = ("bpw-small", "smollm2-135m")
KEY = ("model", "name")

# Scales of activations: for each token as it comes, or one for the tensor from calibration.
TOKEN, STATIC = "for each token", "static, one for the tensor"
RECIPE = {TOKEN: RECIPES["w8a8"], STATIC: RECIPES["w8a8-static"]}
PEER = {
    TOKEN: {"strategy": "token", "dynamic": True},
    STATIC: {"strategy": "tensor", "dynamic": False},
}


@dataclass(frozen=True)
class Contestant:
    """Ours has a `recipe`; a peer is a method of tools/peers/run_activations.py in the environment
    `venv`, with options."""

    family: str
    name: str
    scales: str
    recipe: Recipe | None = None
    venv: str = "qlib"
    method: str = ""
    options: dict = field(default_factory=dict)


def contestants() -> Iterator[Contestant]:
    """llm-compressor smooths what norms write; a row of ours does the same, and others do more."""
    for scales, recipe in RECIPE.items():
        yield Contestant("SmoothQuant", f"qlib w8a8, {scales}", scales, recipe)
        for alpha in (0.5, 0.8):
            norms = partial(smoothquant, alpha=alpha, norms_only=True)
            every = partial(smoothquant, alpha=alpha)
            for where, function in (("norms", norms), ("all folds", every)):
                name = f"qlib smoothquant {alpha}, {where}, {scales}"
                chosen = recipe.with_method(Method("smoothquant", function, "block"))
                yield Contestant("SmoothQuant", name, scales, chosen)
            options = {"strength": alpha, "activations": PEER[scales]}
            name = f"llm-compressor SmoothQuant {alpha}, {scales}"
            peer = ("llmcompressor", "smoothquant", options)
            yield Contestant("SmoothQuant", name, scales, None, *peer)
        searched = recipe.with_method("smoothquant-search")
        yield Contestant("SmoothQuant", f"qlib smoothquant search, {scales}", scales, searched)
    ours = Recipe(llm_int8.INT8, method=llm_int8.quantize, activations=llm_int8.LLMInt8())
    yield Contestant("LLM.int8", "qlib llm.int8", TOKEN, ours)
    peer = ("qlib", "llm.int8", {"threshold": 6.0})
    yield Contestant("LLM.int8", "bitsandbytes LLM.int8()", TOKEN, None, *peer)


class Listening(nn.Module):
    """The model, and the batches that it is asked for: the peers are given the same ones."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.head, self.batches = model, model.head, []

    def hidden(self, tokens: Tensor) -> Tensor:
        self.batches.append(tokens.contiguous())
        return self.model.hidden(tokens)


class Replay(nn.Module):
    """A model that has computed its hidden states already."""

    def __init__(self, model: nn.Module, states: dict[str, Tensor]):
        super().__init__()
        self.model, self.head = model, model.head
        self.states = [states[str(i)] for i in range(len(states))]

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.states.pop(0)


class Arena:
    """A folder with a model and the tokens, and what the model computes on them."""

    def __init__(self, name: str, folder: Path, tokens: int):
        self.name, self.folder = name, folder
        self.model, tokenizer = qlib.load(name)
        self.protocol = qlib.Protocol.of(tokenizer, "evaluation", tokens=tokens, context=CONTEXT)
        listening = Listening(self.model)
        self.reference = qlib.Reference(listening, self.protocol)
        calibration = WINDOWS * (CONTEXT - 1)
        self.data = Calibration.text(tokenizer, tokens=calibration, context=CONTEXT)
        hf.save_checkpoint(folder / "model", self.model.config, self.model.state_dict(), tokenizer)
        save_file({"tokens": torch.stack(self.data.windows)}, folder / "windows.safetensors")
        batches = {str(i): batch for i, batch in enumerate(listening.batches)}
        save_file(batches, folder / "evaluation.safetensors")

    def run(self, one: Contestant) -> dict:
        """One row of the board. Raises RuntimeError with the end of the log if a peer fails."""
        if one.recipe is None:
            result = self.peer(one)
            model = Replay(self.model, load_file(self.folder / "states.safetensors"))
            return result | self.judge(model)
        with quantized(self.model, one.recipe, None, self.data, progress=False) as report:
            versions = {"torch": torch.__version__, "qlib": metadata.version("bits-per-weight")}
            return {"seconds": report.seconds, "versions": versions} | self.judge(self.model)

    def peer(self, one: Contestant) -> dict:
        names = ("model", "windows.safetensors", "evaluation.safetensors")
        task = {name: str(self.folder / name) for name in names}
        path = self.folder / "task.json"
        path.write_text(json.dumps(task | {"method": one.method, "options": one.options}))
        done = subprocess.run(
            [python(one.venv), PEERS / "run_activations.py", path],
            cwd=self.folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{one.name}: {done.stderr.strip()[-1500:]}")
        return json.loads((self.folder / "result.json").read_text())

    def judge(self, model: nn.Module) -> dict:
        found = qlib.divergence(self.reference, model, self.protocol)
        return {
            "kl": found.kl,
            "kl_error": found.standard_error,
            "top1": found.top1,
            "perplexity": found.perplexity.value,
            "perplexity_error": found.perplexity.standard_error,
            "reference_perplexity": found.reference_perplexity.value,
        }


def write(row: dict, arena: Arena) -> None:
    """Put a row on the board, in place of the older one of the same key."""
    board = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    rows = {tuple(old[part] for part in KEY): old for old in board["rows"]}
    row |= {"protocol": str(arena.protocol), "calibration": str(arena.data)}
    row |= {"date": datetime.date.today().isoformat()}
    rows[tuple(row[part] for part in KEY)] = row
    board = {
        "command": "tools/bench_activations.py",
        "device": f"CPU ({platform.machine()}), float32",
        "rows": list(rows.values()),
    }
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(board, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of the evaluation text")
    parser.add_argument("--only", nargs="+", help="families, or parts of names")
    arguments = parser.parse_args()
    failed = []
    for name in arguments.model or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            arena = Arena(name, Path(folder), arguments.tokens)
            for one in contestants():
                if arguments.only and not any(w in (one.family + one.name) for w in arguments.only):
                    continue
                try:
                    result = arena.run(one)
                except RuntimeError as error:
                    print(error, file=sys.stderr)
                    failed.append(one.name)
                    continue
                said = {"model": name, "family": one.family, "name": one.name}
                write(said | {"activations": one.scales} | result, arena)
                kl, error = result["kl"], result["kl_error"]
                print(f"{name:14} {one.name:62} KL {kl:.5f} +- {error:.5f}", flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
