"""Train the project's own small model from scratch, and export a checkpoint as qlib/data/own.

    PYTHONPATH=. python tools/train_own_model.py --corpus CORPUS --out RUN --compile
    PYTHONPATH=. python tools/train_own_model.py --corpus CORPUS --out RUN --compile --resume
    PYTHONPATH=. python tools/train_own_model.py --corpus CORPUS --out RUN --compile \\
        --preset larger --device cuda
    PYTHONPATH=. python tools/train_own_model.py --export RUN/step_N qlib/data/own

CORPUS is a folder with train.txt.xz and val.txt.xz: documents separated by lines ``<|end|>``.
The schedule counts steps, never seconds, so a run follows from its seed and its arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from own_corpus import BOS, EOS, batch_at, prepare, windows
from own_export import export
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlib.model import Config, Decoder


@dataclass(frozen=True)
class Preset:
    """What is trained, in which steps: ``batch`` windows of the context length each."""

    config: Config
    batch: int
    steps: int
    rate: float


PRESETS = {
    # About 105 minutes on one CPU core.
    "small": Preset(
        Config(1024, 256, 512, 3, 4, 2, 64, 1e-5, 1e4, True, 256, BOS, EOS), 16, 13000, 3e-3
    ),
    # For a data-centre GPU.  More than 20 epochs of a corpus this small would mostly memorize it.
    "larger": Preset(
        Config(2048, 512, 1024, 3, 8, 4, 64, 1e-5, 1e4, True, 512, BOS, EOS), 128, 3000, 2e-3
    ),
}


def preset_size(preset: Preset) -> tuple[int, int]:
    """Return the parameters and the training tokens of a preset."""
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(preset.config).parameters())
    return parameters, preset.steps * preset.batch * preset.config.max_position_embeddings


def validation_loss(model: Decoder, stream: np.ndarray, count: int = 128) -> float:
    """Return the mean loss in nats per token of ``count`` evenly spaced windows behind <|bos|>."""
    context = model.config.max_position_embeddings
    starts = np.linspace(0, len(stream) - context - 1, count).astype(np.int64)
    tokens = windows(stream, starts, context + 1)
    tokens[:, 0] = BOS
    device = model.model.embed_tokens.weight.device
    total = 0.0
    with torch.no_grad():
        for part in tokens.to(device).split(16):
            logits = model(part[:, :-1])
            total += F.cross_entropy(
                logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"
            ).item()
    return total / (count * context)


def rate_at(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine from ``peak`` down to 1% of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def make_optimizer(model: Decoder) -> torch.optim.AdamW:
    """AdamW; the norms' gains are not decayed."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    gains = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def save_checkpoint(out: Path, step: int, model: Decoder, optimizer: torch.optim.AdamW) -> None:
    """Write out/step_N: a Hugging Face folder plus what --resume needs; it appears whole."""
    temporary, final = out / f".step_{step}.tmp", out / f"step_{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    weights = {name: p.detach().to(torch.bfloat16).cpu() for name, p in model.named_parameters()}
    save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
    write_json(temporary / "config.json", model.config.to_hf() | {"torch_dtype": "bfloat16"})
    shutil.copy(out / "tokenizer.json", temporary)
    shutil.copy(out / "log.jsonl", temporary)
    shutil.copy(out / "run.json", temporary)
    state = {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
    for index, p in enumerate(model.parameters()):
        for key in ("exp_avg", "exp_avg_sq", "step"):
            state[f"{key}.{index}"] = optimizer.state[p][key]
    save_file(state, temporary / "resume.safetensors")
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)


def restore(folder: Path, model: Decoder, optimizer: torch.optim.AdamW) -> None:
    """Load float32 weights and optimizer state that ``save_checkpoint`` wrote."""
    state = load_file(folder / "resume.safetensors")
    with torch.no_grad():
        for index, (name, p) in enumerate(model.named_parameters()):
            p.copy_(state[f"weight.{name}"])
            for key in ("exp_avg", "exp_avg_sq", "step"):
                optimizer.state[p][key] = state[f"{key}.{index}"].to(p.device)


def newest_checkpoint(out: Path) -> Path | None:
    found = sorted(out.glob("step_*"), key=lambda path: int(path.name.split("_")[1]))
    return found[-1] if found else None


