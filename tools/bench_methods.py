"""Quality and speed of GPTQ, AWQ, HQQ and AutoRound beside the public tools: `make bench`.

    .venv/bin/python tools/bench_methods.py                    # everything, an hour or two
    .venv/bin/python tools/bench_methods.py --bits 4 --group 128 --rounds 3 --only GPTQ
    .venv/bin/python tools/bench_methods.py --model smollm2-135m-4 --only "qlib awq"

Every contestant quantizes the same weights with the same calibration tokens in a process of its
own, and leaves the dequantized weights; one piece of code then judges them all. Rows go to
book/results/methods_bench.json as they are measured, each in place of its older self.

The clock covers quantization alone, not imports and loading. Rounds are interleaved and the least
of each contestant's times counts, so that a busy machine slows all of them alike; where it is
busy, processor seconds say more than wall seconds.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from statistics import fmean

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import qlib
from qlib.calibrate import Calibration
from qlib.files import hf
from qlib.files.atomic import replacing
from qlib.metrics import proxy_loss
from qlib.recipe import decoder_linears
from qlib.zoo import NAMES

ROOT = Path(__file__).parents[1]
PEERS, VENVS = ROOT / "tools" / "peers", ROOT / ".venv-bench"
RESULTS = ROOT / "book" / "results" / "methods_bench.json"
WINDOWS, CONTEXT, TOKENS = 32, 256, 12_288
# Model -> groups that divide its widths: 256 and 512; 576 and 1536, real weights.
MODELS = {"bpw-small": (128, 32), "smollm2-135m-4": (64, 32)}
MATRIX = 4096
COSTS = ("seconds", "cpu_seconds", "loaded_mib", "peak_mib")
KEY = ("model", "bits", "group", "name")


# What the defaults mean where contestants of a family differ.
RUNNING, FIXED = "scales of the updated weights", "scales of the original weights"
ONCE, IN_TURN = "one pass for a block", "one pass for each of q/k/v, o, gate/up, down"
PARENT = "scales from activations and weights, by the error of attention or MLP; v/o left out"
SETTINGS = {
    "qlib gptq": f"damping 0.01, {FIXED}, {ONCE}",
    "qlib gptq-act-order": f"order of activations, damping 0.01, {FIXED}, {ONCE}",
    "llm-compressor GPTQ, column order": f"damping 0.01, {FIXED}, {ONCE}",
    "llm-compressor GPTQ": f"order of activations, damping 0.01, {FIXED}, {ONCE}",
    "gptqmodel, column order": f"damping 0.05, {RUNNING}, {IN_TURN}",
    "gptqmodel": f"order of activations by groups, damping 0.05, {RUNNING}, {IN_TURN}",
    "gptqmodel, desc_act": f"groups in order of activations, damping 0.05, {RUNNING}, {IN_TURN}",
    "qlib awq": "scales from activations, by the error of the layers",
    "qlib awq-clip": "scales from activations, by the error of the layers; ranges from all tokens",
    "llm-compressor AWQ": PARENT,
    "auto-round AWQ": PARENT,
    "auto-round AWQ, clip": f"{PARENT}; ranges from 512 tokens",
    "hqq": "at 4 bits the first zero point is rounded",
    "qlib autoround": "4 windows a step",
    "auto-round": "8 windows a step; float32 in place of bfloat16",
}


@dataclasses.dataclass(frozen=True)
class Contestant:
    """`peer` names the runner tools/peers/run_<peer>.py and its environment."""

    family: str
    name: str
    peer: str
    method: str
    options: dict


def contestants(steps: int) -> list[Contestant]:
    """Peers run with their defaults; a row more makes them do what we do where these differ."""
    rows = [
        ("RTN", "qlib rtn", "qlib", "rtn", {}),
        ("GPTQ", "qlib gptq", "qlib", "gptq", {}),
        ("GPTQ", "llm-compressor GPTQ, column order", "llmcompressor", "gptq", {"actorder": None}),
        ("GPTQ", "gptqmodel, column order", "gptqmodel", "gptq", {"act_group_aware": False}),
        ("GPTQ", "qlib gptq-act-order", "qlib", "gptq-act-order", {}),
        ("GPTQ", "llm-compressor GPTQ", "llmcompressor", "gptq", {}),
        ("GPTQ", "gptqmodel", "gptqmodel", "gptq", {}),
        ("GPTQ", "gptqmodel, desc_act", "gptqmodel", "gptq", {"desc_act": True}),
        ("AWQ", "qlib awq", "qlib", "awq", {}),
        ("AWQ", "llm-compressor AWQ", "llmcompressor", "awq", {}),
        ("AWQ", "auto-round AWQ", "auto_round", "awq", {}),
        ("AWQ", "qlib awq-clip", "qlib", "awq-clip", {}),
        ("AWQ", "auto-round AWQ, clip", "auto_round", "awq", {"apply_clip": True}),
        ("HQQ", "qlib hqq", "qlib", "hqq", {"format": "offset"}),
        ("HQQ", "hqq", "hqq", "hqq", {}),
        ("AutoRound", "qlib autoround", "qlib", "autoround", {"steps": steps}),
        ("AutoRound", "auto-round", "auto_round", "autoround", {"iters": steps}),
    ]
    return [Contestant(*row) for row in rows]


def python(peer: str) -> Path:
    """The interpreter of a peer's environment, made from its pins where these have changed.

    The peers' requirements exclude each other's, so each has an environment of its own.
    """
    if peer == "qlib":
        return Path(sys.executable)
    venv, pins = VENVS / peer, PEERS / f"{peer}.txt"
    interpreter, stamp = venv / "bin" / "python", venv / "installed"
    if not stamp.is_file() or stamp.read_text() != pins.read_text():
        print(f"installing {peer} in {venv.relative_to(ROOT)} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        pip = [interpreter, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
        # First and alone, so that no other package decides which build of torch comes.
        subprocess.run([*pip, pins.read_text().split("\n")[0]], check=True)
        subprocess.run([*pip, "-r", pins], check=True)
        stamp.write_text(pins.read_text())
    return interpreter


class Arena:
    """A folder with the model and the tokens; `run` sends one contestant into it."""

    def __init__(self, folder: Path, threads: int):
        self.folder, self.threads = folder, threads
        self.inputs: dict = {}
        self.failed: list[str] = []

    def run(self, one: Contestant, **task) -> tuple[dict, dict[str, Tensor]]:
        """(measurements, tensors); raises RuntimeError with the end of the log if it fails."""
        path = self.folder / "run" / "task.json"
        path.parent.mkdir(exist_ok=True)
        task = {**self.inputs, **task, "method": one.method, "options": one.options}
        path.write_text(json.dumps(task))
        done = subprocess.run(
            [python(one.peer), PEERS / f"run_{one.peer}.py", path],
            cwd=path.parent,
            env=os.environ | self.limits(),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"{one.name}: {done.stderr.strip()[-1500:]}")
        result = json.loads(path.with_name("result.json").read_text())
        return result, load_file(path.with_name("weights.safetensors"))

    def limits(self) -> dict[str, str]:
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")
        # gptqmodel asks for two workers at least; its processor seconds show if they help.
        workers = {"GPTQMODEL_CPU_WORKERS": str(max(2, self.threads)), "HF_HUB_OFFLINE": "1"}
        return dict.fromkeys(names, str(self.threads)) | workers


def load(name: str) -> tuple[nn.Module, object]:
    """A model by name; "<name>-<n>" is one that ends after its first n layers."""
    if name in NAMES:
        return qlib.load(name)
    name, _, layers = name.rpartition("-")
    model, tokenizer = qlib.load(name)
    model.config = dataclasses.replace(model.config, num_hidden_layers=int(layers))
    model.model.layers = model.model.layers[: int(layers)]
    return model, tokenizer


class Judge:
    """The reference model, and what it computes on the calibration and evaluation tokens."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, protocol: qlib.Protocol, windows: Tensor):
        self.model, self.dense = model, model.state_dict()
        self.reference = qlib.Reference(model, protocol)
        self.hessians: dict[str, Tensor] = {}
        self.blocks: list[tuple[tuple, Tensor]] = []
        hooks = [layer.register_forward_hook(self._see_block) for layer in model.model.layers]
        for name, linear in decoder_linears(model).items():
            hooks.append(linear.register_forward_hook(partial(self._see_linear, f"{name}.weight")))
        model.hidden(windows)
        for hook in hooks:
            hook.remove()

    def _see_block(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        self.blocks.append((inputs, output))

    def _see_linear(self, name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        x = inputs[0].flatten(0, -2)
        self.hessians[name] = x.T @ x / len(x)

    @torch.no_grad()
    def judge(self, tensors: dict[str, Tensor], bits: int, group: int) -> dict:
        """KL on the evaluation text, and the errors of layers and blocks on the calibration text.

        `layer_error` is the mean of tr(E H E^T) / tr(W H W^T), None where a method moved scales
        between layers; `block_error` the mean relative squared error of what the decoder blocks
        put out for the inputs that they have in the original model.
        Raises ValueError if a group of a weight holds more than 2^bits values.
        """
        state = {name: tensors[name] for name in self.dense}
        for name in self.hessians:
            index = tensors.get(name.replace(".weight", ".g_idx"))
            check_grid(name, state[name], index, bits, group)
        model = copy.deepcopy(self.model)
        model.load_state_dict(state)
        found = qlib.divergence(self.reference, model, self.reference.protocol)
        rest = self.dense.keys() - self.hessians.keys()
        folded = not all(torch.equal(state[name], self.dense[name]) for name in rest)
        return {
            "kl": found.kl,
            "kl_error": found.standard_error,
            "layer_error": None if folded else self.layer_error(state),
            "block_error": self.block_error(model),
        }

    def layer_error(self, state: dict[str, Tensor]) -> float:
        """Mean over the layers of the error that GPTQ minimizes."""
        pairs = self.hessians.items()
        return fmean(proxy_loss(self.dense[name], state[name], h) for name, h in pairs)

    def block_error(self, model: nn.Module) -> float:
        """Mean over the blocks, each on the inputs that it has in the original model."""
        pairs = zip(model.model.layers, self.blocks, strict=True)
        seen = ((layer(*inputs), output) for layer, (inputs, output) in pairs)
        return fmean(((y - z).square().sum() / z.square().sum()).item() for y, z in seen)


def check_grid(name: str, weight: Tensor, g_idx: Tensor | None, bits: int, group: int) -> None:
    """Raise ValueError if a group of a row holds more than 2^bits values."""
    if g_idx is not None:
        weight = weight[:, g_idx.argsort(stable=True)]
    ordered = weight.reshape(-1, group).sort(dim=1).values
    most = 1 + int((ordered.diff(dim=1) != 0).sum(dim=1).max())
    if most > 2**bits:
        raise ValueError(f"{name}: {most} values in a group of {group} that has {bits} bits")


def bench_model(name: str, chosen: list[Contestant], arena: Arena, arguments) -> None:
    """All bits and groups on one model, with quality."""
    model, tokenizer = load(name)
    protocol = qlib.Protocol.of(tokenizer, "evaluation", tokens=TOKENS, context=CONTEXT)
    tokens = WINDOWS * (CONTEXT - 1)
    windows = torch.stack(Calibration.text(tokenizer, tokens=tokens, context=CONTEXT).windows)
    hf.save_checkpoint(arena.folder / "model", model.config, model.state_dict(), tokenizer)
    save_file({"tokens": windows.contiguous()}, arena.folder / "windows.safetensors")
    arena.inputs = {n: str(arena.folder / n) for n in ("model", "windows.safetensors")}
    judge = Judge(model, protocol, windows)
    for bits in arguments.bits:
        for group in arguments.group or MODELS[name]:
            key = {"model": name, "bits": bits, "group": group}
            bench(key, chosen, arena, arguments.rounds, judge)


def bench_matrix(chosen: list[Contestant], arena: Arena, arguments) -> None:
    """Speed alone, on one Gaussian matrix, of the methods that need no data."""
    arena.inputs = {"matrix": MATRIX}
    plain = [one for one in chosen if one.family == "HQQ"]
    for bits in arguments.bits:
        key = {"model": f"gaussian-{MATRIX}", "bits": bits, "group": 64}
        bench(key, plain, arena, arguments.rounds, None)


def bench(
    key: dict, chosen: list[Contestant], arena: Arena, rounds: int, judge: Judge | None
) -> None:
    """Interleaved rounds of one task; the weights of the first are judged."""
    rows: dict[str, dict] = {}
    for _ in range(rounds):
        for one in chosen:
            try:
                result, tensors = arena.run(one, bits=key["bits"], group=key["group"])
            except RuntimeError as error:
                print(error, file=sys.stderr)
                arena.failed.append(one.name)
                continue
            old = rows.get(one.name)
            if old is None and judge:
                result |= judge.judge(tensors, key["bits"], key["group"])
            settings = {"settings": SETTINGS.get(one.name, "")}
            rows[one.name] = merged(key | dataclasses.asdict(one) | settings, old, result)
            write(rows[one.name], arena.threads)


def merged(identity: dict, old: dict | None, result: dict) -> dict:
    """The row after one more round: what was judged stays, the least of every cost counts."""
    old = old or {"rounds": 0}
    costs = {name: min(result[name], old.get(name, result[name])) for name in COSTS}
    return identity | result | old | costs | {"rounds": old["rounds"] + 1}


def write(row: dict, threads: int) -> None:
    """Show a row and put it on the board, in place of the older one of the same key."""
    show(row)
    board = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"rows": []}
    rows = {tuple(old[part] for part in KEY): old for old in board["rows"]}
    today = datetime.date.today().isoformat()
    rows[tuple(row[part] for part in KEY)] = row | {"threads": threads, "date": today}
    board = {
        "command": "tools/bench_methods.py",
        "device": f"CPU ({platform.machine()}), float32",
        "calibration": f"calibration, {WINDOWS} windows of {CONTEXT} tokens with a BOS each",
        "protocol": f"evaluation, {TOKENS:,} tokens, context {CONTEXT}, stride {CONTEXT}, BOS",
        "clock": "quantization alone, without imports and loading; least of the rounds",
        "rows": list(rows.values()),
    }
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(board, indent=1) + "\n")


