"""What a layer does with its inputs, in files: whether a container can say it, and qlib's own way.

In qlib's own container a layer has JSON data with one of

"inputs": {"dynamic": format}
"inputs": {"static": format, "low": -8.5, "high": 3.25}
"inputs": {"llm.int8": 6.0}            or null, for a threshold that nothing reaches

with formats as `native.format_to_dict` has them, and "transform": {"hadamard": 64}, or another kind
of basis with its size; what a transform keeps is a tensor of the file, `layer.transform.signs`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..activations import Dynamic, Inputs, Static
from ..errors import FormatError
from ..linear import DenseLinear, QLinear, replace_layer
from ..methods.llm_int8 import LLMInt8
from ..qtensor import Format
from ..transform import Diagonal, Hadamard, Orthogonal, Permute, Transform
from . import native

# What each kind of transform keeps, and what makes it of its size and that.
TRANSFORMS = {
    "diagonal": (Diagonal, "scales", lambda size, scales: Diagonal(scales)),
    "permute": (Permute, "order", lambda size, order: Permute(order)),
    "hadamard": (Hadamard, "signs", Hadamard),
    "orthogonal": (Orthogonal, "matrix", lambda size, matrix: Orthogonal(matrix)),
}
OWN = "container='qlib' can"


def layers_to_dict(model: nn.Module) -> dict[str, dict[str, Any]]:
    """JSON data of every layer that does something with its inputs.

    Raises ValueError naming the layer for inputs and transforms that have no name here.
    """
    found = {}
    for name, layer in reading(model).items():
        found[name] = {}
        try:
            if layer.inputs is not None:
                found[name]["inputs"] = inputs_to_dict(layer.inputs)
            if layer.transform is not None:
                found[name]["transform"] = transform_to_dict(layer.transform)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return found


def reading(model: nn.Module) -> dict[str, QLinear | DenseLinear]:
    """The layers that quantize their inputs or move them to another basis, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, QLinear | DenseLinear)
        and not (module.inputs is None and module.transform is None)
    }


def inputs_to_dict(inputs: Inputs) -> dict[str, Any]:
    """Inputs as JSON data. Raises ValueError for formats and objects that have no name here."""
    if type(inputs) is LLMInt8:
        return {"llm.int8": float(inputs.threshold) if math.isfinite(inputs.threshold) else None}
    if not getattr(getattr(inputs, "format", None), "is_standard", True):
        raise ValueError("qlib's container stores no inputs on a learned grid")
    if not inputs.is_ready:
        raise ValueError("static inputs have no range yet: calibrate, or use dynamic ones")
    if type(inputs) is Dynamic:
        return {"dynamic": native.format_to_dict(inputs.format)}
    if type(inputs) is Static:
        scheme = native.format_to_dict(inputs.format)
        numbers = {"low": inputs.low, "high": inputs.high, "scale": inputs.scale}
        return {"static": scheme} | {k: float(n) for k, n in numbers.items() if n is not None}
    raise ValueError(f"qlib's container stores no inputs of type {type(inputs).__name__}")


def transform_to_dict(transform: Transform) -> dict[str, int]:
    """A transform as JSON data, without its tensor. Raises ValueError for other kinds."""
    for kind, (made, _, _) in TRANSFORMS.items():
        if type(transform) is made:
            return {kind: transform.size}
    raise ValueError(f"qlib's container stores no transform of type {type(transform).__name__}")


def read_inputs(path: str | os.PathLike, name: str, data: object) -> Inputs:
    """The inputs of the layer called `name`. Raises FormatError for anything not understood."""
    field = f"qlib.layers[{name!r:.200}].inputs"
    fields = set(data) if isinstance(data, dict) else set()
    static = {"static", "low", "high"}
    if fields not in ({"dynamic"}, static, static | {"scale"}, {"llm.int8"}):
        raise FormatError(path, field, "is none of dynamic, static with low and high, llm.int8")
    if fields == {"llm.int8"}:
        return _llm_int8(path, field, data["llm.int8"])
    numbers = [data[name] for name in ("low", "high", "scale") if name in fields]
    if not all(type(n) is float and math.isfinite(n) for n in numbers):
        raise FormatError(path, field, f"has {numbers!r:.80}; need finite numbers")
    if numbers[:2] != sorted(numbers[:2]) or not all(n > 0 for n in numbers[2:]):
        raise FormatError(path, field, f"has {numbers!r:.80}; need low <= high and scale > 0")
    format = native.Reader(path, field).format(data["static" if numbers else "dynamic"])
    try:
        return Static(format, *numbers) if numbers else Dynamic(format)
    except ValueError as error:
        raise FormatError(path, field, str(error)) from None


def _llm_int8(path: str | os.PathLike, field: str, threshold: object) -> LLMInt8:
    threshold = math.inf if threshold is None else threshold
    if type(threshold) is not float or not threshold > 0:
        raise FormatError(path, field, f"has threshold {threshold!r:.80}; need a positive number")
    return LLMInt8(threshold)


