"""Turn a checkpoint of tools/train_own_model.py into the folder that the repository ships."""

from __future__ import annotations

import json
import math
import os
from itertools import pairwise
from pathlib import Path

from safetensors.torch import load_file

CARD = """# The project's own small model

A Llama-family language model with {parameters:,} parameters, trained from scratch by
`tools/train_own_model.py`. It exists so that every experiment of the book has a real, trained model
that runs in seconds on one CPU core. Its widths are multiples of 256, which the superblocks of the
k-quants and power-of-two Hadamard matrices need.

## Architecture

| field | value |
|---|---|
{architecture}

The tokenizer is a byte-level BPE with {vocab_size:,} entries, trained on the training text. Every
digit is a token of its own; `<|bos|>` is token 0 and `<|eos|>` token 1.

## Data

Training text: 31 MB of English, 128 public-domain books, mostly children's and adventure novels,
{corpus_tokens:,} tokens. Validation text: five other public-domain books (0.9 MB). The text is not
part of the repository, and nothing reads it at run time.

## Training

| | |
|---|---|
| steps | {step:,} of {steps:,} |
| tokens per step | {batch_tokens:,} in windows of {context} |
| tokens seen | {tokens:,} ({epochs:.1f} epochs, {tokens_per_parameter:.1f} per parameter) |
| optimizer | AdamW, betas 0.9 and 0.95, weight decay 0.1 on matrices, gradient norm clipped at 1 |
| learning rate | 200 steps of warm-up to {peak_rate:g}, then a cosine down to 1% of it |
| precision | float32 weights and optimizer state; {matmuls} for matrix products |
| device | {device}, {minutes:.0f} minutes, torch {torch} |
| seed | {seed} |
| validation loss | {validation_loss:.3f} nats per token (perplexity {validation_perplexity:.1f}) |

The validation loss is the mean over 128 evenly spaced windows of {context} tokens, each behind
`<|bos|>`. The loss curve:

| step | tokens | training loss | validation loss |
|---:|---:|---:|---:|
{curve}

{note}All of it is in `training.json`, from which this page is generated.

## What it shows, and what it does not

It writes grammatical fragments in the style of its books; it knows no facts and follows no
instructions. How sharply a model reacts to coarse rounding depends on how many tokens each of its
parameters has seen, and this one has seen far fewer than a production model: expect its quality to
fall later and less steeply than SmolLM2's. Use SmolLM2 for conclusions about real models.

## Reproducing it

    PYTHONPATH=. python tools/train_own_model.py --corpus CORPUS --out RUN --compile
    PYTHONPATH=. python tools/train_own_model.py --export RUN/step_{step} qlib/data/own

`CORPUS` is a folder with `train.txt.xz` and `val.txt.xz`, documents separated by lines of
`<|end|>`. The batches depend only on the seed and the step, the schedule also on `--steps`. An
interrupted run goes on with `--resume` from its newest checkpoint. Another machine rounds
differently, so the weights agree in quality, not bit for bit.

With a CUDA device, a larger model of the same family:

    PYTHONPATH=. python tools/train_own_model.py --corpus CORPUS --out RUN --preset larger \\
        --device cuda --compile

This recipe has {larger_parameters:,} parameters and {larger_tokens:,} tokens, many epochs of a
corpus of this size, so prefer a larger one, with `--steps` to match. This project has not run it.

## License

The weights and the tokenizer are released under the Apache License 2.0, like the code.
"""


def training_record(checkpoint: Path) -> dict[str, object]:
    """Return what training.json holds: the run's settings, its result and its loss curve."""
    run = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    lines = (checkpoint / "log.jsonl").read_text(encoding="utf-8").splitlines()
    curve = [json.loads(line) for line in lines]
    last = curve[-1]
    weights = load_file(checkpoint / "model.safetensors")
    parameters = sum(weight.numel() for weight in weights.values())
    return run | {
        "parameters": parameters,
        "step": last["step"],
        "tokens": last["tokens"],
        "epochs": round(last["tokens"] / run["corpus_tokens"], 3),
        "tokens_per_parameter": round(last["tokens"] / parameters, 3),
        "validation_loss": last["validation_loss"],
        "validation_perplexity": round(math.exp(last["validation_loss"]), 3),
        "minutes": round(seconds_of(curve) / 60, 1),
        "curve": curve,
    }


def seconds_of(curve: list[dict[str, float]]) -> float:
    """Add up the clocks of a run and of its resumptions, each of which starts again at zero."""
    times = [0.0] + [point["seconds"] for point in curve]
    return sum(now - before if now > before else now for before, now in pairwise(times))


def card(record: dict[str, object], config: dict[str, object], larger: tuple[int, int]) -> str:
    """Return the model card; every number of the run in it comes from ``record``."""
    sizes = [name for name, value in config.items() if isinstance(value, int | float)]
    curve = record["curve"]
    keep = [point for i, point in enumerate(curve) if i % 4 == 3 or i == len(curve) - 1]
    row = "| {step:,} | {tokens:,} | {train_loss:.3f} | {validation_loss:.3f} |"
    derived = {
        "vocab_size": config["vocab_size"],
        "context": config["max_position_embeddings"],
        "architecture": "\n".join(f"| {name} | {config[name]} |" for name in sizes),
        "curve": "\n".join(row.format(**point) for point in keep),
        "larger_parameters": larger[0],
        "larger_tokens": larger[1],
        # What the settings alone do not say, such as a schedule that was changed on the way.
        "note": f"{record['note']}\n\n" if "note" in record else "",
    }
    return CARD.format(**record | derived)


def write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def export(checkpoint: Path, out: Path, larger: tuple[int, int]) -> None:
    """Write the Hugging Face folder ``out`` with training.json and the card.

    ``larger`` holds the parameters and tokens of the larger recipe, which the card describes.
    """
    record = training_record(checkpoint)
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        write(out / name, (checkpoint / name).read_bytes())
    write(out / "training.json", (json.dumps(record, indent=1) + "\n").encode())
    write(out / "README.md", card(record, config, larger).encode())