def trim_log(path: Path, step: int) -> None:
    """Drop log lines after ``step``, which a resumed run will write again."""
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in lines))


def log_line(out: Path, **values: float) -> None:
    line = json.dumps({key: round(value, 6) for key, value in values.items()})
    print(line, flush=True)
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write(line + "\n")


def start(args: argparse.Namespace, config: Config) -> tuple[Decoder, torch.optim.AdamW, int]:
    """Return the model, its optimizer and the first step: 0, or the newest checkpoint's."""
    generator = torch.Generator().manual_seed(args.seed)
    model = Decoder(config).normal_init(generator=generator).to(args.device)
    optimizer = make_optimizer(model)
    newest = newest_checkpoint(args.out)
    if newest is None:
        (args.out / "log.jsonl").write_text("")
        return model, optimizer, 0
    if not args.resume:
        raise SystemExit(f"{newest} exists: give --resume, or another --out")
    restore(newest, model, optimizer)
    step = int(newest.name.split("_")[1])
    trim_log(args.out / "log.jsonl", step)
    return model, optimizer, step


def describe_run(args: argparse.Namespace, preset: Preset, tokens: int) -> dict[str, object]:
    return {
        "preset": args.preset,
        "seed": args.seed,
        "steps": args.steps,
        "batch_tokens": preset.batch * preset.config.max_position_embeddings,
        "peak_rate": preset.rate,
        "corpus_tokens": tokens,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu, one thread",
        "matmuls": "float32" if args.float32 else "bfloat16 autocast",
        "torch": torch.__version__,
    }


def make_step(
    args: argparse.Namespace, model: Decoder, optimizer: torch.optim.AdamW
) -> Callable[[Tensor, float], Tensor]:
    """Return the function that does one optimizer step on a batch and returns its loss."""

    def loss_of(tokens: Tensor) -> Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=not args.float32):
            logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())

    forward = torch.compile(loss_of) if args.compile else loss_of

    def step(tokens: Tensor, rate: float) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = forward(tokens.to(args.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def train(args: argparse.Namespace) -> None:
    """Run the schedule to its end, logging and saving along the way."""
    preset = PRESETS[args.preset]
    context = preset.config.max_position_embeddings
    prepare(args.corpus, args.out, preset.config.vocab_size)
    stream, held_out = np.load(args.out / "train.npy"), np.load(args.out / "val.npy")
    write_json(args.out / "run.json", describe_run(args, preset, len(stream)))
    model, optimizer, first = start(args, preset.config)
    take_step = make_step(args, model, optimizer)
    recent, began = [], time.time()
    for done in range(first + 1, args.steps + 1):
        rate = rate_at(done - 1, args.steps, preset.rate)
        tokens = batch_at(stream, done - 1, preset.batch, context, args.seed)
        recent.append(take_step(tokens, rate))
        if done % args.log_every == 0 or done == args.steps:
            log_line(
                args.out,
                step=done,
                tokens=done * preset.batch * context,
                train_loss=torch.stack(recent).mean().item(),
                validation_loss=validation_loss(model, held_out),
                rate=rate,
                seconds=time.time() - began,
            )
            recent = []
        if done % args.save_every == 0 or done == args.steps:
            save_checkpoint(args.out, done, model, optimizer)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--corpus", type=Path, help="folder with train.txt.xz and val.txt.xz")
    parser.add_argument("--out", type=Path, help="folder of the run: tokens, log, checkpoints")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--steps", type=int, help="length of the schedule (default: the preset's)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--float32", action="store_true", help="no bfloat16 autocast in matmuls")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile (needs a C++ compiler)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--log-every", type=int, default=250)
    parser.add_argument("--save-every", type=int, default=1250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--export", type=Path, nargs=2, metavar=("CHECKPOINT", "FOLDER"))
    args = parser.parse_args()
    if args.export is None and (args.corpus is None or args.out is None):
        parser.error("--corpus and --out are needed to train")
    args.steps = args.steps or PRESETS[args.preset].steps
    return args


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.export:
        export(*args.export, larger=preset_size(PRESETS["larger"]))
    else:
        train(args)


if __name__ == "__main__":
    main()