def read_transform(
    path: str | os.PathLike, name: str, data: object, dense: dict[str, Tensor], width: int
) -> Transform:
    """The transform of a layer of `width` inputs; its tensor is taken out of `dense`.

    Raises FormatError for anything not understood, before a matrix of that size is made.
    """
    field = f"qlib.layers[{name!r:.200}].transform"
    kind, size = next(iter(data.items())) if isinstance(data, dict) and len(data) == 1 else (0, 0)
    if kind not in TRANSFORMS or type(size) is not int:
        raise FormatError(path, field, f"is none of {', '.join(TRANSFORMS)} with a size")
    if size != width:
        raise FormatError(path, field, f"is of {size} inputs, the layer of {width}")
    _, part, make = TRANSFORMS[kind]
    tensor: Tensor | None = dense.pop(f"{name}.transform.{part}", None)
    if tensor is None and kind != "hadamard":
        raise FormatError(path, f"{name}.transform.{part}", "missing")
    try:
        transform = make(size, tensor)
    except ValueError as error:
        raise FormatError(path, field, str(error)) from None
    if transform.size != size:
        raise FormatError(path, f"{name}.transform.{part}", f"is not of size {size}")
    return transform


def load_layers(
    path: str | os.PathLike, dense: dict[str, Tensor], widths: Mapping[str, int]
) -> dict[str, tuple[Transform | None, Inputs | None]]:
    """What each layer does with its inputs, by name; their tensors are taken out of `dense`.

    Args:
        widths: how many inputs each layer of the file has, by name.
    """
    found = {}
    for name, data in native.load_layers(path).items():
        if not isinstance(data, dict) or not set(data) <= {"inputs", "transform"}:
            field = f"qlib.layers[{name!r:.200}]"
            raise FormatError(path, field, "has other fields than inputs and transform")
        inputs = read_inputs(path, name, data["inputs"]) if "inputs" in data else None
        found[name] = (None, inputs)
        if "transform" in data:
            width = widths.get(name, 0)
            found[name] = (read_transform(path, name, data["transform"], dense, width), inputs)
    return found


def attach(path: str | os.PathLike, model: nn.Module, layers: Mapping[str, tuple]) -> None:
    """Give the linear layers of `model`, dense and packed, what `load_layers` found."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | QLinear)}
    for name, (transform, inputs) in layers.items():
        layer = linears.get(name)
        if layer is None:
            field = f"qlib.layers[{name!r:.200}]"
            raise FormatError(path, field, "is no linear layer of the model")
        if isinstance(layer, QLinear):
            layer.transform, layer.inputs = transform, inputs
        else:
            replace_layer(model, name, DenseLinear(layer.weight, layer.bias, transform, inputs))


def writable(container: str, module: Any, model: nn.Module) -> dict[str, Inputs]:
    """The quantized inputs that `container` will say of the layers, by name.

    Args:
        module: the container's own; it says something of inputs if it has `inputs_refusal`.

    Warns where a container only holds weights. Raises ValueError, naming the layer and the remedy,
    if a layer's weight is in another basis, or if its inputs are none that the container knows.
    """
    found = {}
    for name, layer in reading(model).items():
        require_no_transform(container, name, layer)
        found[name] = layer.inputs
        if hasattr(module, "inputs_refusal"):
            weight = layer.weight.format if isinstance(layer, QLinear) else None
            require(container, module, name, layer.inputs, weight, layer.weight.shape)
    if not found or hasattr(module, "inputs_refusal"):
        return found
    kinds = ", ".join(sorted({str(inputs) for inputs in found.values()}))
    warnings.warn(
        f"{container} holds weights only: {len(found)} layers quantize their inputs ({kinds}), "
        f"and whatever opens the file will not; {OWN}",
        stacklevel=4,
    )
    return {}


def require(
    container: str, module: Any, layer: str, inputs: Inputs, weight: Format | None, shape: Sequence
) -> None:
    """Raise ValueError if `container` knows of inputs, but not of these with that weight."""
    refusal = getattr(module, "inputs_refusal", lambda inputs, weight: None)
    if why := refusal(inputs, weight):
        message = f"{container} cannot hold inputs as {inputs}: {why}; {OWN}"
        raise ValueError(f"{layer} {list(shape)}: {message}")


def require_no_transform(container: str, name: str, layer: QLinear | DenseLinear) -> None:
    """Raise ValueError if the weight of `layer` is in a basis that its inputs are moved to."""
    if layer.transform is not None:
        kind = type(layer.transform).__name__
        message = f"{container} cannot hold a layer that moves its inputs to another basis ({kind})"
        raise ValueError(f"{name} {list(layer.weight.shape)}: {message}; {OWN}")
