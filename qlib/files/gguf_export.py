"""A Llama or Qwen2 as a GGUF file: quantized to a mix, or with the bytes that it has already.

What is written is what a layer computes with: `gguf_llama.load` reads back exactly the weights that
`QTensor.dequantize()` gives for the stored blocks.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ggml
from ..calibrate import Calibration
from ..ggml import mixes
from ..ggml.schemes import block_of, to_blocks
from ..model import Config, Decoder, frequency_factors
from ..progress import bar
from ..qtensor import Format, QTensor
from ..tokenizer import Tokenizer
from . import gguf_tokenizer, gguf_write, inputs
from .assemble import parameter_shapes
from .gguf_llama import ROPE_FACTORS, gguf_name, heads_in_pairs, pairs_from_halves
from .gguf_report import GgufReport, Stored
from .imatrix import Imatrix, measure, read

# llama.cpp makes these of activations, and reads no file that has them.
NAMES = [name for name, form in ggml.FORMATS.items() if form.kind.name not in ("Q8_1", "Q8_K")]
FORMATS = {ggml.FORMATS[name].kind.name: ggml.FORMATS[name] for name in NAMES}
# What a mix of one's own is made of, unless it is said.
CANDIDATES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Weight = Tensor | QTensor


def export(
    model: Decoder, tokenizer: Tokenizer, path: str | os.PathLike,
    mix: str | float | Mapping[str, str] | mixes.Mix = "Q4_K_M",
    importance: Imatrix | Calibration | str | os.PathLike | None = None,
    progress: bool = True, add_bos: bool = False,
) -> GgufReport:  # fmt: skip
    """Write a model and its tokenizer to a GGUF file that llama.cpp runs.

    Args:
        model: our Decoder. A layer that is quantized already, in a block format of ggml, keeps its
            bytes whatever the mix says.
        tokenizer: byte-level BPE.
        path: the file; it is replaced atomically, and tensors are made one at a time.
        mix: a file type of llama.cpp ("Q4_K_M", "IQ4_XS", "Q8_0", "F16", ...); a number, the bits
            per weight of a mix of one's own (`own_mix`); or the type of every matrix by its GGUF
            name.
        importance: an imatrix, a file with one, or the calibration text to measure it on first.
        progress: show a bar if it takes long.
        add_bos: note in the file that llama.cpp shall put the BOS before every text; by default it
            adds nothing, as our tokenizer does.

    Raises ValueError before anything is written for layers in formats that GGUF cannot hold, for
    tokenizers that it cannot express, and for types that cannot be made (without an importance).
    """
    start = time.perf_counter()
    inputs.writable("gguf", None, model)
    weights = dict(named_weights(model))
    if isinstance(importance, Calibration):
        importance = measure(model, importance)
    if isinstance(importance, (str, os.PathLike)):
        importance = read(importance)
    if isinstance(mix, (int, float)):
        mix = own_mix(model, mix, importance)
    mix = mix.types if isinstance(mix, mixes.Mix) else mix
    kept = sum(isinstance(weight, QTensor) for weight in weights.values())
    chosen = _choose(mix, model.config, weights, importance)
    keys = _metadata(model.config, mix, weights, chosen, importance)
    keys |= gguf_tokenizer.metadata(tokenizer, model.config.vocab_size, add_bos)
    plan = _Plan(weights, chosen, model.config, importance)
    tensors = plan.tensors(progress)
    size = gguf_write.write(path, keys, tensors)
    stored = (
        Stored(name, kind.name, shape, gguf_write.tensor_bytes(name, kind, shape))
        for name, (kind, shape, _) in tensors.items()
    )
    return GgufReport(
        os.fspath(path),
        (mix if isinstance(mix, str) else "own")
        + f", {kept} matrices kept as they were" * bool(kept),
        size,
        tuple(stored),
        chosen.fallbacks,
        "none" if importance is None else repr(importance),
        time.perf_counter() - start,
    )


def relative_errors(
    model: Decoder, candidates: Sequence[str], importance: Imatrix | None = None
) -> dict[str, dict[str, float]]:
    """Error energy over signal energy of every matrix in every candidate type.

    Both energies weight the columns by the importance, so they are those of the layer's outputs (as
    far as its inputs are uncorrelated). Types that do not divide a matrix's rows are left out.
    """
    found: dict[str, dict[str, float]] = {}
    for name, weight in named_weights(model):
        if isinstance(weight, QTensor) or weight.ndim < 2:
            continue
        given = None if importance is None else importance.get(name)
        columns = 1.0 if given is None else given
        energy = float((weight.float().square() * columns).sum())
        fits = [kind for kind in candidates if weight.shape[-1] % ggml.TYPES[kind].block == 0]
        found[name] = {}
        for kind in fits:
            values = _format(name, kind).quantize(weight, given).dequantize()
            error = float(((values - weight).square() * columns).sum())
            found[name][kind] = error / energy if energy else 0.0
    return found


def own_mix(
    model: Decoder, bits: float, importance: Imatrix | None = None,
    candidates: Sequence[str] = CANDIDATES,
) -> mixes.Mix:  # fmt: skip
    """A mix of at most `bits` per weight, norms included, spent where `relative_errors` are large.

    As in llama.cpp's mixes the output matrix, which may be the embedding, has 6 bits: its errors
    reach every logit at once. Raises ValueError if even the smallest candidates take more.
    """
    shapes = {name: tuple(weight.shape) for name, weight in named_weights(model)}
    head = "output.weight" if "output.weight" in shapes else "token_embd.weight"
    fixed = {name: "F32" for name, shape in shapes.items() if len(shape) == 1} | {
        head: mixes.OUTPUT
    }
    fixed = mixes.fitted(fixed, shapes).types
    free = {name: shape for name, shape in shapes.items() if name not in fixed}
    errors = relative_errors(model, candidates, importance)
    # A matrix of more weights puts more error into what is computed after it.
    harm = {n: {k: e * math.prod(free[n]) for k, e in errors[n].items()} for n in free}
    taken = sum(gguf_write.tensor_bytes(n, ggml.TYPES[k], shapes[n]) for n, k in fixed.items())
    total, inside = (sum(map(math.prod, s.values())) for s in (shapes, free))
    chosen = mixes.for_bits((bits * total - 8 * taken) / inside, harm, free, candidates)
    types = chosen.types | {head: fixed[head]}
    return mixes.Mix({name: types[name] for name in shapes if name in types})


@dataclass(frozen=True)
class _Plan:
    weights: Mapping[str, Weight]
    mix: mixes.Mix
    config: Config
    imatrix: Imatrix | None

    def tensors(self, progress: bool) -> gguf_write.Tensors:
        """What `gguf_write.write` takes; the bar moves when it asks for a tensor's bytes."""
        ticks = iter(bar(self.weights, "writing", "tensor", progress))

        def content(name: str) -> np.ndarray:
            next(ticks)
            return self.blocks(name)

        kinds = {name: ggml.TYPES[kind] for name, kind in self.mix.types.items()}
        return {
            name: (kinds[name], tuple(weight.shape), functools.partial(content, name))
            for name, weight in self.weights.items()
        }

    def blocks(self, name: str) -> np.ndarray:
        """The bytes of a tensor, its rows in the order of llama.cpp, uint8."""
        weight, kind = self.weights[name], self.mix.types[name]
        if kind in DENSE:
            rows = weight.detach().cpu().to(DENSE[kind])
        elif isinstance(weight, QTensor):
            rows = weight.parts["blocks"].cpu()
        else:
            given = None if self.imatrix is None else self.imatrix.get(name)
            rows = _format(name, kind).quantize(weight.detach().cpu(), given).parts["blocks"]
        heads = heads_in_pairs(self.config, name)
        if heads:
            rows = pairs_from_halves(rows, heads)
        return rows.contiguous().view(torch.uint8).numpy()


