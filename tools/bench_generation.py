"""Tokens a second of models on the CPU, ours and llama.cpp's: a part of `bench_kernels`.

Two models. SmolLM2-135M has the sizes of a real one. The other one has five layers of nothing but
4096 x 4096 matrices, too many for a cache, so that its speed is that of their products. Each new
token reads every weight once: bytes a second is what can be compared between models that store
different amounts.

llama.cpp comes with xllamacpp, if that is installed, and runs in a process of its own, since two
builds of ggml in one process disturb each other. Its time for a token is its own statement.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tables
import torch
from torch import nn

import qlib
from qlib.config import Config
from qlib.files import gguf_export
from qlib.kernels import measure
from qlib.linear import QLinear, replace_layer
from qlib.model import Decoder
from qlib.recipe import decoder_linears

TOKENS = 32
REAL, REAL_FORMATS = "smollm2-135m", ("int4-g32", "nf4", "int8-row")
SQUARE, LAYERS, SIDE = "5 layers of 4096 x 4096", 5, 4096
SQUARE_FORMATS = ("q4_k", "int4-g128")

# Reads a path, threads, tokens and rounds; prints the most tokens a second.
LLAMA_CPP = """
import json, sys, xllamacpp
path, threads, tokens, rounds = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = path, 256, 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(params)
request = {"prompt": "a", "max_tokens": tokens, "ignore_eos": True, "cache_prompt": False}
answers = [server.handle_completions(request | {"temperature": 0}) for _ in range(rounds)]
print("\\n" + json.dumps(max(answer["timings"]["predicted_per_second"] for answer in answers)))
"""


def generation_rows(threads: int, rounds: int, tokens: int = TOKENS) -> list[dict[str, Any]]:
    """Rows of the table: tokens a second, and bytes of weights a second."""
    tokenizer = qlib.load(REAL)[1]
    rows = our_rows(REAL, real_models(), rounds, tokens)
    model = qlib.load(REAL)[0]
    rows += llama_cpp_rows(REAL, model, tokenizer, "Q4_0", threads, rounds, tokens)
    small = qlib.load("bpw-small")[1]
    squares = square_models(LAYERS, SIDE, SQUARE_FORMATS)
    rows += our_rows(SQUARE, squares, rounds, tokens)
    model = squares["q4_k"]
    return rows + llama_cpp_rows(SQUARE, model, small, "Q4_K_S", threads, rounds, tokens)


def real_models() -> dict[str, Decoder]:
    """The model as it is, in float32, and quantized."""
    models = {"float32": qlib.load(REAL)[0]}
    for name in REAL_FORMATS:
        models[name] = qlib.load(REAL)[0]
        qlib.quantize_model(models[name], name, progress=False)
    return models


def square_models(layers: int, side: int, formats: tuple[str, ...]) -> dict[str, Decoder]:
    """A model of random weights for each format; all its matrices hold the same numbers."""
    config = Config(1024, side, side, layers, side // 128, side // 128, 128)
    weight = torch.randn(side, side, generator=torch.Generator().manual_seed(0)) * side**-0.5
    models, vocabulary = {}, torch.arange(config.vocab_size)
    for name in formats:
        with torch.device("meta"):
            model = Decoder(config)
        q = qlib.quantize(weight, name)
        for layer in decoder_linears(model):
            parts = {part: tensor.clone() for part, tensor in q.parts.items()}
            replace_layer(model, layer, QLinear(qlib.QTensor(q.format, q.shape, parts)))
        for module in model.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                value = (
                    torch.ones(parameter.shape)
                    if parameter.ndim == 1
                    else weight[vocabulary % side]
                )
                setattr(module, key, nn.Parameter(value, requires_grad=False))
        models[name] = model
    return models


def our_rows(
    title: str, models: dict[str, Decoder], rounds: int, tokens: int
) -> list[dict[str, Any]]:
    calls = {}
    for name, model in models.items():
        # Nothing ends a text early.
        model.config = dataclasses.replace(model.config, eos_token_id=None)
        start = torch.ones(1, 1, dtype=torch.long)
        calls[name] = lambda model=model, start=start: model.generate(start, tokens)
        model.generate(start, 2)
    best = measure.fastest(calls, rounds)
    sizes = {name: weight_bytes(model) for name, model in models.items()}
    dense = best.get("float32")
    return [
        _row(title, "qlib", name, tokens / best[name], sizes[name])
        | {"to_fp32": None if dense is None else dense / best[name]}
        for name in models
    ]


def weight_bytes(model: Decoder) -> int:
    """What a new token reads: all matrices, the embedding only where it is the head as well."""
    tied = model.config.tie_word_embeddings
    modules = [m for m in model.modules() if isinstance(m, QLinear | nn.Linear)]
    modules += [model.model.embed_tokens] if tied else []
    tensors = [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]
    return sum(tensor.nbytes for tensor in tensors)


def llama_cpp_rows(
    title: str, model: Decoder, tokenizer, mix: str, threads: int, rounds: int, tokens: int
) -> list[dict[str, Any]]:
    """A row for the same model in llama.cpp, none if it is not installed."""
    if find_spec("xllamacpp") is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.gguf")
        report = gguf_export.export(model, tokenizer, path, mix, progress=False)
        request = json.dumps([str(path), threads, tokens, rounds])
        command = [sys.executable, "-c", LLAMA_CPP, request]
        run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"llama.cpp could not run {title}: {run.stderr[-2000:]}")
    speed = json.loads(run.stdout.splitlines()[-1])
    return [_row(title, "llama.cpp", mix, speed, report.nbytes)]


def _row(model: str, engine: str, name: str, speed: float, nbytes: int) -> dict[str, Any]:
    row = {"model": model, "engine": engine, "name": name, "tokens_per_s": speed}
    return row | {"bytes": nbytes, "gb_per_s": nbytes * speed / 1e9, "to_fp32": None}


COLUMNS = {
    "model": tables.text("model"),
    "engine": tables.text("engine"),
    "weights": tables.text("name"),
    "tokens/s": tables.number("tokens_per_s", 1),
    "MB a token": tables.number("bytes", 0, 1e-6),
    "GB/s": tables.number("gb_per_s", 1),
    "x float32": tables.number("to_fp32", 2),
}
