"""Feed mutated model folders to the loader: it must refuse them, or read what they say.

    python tools/fuzz_checkpoint.py --count 100000

Folders of every container are changed: values of config.json, of the index and of the safetensors
headers, and bytes of any file. An input fails if anything but a FormatError is raised, if a tensor
that was read is not the one that a plain parser finds in the file, if it takes seconds, or if it
allocates much more than the folder has. `--start N --count 1` runs input N again.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import fuzzing
import tokenizers
import torch

import qlib
from qlib.errors import FormatError
from qlib.files import hf, quantized
from qlib.linear import QLinear
from qlib.model import Config, Decoder
from qlib.tokenizer import Tokenizer

SECONDS = 10.0
MEGABYTES = 300
LONGEST_MESSAGE = 1000
Folder = dict[str, bytes]
# (container, format): what a seed holds.
SEEDS = [
    ("hf", "int4-g32"), ("qlib", "nf4"), ("qlib", "nvfp4"), ("compressed-tensors", "int4-g32"),
    ("compressed-tensors", "int3-g32-asym"), ("compressed-tensors", "fp8_e4m3"),
    ("compressed-tensors", "mxfp4"), ("compressed-tensors", "nvfp4-reciprocal"),
    ("gptq", "int4-g32"), ("gptq", "int3-g32-asym"), ("awq", "int4-g32-asym"),
    ("bitsandbytes", "nf4"), ("bitsandbytes", "nf4-dq"), ("mlx", "mlx4-g32"), ("mlx", "mxfp4"),
]  # fmt: skip
HOSTILE = [0, 1, -1, 2, 3, 7, 31, 64, 255, 2**31, 2**32, 2**60, 2**63, 2**64, 10**30, 0.5, 1e308]
HOSTILE += [None, True, False, "", "x", "../x.safetensors", "/etc/passwd", "a/b", "\0", "é" * 200]
HOSTILE += [[], {}, [[]], [0], [2**40, 2**40], {"": 0}, "F64", "U8", "I4", "model.safetensors"]
CONFIG = Config(64, 64, 64, 1, 2, 1, 32, tie_word_embeddings=True, max_position_embeddings=64)


def seeds() -> list[Folder]:
    """Small folders of every container, the first of them also in shards with an index."""
    words = {chr(33 + i): i for i in range(64)}
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "!")), None, None)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (container, format) in enumerate([SEEDS[0], *SEEDS]):
            model = Decoder(CONFIG).normal_init(0.3, torch.Generator().manual_seed(number))
            qlib.quantize_model(model, format, progress=False)
            path = Path(folder, str(number))
            options = {"max_shard_bytes": 30_000} if number == 0 else {}
            qlib.save(model, path, tokenizer, container, **options)
            found.append({file.name: file.read_bytes() for file in sorted(path.iterdir())})
    return found


def mutate(seed: Folder, rng: random.Random) -> Folder:
    """The folder with one to three hostile changes."""
    changed = dict(seed)
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice([name for name in changed if not name.startswith("tokenizer")])
        if rng.random() < 0.03:
            del changed[name]
            break
        if rng.random() < 0.75:
            changed[name] = in_json(changed[name], name.endswith(".safetensors"), rng)
        else:
            changed[name] = rng.choice([flip, truncate, cut_out, insert])(changed[name], rng)
    return changed


def in_json(content: bytes, tensors: bool, rng: random.Random) -> bytes:
    """One value of a JSON file, or of the header of a safetensors file, is another."""
    size = struct.unpack("<Q", content[:8])[0] if tensors and len(content) > 8 else 0
    text = content[8 : 8 + size] if tensors else content
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return flip(content, rng)
    for _ in range(rng.choice([1, 1, 2])):
        change(value, rng)
    text = json.dumps(value).encode()
    if rng.random() < 0.02:
        text = b"[" * rng.choice([100, 100_000])
    if rng.random() < 0.05 and text.startswith(b'{"'):
        # A name twice: which of the two counts?
        text = b"{" + text[1 : text.index(b":")] + b": 0, " + text[1:]
    if not tensors:
        return text
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + content[8 + size :]


def change(value, rng: random.Random) -> None:
    """One entry somewhere in `value` is changed, left out, renamed or exchanged."""
    while isinstance(value, (dict, list)) and value:
        at = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        inner = value[at]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            value = inner
            continue
        kind = rng.randrange(6)
        if kind == 0:
            del value[at]
        elif kind == 1 and isinstance(value, dict):
            value[f"{at}x"] = value.pop(at)
        elif kind == 2 and type(inner) is int:
            value[at] = inner + rng.choice([-64, -8, -1, 1, 8, 64])
        elif kind == 3:
            other = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value[at], value[other] = value[other], inner
        else:
            value[at] = rng.choice(HOSTILE)
        return


def flip(content: bytes, rng: random.Random) -> bytes:
    bad = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if bad:
            bad[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(bad)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: _place(content, rng)]


def cut_out(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + content[at + rng.randrange(1, 40) :]


def insert(content: bytes, rng: random.Random) -> bytes:
    at = _place(content, rng)
    return content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]


def _place(content: bytes, rng: random.Random) -> int:
    # Mostly near the start, where the header is.
    size = min(len(content), 3000) if rng.random() < 0.7 else len(content)
    return rng.randrange(max(1, size))


def check(path: Path, folder: Folder) -> str:
    """ "refused" or "read"; AssertionError if the loader did anything that it should not."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in folder.items():
        (path / name).write_bytes(content)
    _forget_peak()
    start, memory = time.process_time(), _megabytes()
    try:
        model = qlib.load(path)[0]
    except FormatError as error:
        if len(str(error)) > LONGEST_MESSAGE:
            raise AssertionError(f"says {len(str(error)):,} characters") from error
        model = None
    except FileNotFoundError:
        assert "config.json" not in folder
        model = None
    assert time.process_time() - start < SECONDS, "took too long"
    assert _megabytes() - memory < MEGABYTES, f"grew by {_megabytes() - memory} MB"
    if model is None:
        return "refused"
    same(model, path, folder)
    return "read"