def named_weights(model: Decoder) -> Iterator[tuple[str, Weight]]:
    """Every tensor by its GGUF name, as the model has it, and the factors of scaled positions."""
    if not isinstance(model, Decoder):
        kind = type(model).__name__
        raise TypeError(f"export takes a model from qlib.load, not a {kind}")
    names = {name for name, _ in parameter_shapes(model.config)}
    for name, _ in parameter_shapes(model.config):
        layer, _, which = name.rpartition(".")
        module = model.get_submodule(layer)
        if getattr(module, "bias", None) is not None and f"{layer}.bias" not in names:
            raise ValueError(f"{layer}: has a bias, which a Llama in a GGUF file has not")
        weight = getattr(module, which)
        if isinstance(weight, QTensor):
            weight = to_blocks(weight) or weight
            require(layer, weight.format)
        yield gguf_name(name), weight
    if model.config.rope_scaling is not None:
        if model.config.model_type != "llama":
            message = f"llama.cpp scales no rotary positions of a {model.config.model_type}"
            raise ValueError(f"{message}; qlib.save(model, folder, tokenizer) keeps them")
        yield ROPE_FACTORS, frequency_factors(model.config)


def require(layer: str, format: Format) -> None:
    """Raise ValueError if a GGUF file cannot hold a layer of this format as it is."""
    if format not in FORMATS.values() and block_of(format) is None:
        raise ValueError(
            f"{layer}: a GGUF file cannot hold its format ({format}); quantize it to "
            f"one of {', '.join(NAMES)}, or keep it with qlib.save"
        )


