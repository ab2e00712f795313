"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FormatError
from .atomic import replacing
from .hf import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
FLOATS = ("F32", "F16", "BF16")
# Initializations that leave the base weights as they are.
INITS = (True, False, "gaussian", "orthogonal")
# Fields that do not change what stored adapters compute; all others that are not read here do.
IDLE = "task_type auto_mapping peft_version base_model_name_or_path revision inference_mode"
IDLE += " target_modules exclude_modules layers_to_transform layers_pattern lora_dropout"
IDLE += " megatron_core qalora_group_size"

Pair = tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]


def save(folder: str | os.PathLike, rank: int, alpha: float, layers: Mapping[str, Pair]) -> None:
    """Write both files, atomically.

    Args:
        folder: made if need be; adapters that lie there are replaced.
        rank: rows of every A and columns of every B.
        alpha: the numerator of the scale alpha / rank.
        layers: (A, B) by the name of the linear layer.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None}
    config |= {"r": rank, "lora_alpha": alpha, "target_modules": sorted(layers), "bias": "none"}
    config |= {"lora_dropout": 0.0, "inference_mode": True}
    tensors = {
        _key(name, which): tensor.detach().cpu().contiguous()
        for name, pair in layers.items()
        for which, tensor in zip("AB", pair)
    }
    # Both temporary files are complete before the first is renamed.
    with contextlib.ExitStack() as renames:
        text = renames.enter_context(replacing(folder / CONFIG))
        text.write_text(json.dumps(config, indent=2), encoding="utf-8")
        save_file(tensors, renames.enter_context(replacing(folder / WEIGHTS)), {"format": "pt"})


def load(
    folder: str | os.PathLike, shapes: Mapping[str, tuple[int, int]]
) -> tuple[int, float, dict[str, Pair]]:
    """The rank, alpha, and (A, B) by layer, float32 as PEFT trains and applies them.

    Args:
        folder: what `save` or PEFT's `save_pretrained` wrote.
        shapes: (out, in) of the model's linear layers by name.

    Raises FormatError unless these are plain LoRA adapters of such layers.
    """
    rank, alpha = _read_config(Path(folder) / CONFIG)
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FormatError(path, "file", "this file is missing")
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                _check(path, key, file.get_slice(key), rank, shapes)
            found = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(path, "header", str(error)) from error
    return rank, alpha, _pairs(path, found)


def _read_config(path: Path) -> tuple[int, float]:
    config = read_json(path)
    if config.pop("peft_type", None) != "LORA":
        raise FormatError(path, "peft_type", "need 'LORA'")
    rank, alpha = config.pop("r", None), config.pop("lora_alpha", None)
    if type(rank) is not int or rank < 1:
        raise FormatError(path, "r", f"is {rank!r:.40}; need a positive integer")
    # An integer of a thousand digits has no float.
    if type(alpha) not in (int, float) or not abs(alpha) < 1e30:
        raise FormatError(path, "lora_alpha", f"is {alpha!r:.40}; need a finite number")
    if config.pop("init_lora_weights", True) not in INITS:
        raise FormatError(path, "init_lora_weights", "changes the base weights, which are not here")
    for field, value in config.items():
        if field not in IDLE.split() and not _is_off(value):
            message = f"is {value!r:.40}; only plain LoRA is read, which has no such option"
            raise FormatError(path, field, message)
    return rank, alpha


def _is_off(value: Any) -> bool:
    return value is None or value is False or value in ({}, [], "none")


def _check(path: Path, key: str, stored, rank: int, shapes: Mapping[str, tuple[int, int]]) -> None:
    match = KEY.fullmatch(key)
    if not match:
        raise FormatError(path, key, "is not named base_model.model.<layer>.lora_A.weight or B")
    if match[1] not in shapes:
        raise FormatError(path, key, "the model has no such linear layer")
    out, columns = shapes[match[1]]
    need = [rank, columns] if match[2] == "A" else [out, rank]
    if stored.get_shape() != need:
        raise FormatError(path, key, f"has shape {stored.get_shape()}; need {need}")
    if stored.get_dtype() not in FLOATS:
        message = f"has dtype {stored.get_dtype()}; need one of {', '.join(FLOATS)}"
        raise FormatError(path, key, message)


def _pairs(path: Path, found: Mapping[str, Tensor]) -> dict[str, Pair]:
    if not found:
        raise FormatError(path, "header", "holds no adapters")
    for key, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise FormatError(path, key, "holds NaN or infinity")
    names = dict.fromkeys(KEY.fullmatch(key)[1] for key in found)
    keys = {name: [_key(name, which) for which in "AB"] for name in names}
    for key in itertools.chain(*keys.values()):
        if key not in found:
            raise FormatError(path, key, "this tensor is missing")
    return {name: (found[a], found[b]) for name, (a, b) in keys.items()}


def _key(layer: str, which: str) -> str:
    return f"base_model.model.{layer}.lora_{which}.weight"