def _megabytes() -> int:
    """The largest memory of the process since `_forget_peak`, or since it began."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1]) // 1024


def _forget_peak() -> None:
    # What earlier work needed would hide what this folder makes the loader take.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def plain(folder: Folder) -> dict[str, bytes]:
    """The tensors of a folder, read the plain way: name -> bytes."""
    found = {}
    index = json.loads(folder[hf.INDEX])["weight_map"] if hf.INDEX in folder else {}
    for file in {hf.SINGLE} if hf.SINGLE in folder else set(index.values()):
        size = struct.unpack("<Q", folder[file][:8])[0]
        for name, info in json.loads(folder[file][8 : 8 + size]).items():
            if name != "__metadata__":
                start, end = info["data_offsets"]
                found[name] = folder[file][8 + size + start : 8 + size + end]
    return found


def same(model: Decoder, path: Path, folder: Folder) -> None:
    """Dense tensors are those of the file, and packed ones would be written as they lie there."""
    stored, container = plain(folder), hf.container_of(path)
    for name, tensor in model.state_dict().items():
        if (
            name in stored
            and tensor.dtype == torch.float32
            and len(stored[name]) == 4 * tensor.numel()
        ):
            assert tensor.contiguous().numpy().tobytes() == stored[name], name
    if container not in quantized.CONTAINERS:
        return
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            assert bool(module.weight.dequantize().isfinite().all()), name
            for part, tensor in quantized.CONTAINERS[container].store(module.weight).items():
                key = f"{name}.{part}"
                raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
                # Two texts of JSON, and two conventions for zero points, can mean the same.
                if "quant_state" not in part and part not in ("qzeros", "g_idx"):
                    assert raw == stored.get(key, raw), key


def inputs(start: int, count: int) -> Iterator[tuple[int, Folder]]:
    """Input number n is the same in every run."""
    known = seeds()
    for number in range(start, start + count):
        yield number, mutate(known[number % len(known)], random.Random(number))


def run(start: int, count: int) -> fuzzing.Found:
    """How many inputs were read and refused, and the failures by number."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        return fuzzing.outcomes(inputs(start, count), lambda _, content: check(path, content))


if __name__ == "__main__":
    fuzzing.main(__doc__, run)