def _choose(
    mix: str | Mapping[str, str], config: Config, weights: Mapping[str, Weight],
    imatrix: Imatrix | None,
) -> mixes.Mix:  # fmt: skip
    """The type of every tensor; all that can be wrong with it is found before the file is begun."""
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    if isinstance(mix, str):
        gqa = config.num_attention_heads // config.num_key_value_heads
        chosen = mixes.assign(mix, shapes, gqa, imatrix is not None)
    else:
        matrices = {name for name, shape in shapes.items() if len(shape) > 1}
        for name in sorted(matrices ^ mix.keys()):
            what = (
                "is missing" if name in matrices else f"is unknown; names look like {min(matrices)}"
            )
            raise ValueError(f"{name}: a mix names every matrix of the model, and this one {what}")
        mix = {name: kind.upper() for name, kind in mix.items()}
        for name, kind in mix.items():
            if kind not in DENSE:
                _format(name, kind)
        chosen = mixes.fitted({name: mix.get(name, "F32") for name in shapes}, shapes)
    packed = {n: w.format.kind.name for n, w in weights.items() if isinstance(w, QTensor)}
    fallbacks = (fallback for fallback in chosen.fallbacks if fallback.tensor not in packed)
    for name, kind in chosen.types.items():
        if name not in packed and kind not in DENSE:
            _check(mix if isinstance(mix, str) else None, name, kind, shapes[name], imatrix)
        if name not in packed and kind == "F16":
            _check_half(name, weights[name])
    return mixes.Mix(chosen.types | packed, tuple(fallbacks))


def _check(
    file_type: str | None, name: str, kind: str, shape: tuple[int, ...], imatrix: Imatrix | None
) -> None:
    form = _format(name, kind)
    given = None if imatrix is None else imatrix.get(name)
    if given is not None and len(given) != shape[-1]:
        message = f"imatrix size {len(given)} is different from tensor size {shape[-1]}"
        raise ValueError(f"{name}: {message}; measure it on this model")
    needed = form.needs_importance or mixes.needs_importance(file_type, name, kind)
    if given is None and needed:
        raise ValueError(
            f"{name}: quantization to {kind} requires an importance matrix; "
            "give importance=Calibration.text(tokenizer)"
        )


def _check_half(name: str, weight: Tensor) -> None:
    largest = float(weight.abs().max())
    if not largest <= torch.finfo(torch.float16).max:
        raise ValueError(f"{name}: {largest:g} is too large for F16; use BF16 or F32")


def _format(name: str, kind: str) -> ggml.BlockFormat:
    if kind not in FORMATS:
        raise ValueError(f"{name}: {kind} cannot be written; the types are {', '.join(FORMATS)}")
    return FORMATS[kind]


def _metadata(
    config: Config, mix: str | Mapping[str, str], weights: Mapping[str, Weight],
    chosen: mixes.Mix, imatrix: Imatrix | None,
) -> dict[str, tuple[str, Any]]:  # fmt: skip
    arch = config.model_type
    keys: dict[str, tuple[str, Any]] = {
        "general.architecture": ("string", arch),
        "general.type": ("string", "model"),
        f"{arch}.block_count": ("u32", config.num_hidden_layers),
        f"{arch}.context_length": ("u32", config.max_position_embeddings),
        f"{arch}.embedding_length": ("u32", config.hidden_size),
        f"{arch}.feed_forward_length": ("u32", config.intermediate_size),
        f"{arch}.attention.head_count": ("u32", config.num_attention_heads),
        f"{arch}.attention.head_count_kv": ("u32", config.num_key_value_heads),
        f"{arch}.attention.key_length": ("u32", config.head_dim),
        f"{arch}.attention.value_length": ("u32", config.head_dim),
        f"{arch}.attention.layer_norm_rms_epsilon": ("f32", config.rms_norm_eps),
        f"{arch}.rope.dimension_count": ("u32", config.head_dim),
        f"{arch}.rope.freq_base": ("f32", config.rope_theta),
        f"{arch}.vocab_size": ("u32", config.vocab_size),
    }
    # A file of another mix has no file type; llama.cpp then guesses one from the types it finds.
    if isinstance(mix, str) and not any(isinstance(w, QTensor) for w in weights.values()):
        keys["general.file_type"] = ("u32", mixes.FILE_TYPES[mix].id)
    if not DENSE.keys() >= set(chosen.types.values()):
        keys["general.quantization_version"] = ("u32", 2)
    if imatrix is not None:
        keys["quantize.imatrix.dataset"] = ("string", ", ".join(imatrix.datasets))
        keys["quantize.imatrix.entries_count"] = ("u32", len(imatrix.sums))
        keys["quantize.imatrix.chunks_count"] = ("u32", imatrix.chunk_count)
    return keys


def save(path: str | os.PathLike, model: Decoder, tokenizer: Tokenizer | None, **options):
    """`export` with the arguments of `qlib.save`."""
    if tokenizer is None:
        raise ValueError("a GGUF file holds its tokenizer: qlib.save(model, path, tokenizer)")
    return export(model, tokenizer, path, **options)