def show(row: dict) -> None:
    """One line of the table."""
    figures = [row.get(name) for name in ("kl", "kl_error", "layer_error", "block_error")]
    quality = " ".join(f"{'-':>9}" if x is None else f"{x:9.2e}" for x in figures)
    where = f"{row['model']} {row['bits']} bits g{row['group']}"
    costs = f"{row['seconds']:8.2f} s {row['cpu_seconds']:8.2f} s {row['peak_mib']:6.0f} MiB"
    print(f"{where:28} {row['name']:34} {quality} {costs}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=[*MODELS, "matrix"])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", help="families, or parts of names")
    parser.add_argument("--steps", type=int, default=200, help="of AutoRound")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    chosen = [
        one
        for one in contestants(arguments.steps)
        if not arguments.only or any(w == one.family or w in one.name for w in arguments.only)
    ]
    print(f"{'':63} {'KL':>9} {'+-':>9} {'layers':>9} {'blocks':>9} {'wall':>10} {'processor':>10}")
    failed = []
    for name in arguments.model or ["bpw-small", "matrix"]:
        with tempfile.TemporaryDirectory() as folder:
            arena = Arena(Path(folder), arguments.threads)
            if name == "matrix":
                bench_matrix(chosen, arena, arguments)
            else:
                bench_model(name, chosen, arena, arguments)
            failed += arena.failed
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
