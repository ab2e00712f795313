"""What a container's file needs to read one layer: checked settings and checked tensors.

Both come from outside. A container asks for a setting with the values that it can take, and for a
tensor with the dtype and shape that it must have; whatever differs is a FormatError here, so that
the containers themselves only move bits.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from torch import Tensor

from ..errors import FormatError
from ..qtensor import Format, QTensor
from .hf import Tensors

_REQUIRED = object()


class Settings:
    """An object of config.json: how its weights are quantized.

    Args:
        path: of config.json; field: where the object lies in it.
        data: the object.
    """

    def __init__(self, path: str | os.PathLike, field: str, data: Any) -> None:
        self.path, self.field = path, field
        if not isinstance(data, dict):
            raise FormatError(path, field, f"is a {type(data).__name__}; need an object")
        self.data: Mapping[str, Any] = data

    def choice(self, name: str, allowed: Collection[Any], default: Any = _REQUIRED) -> Any:
        """The value called `name`, one of `allowed` and of the same type."""
        value = self.data.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if not any(type(value) is type(one) and value == one for one in allowed):
            need = ", ".join(map(repr, allowed))
            raise self.error(name, f"is {value!r:.80}; need one of {need}")
        return value

    def integer(self, name: str, low: int, high: int, default: Any = _REQUIRED) -> int:
        """The integer called `name`, from `low` to `high`."""
        value = self.data.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not int or not low <= value <= high:
            raise self.error(name, f"is {value!r:.80}; need an integer from {low} to {high}")
        return value

    def strings(self, name: str) -> list[str]:
        """The list of strings called `name`, empty if there is none."""
        value = self.data.get(name) or []
        if not isinstance(value, list) or not all(type(one) is str for one in value):
            raise self.error(name, "need a list of strings")
        return value

    def object(self, name: str) -> Settings:
        """The object called `name`."""
        return Settings(self.path, f"{self.field}.{name}", self.data.get(name))

    def absent(self, *names: str) -> None:
        """Refuse settings that change what the weights mean and that are not understood here."""
        for name in names:
            if self.data.get(name):
                raise self.error(name, "is not supported; need none")

    def error(self, name: str, message: str) -> FormatError:
        """A refusal of the setting called `name`."""
        return FormatError(self.path, f"{self.field}.{name}", message)


class Stored:
    """The tensors that a folder holds for one weight.

    Args:
        tensors: all tensors of the folder.
        name: of the weight, without ".weight".
        shape: [out, in] that config.json demands of it.
    """

    def __init__(self, tensors: Tensors, name: str, shape: tuple[int, ...]) -> None:
        self.tensors, self.name, self.shape = tensors, name, shape
        self.taken: set[str] = set()

    def __contains__(self, part: str) -> bool:
        return f"{self.name}.{part}" in self.tensors.shapes

    def dtype(self, part: str) -> str:
        """The dtype of a tensor that is there, by safetensors' name."""
        return self.tensors.dtypes[f"{self.name}.{part}"]

    def take(self, part: str, dtypes: str | Collection[str], shape: tuple[int, ...]) -> Tensor:
        """The tensor called `part`, which must have one of the dtypes and exactly the shape."""
        key = f"{self.name}.{part}"
        if part not in self:
            raise self.error(part, "this tensor is missing")
        dtypes = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
        found, size = self.tensors.dtypes[key], self.tensors.shapes[key]
        if found not in dtypes or size != tuple(shape):
            need = f"{' or '.join(dtypes)} {list(shape)}"
            raise self.error(part, f"is {found} {list(size)}; a weight {self._matrix} needs {need}")
        self.taken.add(key)
        return self.tensors.read(key)

    def error(self, part: str, message: str) -> FormatError:
        """A refusal of the tensor called `part`."""
        return FormatError(self.tensors.folder, f"{self.name}.{part}", message)

    @property
    def _matrix(self) -> str:
        return str(list(self.shape))


class Container(Protocol):
    """What the module of a container provides.

    One that says how inputs are quantized has also inputs_refusal(inputs, format of the weight) ->
    reason or None, and read_inputs(stored, settings) -> Inputs or None; `store` and `describe` take
    the inputs of the layer and of all layers then, as a second argument.
    """

    NAME: str

    def refusal(self, format: Format, shape: tuple[int, ...]) -> str | None:
        """Why a weight of this format and shape cannot be stored as it is, or None."""

    def store(self, q: QTensor) -> dict[str, Tensor]:
        """The tensors of one layer, by what follows its name and a dot."""

    def describe(self, formats: Mapping[str, Format | None]) -> dict[str, Any]:
        """Entries of config.json for these linear layers (None: dense), by name."""

    def read(self, stored: Stored, settings: Settings) -> QTensor | None:
        """The weight of one layer, or None if the file holds it dense."""
