"""A long quantization that can be interrupted: every finished block is kept in a folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from ..block import Block
from ..calibrate import Calibration
from ..errors import FormatError
from ..report import BlockResult, LayerResult, Plan, Step
from . import native
from .atomic import replacing
from .inputs import inputs_to_dict, load_layers


def fingerprint(
    model: nn.Module, plan: Plan, calibration: Calibration | None, settings: Sequence
) -> str:
    """SHA-256 of everything that decides the result: weights, formats, tokens and settings.

    Raises ValueError for formats and inputs that qlib's container, which keeps them, cannot name.
    """
    digest = hashlib.sha256()
    steps = [_described(step) for step in plan.steps]
    digest.update(json.dumps([steps, list(settings)]).encode())
    windows = () if calibration is None else calibration.windows
    for name, tensor in (*model.state_dict().items(), *(("window", w) for w in windows)):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


class Resume:
    """The folder of an unfinished run: `<block>.safetensors`, then `<block>.json` when complete.

    Args:
        folder: made if need be.
        fingerprint: of the run; a folder that holds blocks of another run is refused.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str):
        self.folder, self.fingerprint = Path(folder), fingerprint
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, block: Block, result: BlockResult) -> None:
        """Keep a block: its quantized layers, and every other tensor as the method left it."""
        quantized = {f"{name}.weight": q for name, q in result.tensors.items()}
        state = block.module.state_dict()
        dense = {name: tensor for name, tensor in state.items() if name not in quantized}
        inputs = {name: {"inputs": inputs_to_dict(one)} for name, one in result.inputs.items()}
        native.save_tensors(self._path(block, "safetensors"), quantized, dense, inputs)
        layers = [asdict(layer) | {"format": None} for layer in result.layers]
        content = {"fingerprint": self.fingerprint, "layers": layers}
        with replacing(self._path(block, "json")) as temporary:
            temporary.write_text(json.dumps(content | {"unreached": result.unreached}))

    def load(self, block: Block) -> BlockResult | None:
        """Put a kept block's dense tensors back and return its result, or None if it is not there.

        Raises ValueError if the folder belongs to another run, and FormatError for broken files.
        """
        path = self._path(block, "json")
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text("utf-8"))
            other = content["fingerprint"] != self.fingerprint
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise FormatError(path, "fingerprint", "is not there; delete the folder") from error
        if other:
            raise ValueError(
                f"{self.folder} holds another run (other weights, formats, calibration or "
                "method); choose another folder for resume, or delete this one"
            )
        file = self._path(block, "safetensors")
        quantized = native.load_tensors(file)
        inputs = {name: one for name, (_, one) in load_layers(file, {}, {}).items()}
        tensors = {name.removesuffix(".weight"): q for name, q in quantized.items()}
        try:
            layers = [_layer(block, tensors, row) for row in content["layers"]]
            block.module.load_state_dict(native.load_dense(file), assign=True, strict=False)
            return BlockResult(tensors, layers, list(content["unreached"]), inputs)
        except (KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise FormatError(path, "layers", "do not fit the block; delete the folder") from error

    def _path(self, block: Block, suffix: str) -> Path:
        return self.folder / f"{block.name}.{suffix}"


def _layer(block: Block, tensors: dict, row: dict) -> LayerResult:
    q = tensors[row["layer"].removeprefix(f"{block.name}.")]
    return LayerResult(**row | {"format": q.format, "shape": q.shape})


def _described(step: Step) -> tuple:
    """A step as JSON data that no other has: as in files, and the points of a learned grid."""
    scheme, inputs = getattr(step.format, "scheme", step.format), step.inputs
    points = None if getattr(scheme, "is_standard", True) else scheme.grid.points.tolist()
    format = step.format and native.format_to_dict(step.format)
    # A range that calibration has yet to find is not one of zeros.
    ready = inputs is None or inputs.is_ready
    reads = inputs and inputs_to_dict(inputs if ready else inputs.observed(0.0, 0.0))
    return step.layer, step.shape, format, points, ready, reads


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())
