"""Feed mutated GGUF files to the reader: it must refuse them, or read what they say.

    python tools/fuzz_gguf.py --count 100000

An input fails if anything but a FormatError is raised, if the reader says something else than the
plain parser below, takes a second, or allocates more than twice the file (and SLACK). The numbers
of failing inputs are printed; `--start N --count 1` runs input N again.
"""

from __future__ import annotations

import random
import struct
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fuzzing
import numpy as np

from qlib import ggml
from qlib.errors import FormatError
from qlib.files import gguf, gguf_llama, gguf_write, imatrix

# What Python's own objects take: for every value, and for the interpreter's caches.
SLACK = 1 << 18
SECONDS = 5.0
LONGEST_MESSAGE = 1000
HOSTILE = [0, 1, 2, 3, 7, 31, 33, 64, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**60]
HOSTILE += [2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1]


@dataclass(frozen=True)
class Span:
    """A number in a file: what it says, where it stands, how many bytes it has."""

    field: str
    start: int
    size: int


class Parsed:
    """A GGUF file read the plain way, without a check: metadata, tensors, and where all of it is.

    Args:
        content: the file. One that is not well-formed raises anything.
    """

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 4
        self.numbers: list[Span] = []
        self.metadata: dict[str, object] = {}
        self.infos: dict[str, tuple[int, tuple[int, ...], int]] = {}
        self.number("version", "I")
        n_tensors, n_kv = self.number("n_tensors", "Q"), self.number("n_kv", "Q")
        self.entries = [self.span(self.entry) for _ in range(n_kv)]
        self.tensors = [self.span(self.info) for _ in range(n_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        self.blob = -(-self.at // alignment) * alignment

    def number(self, field: str, code: str):
        size = struct.calcsize(f"<{code}")
        self.numbers.append(Span(field, self.at, size))
        self.at += size
        return struct.unpack_from(f"<{code}", self.content, self.at - size)[0]

    def span(self, read: Callable[[], None]) -> slice:
        start = self.at
        read()
        return slice(start, self.at)

    def string(self) -> str:
        size = self.number("length", "Q")
        self.at += size
        return self.content[self.at - size : self.at].decode()

    def entry(self) -> None:
        key, kind = self.string(), self.number("type", "I")
        self.metadata[key] = self.value(kind)

    def value(self, kind: int):
        if kind == 8:
            return self.string()
        if kind == 9:
            kind, count = self.number("element type", "I"), self.number("count", "Q")
            return [self.value(kind) for _ in range(count)]
        return self.number("value", dict(zip(range(13), "BbHhIif?  Qqd"))[kind])

    def info(self) -> None:
        name = self.string()
        dims = tuple(self.number("dim", "Q") for _ in range(self.number("n_dims", "I")))
        self.infos[name] = (self.number("tensor type", "I"), dims, self.number("offset", "Q"))

    def rebuilt(self, entries, tensors, swapped: bool = False) -> bytes:
        """The file with other entries and tensor infos (bytes), and counts that say so."""
        counts = struct.pack("<QQ", len(tensors), len(entries))
        parts = [*tensors, *entries] if swapped else [*entries, *tensors]
        head = self.content[:8] + counts + b"".join(parts)
        return head + b"\0" * (-len(head) % 32) + self.content[self.blob :]


def seeds() -> list[Parsed]:
    """Small files of all kinds of values, of a Llama, and of an imatrix."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "seed.gguf")
        found = []
        for metadata, tensors in (all_types(), llama(), importance()):
            gguf_write.write(path, metadata, tensors)
            found.append(Parsed(path.read_bytes()))
    return found


def all_types():
    values = {"string": "héllo", "bool": True, "f32": 0.5, "f64": 0.1}
    metadata = {f"a.{k}": (k, values.get(k, 100)) for k in gguf_write.SCALARS}
    metadata |= {f"l.{k}": (f"{k}[]", [values.get(k, 100)] * 3) for k in gguf_write.SCALARS}
    metadata |= {"l.empty": ("u32[]", []), "general.alignment": ("u32", 32)}
    rng = np.random.default_rng(0)
    tensors = {}
    for name, kind in ggml.TYPES.items():
        raw = rng.integers(0, 256, 2 * kind.size, np.uint8)
        tensors[f"w.{name}"] = (kind, (2, kind.block), raw)
    return metadata, tensors


def llama():
    tokens = [chr(i) for i in range(33, 97)]
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32}
    sizes |= {"feed_forward_length": 32, "attention.head_count": 2, "attention.head_count_kv": 1}
    metadata = {"general.architecture": ("string", "llama")}
    metadata |= {f"llama.{key}": ("u32", value) for key, value in sizes.items()}
    metadata |= {
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "tokenizer.ggml.model": ("string", "gpt2"),
        "tokenizer.ggml.pre": ("string", "smollm"),
        "tokenizer.ggml.tokens": ("string[]", [*tokens, "AB"]),
        "tokenizer.ggml.token_type": ("i32[]", [3, *[1] * 64]),
        "tokenizer.ggml.merges": ("string[]", ["A B"]),
        "tokenizer.ggml.eos_token_id": ("u32", 0),
    }
    shapes = {"token_embd": (65, 32), "output_norm": (32,)}
    rows = {"attn_q": 32, "attn_k": 16, "attn_v": 16, "attn_output": 32}
    rows |= dict.fromkeys(("ffn_gate", "ffn_up", "ffn_down"), 32)
    shapes |= {f"blk.0.{name}": (count, 32) for name, count in rows.items()}
    shapes |= {f"blk.0.{name}": (32,) for name in ("attn_norm", "ffn_norm")}
    kinds = {1: ggml.TYPES["F32"], 2: ggml.TYPES["Q8_0"]}
    tensors = {}
    for name, shape in shapes.items():
        kind = kinds[len(shape)]
        size = gguf_write.tensor_bytes(name, kind, shape)
        tensors[f"{name}.weight"] = (kind, shape, bytes(size))
    return metadata, tensors


def importance():
    metadata = {"general.type": ("string", "imatrix"), "imatrix.datasets": ("string[]", ["a"])}
    metadata |= {"imatrix.chunk_count": ("u32", 2), "imatrix.chunk_size": ("u32", 64)}
    one = ggml.TYPES["F32"]
    tensors = {}
    for i in range(4):
        tensors[f"blk.{i}.x.weight.in_sum2"] = (one, (16,), np.ones(16, "<f4"))
        tensors[f"blk.{i}.x.weight.counts"] = (one, (1,), np.ones(1, "<f4"))
    return metadata, tensors


def mutate(seed: Parsed, rng: random.Random) -> bytes:
    """The file with one to three hostile changes."""
    content = rng.choice([structure, numbers])(seed, rng) if rng.random() < 0.7 else seed.content
    for _ in range(rng.choice([0, 1, 1, 2])):
        content = rng.choice([flip, truncate, cut_out, insert, overwrite])(content, seed, rng)
    return content


def structure(seed: Parsed, rng: random.Random) -> bytes:
    """Entries or tensor infos doubled, left out, or in another order; or the sections swapped."""
    entries = [seed.content[span] for span in seed.entries]
    tensors = [seed.content[span] for span in seed.tensors]
    chosen = rng.choice([entries, tensors])
    i, j = rng.randrange(len(chosen)), rng.randrange(len(chosen))
    kind = rng.randrange(4)
    if kind == 0:
        chosen.insert(i, chosen[j])
    elif kind == 1:
        del chosen[i]
    elif kind == 2:
        chosen[i], chosen[j] = chosen[j], chosen[i]
    return seed.rebuilt(entries, tensors, swapped=kind == 3)


def numbers(seed: Parsed, rng: random.Random) -> bytes:
    """A count, a length, a type, a dimension or an offset that says something hostile."""
    return with_number(
        seed.content, rng.choice(seed.numbers), rng.choice([*HOSTILE, rng.getrandbits(16)])
    )


def with_number(content: bytes, span: Span, value: int) -> bytes:
    raw = struct.pack("<Q", value)[: span.size]
    return content[: span.start] + raw + content[span.start + span.size :]


def _place(content: bytes, seed: Parsed, rng: random.Random) -> int:
    # Mostly before the tensors, where the names and the sizes are.
    return (
        rng.randrange(min(seed.blob, len(content)) if rng.random() < 0.9 else len(content))
        if content
        else 0
    )


def flip(content: bytes, seed: Parsed, rng: random.Random) -> bytes:
    bad = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        if bad:
            bad[_place(content, seed, rng)] ^= 1 << rng.randrange(8)
    return bytes(bad)


def truncate(content: bytes, seed: Parsed, rng: random.Random) -> bytes:
    return content[: _place(content, seed, rng)]


def cut_out(content: bytes, seed: Parsed, rng: random.Random) -> bytes:
    at = _place(content, seed, rng)
    return content[:at] + content[at + rng.randrange(1, 40) :]


def insert(content: bytes, seed: Parsed, rng: random.Random) -> bytes:
    at = _place(content, seed, rng)
    return content[:at] + rng.randbytes(rng.randrange(1, 40)) + content[at:]


def overwrite(content: bytes, seed: Parsed, rng: random.Random) -> bytes:
    at = _place(content, seed, rng)
    return content[:at] + struct.pack("<Q", rng.choice(HOSTILE)) + content[at + 8 :]


def check(path: Path, content: bytes, load: bool = False) -> str:
    """ "refused" or "read"; AssertionError if the reader did anything that it should not.

    Args:
        path: where the input is written for the reader.
        content: the input.
        load: if it reads, also load it as a model and as an imatrix.
    """
    path.unlink(missing_ok=True)
    path.write_bytes(content)
    tracemalloc.start()
    start = time.process_time()
    file = _refusing(gguf.read, path)
    seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < SECONDS, f"took {seconds:.1f} s"
    assert peak <= 2 * len(content) + SLACK, f"{peak:,} bytes for a file of {len(content):,}"
    if file is None:
        return "refused"
    same(file, Parsed(content))
    if load:
        _refusing(gguf_llama.load, path)
        _refusing(imatrix.read, path)
    return "read"


def _refusing(read: Callable, path: Path):
    """What `read` returns, or None if it refuses the file in a sentence."""
    try:
        return read(path)
    except FormatError as error:
        if len(str(error)) > LONGEST_MESSAGE + len(str(path)):
            raise AssertionError(f"says {len(str(error)):,} characters") from error
        return None


def same(file: gguf.Gguf, plain: Parsed) -> None:
    """The reader and the plain parser found the same, and every tensor decodes."""
    assert list(file.metadata) == list(plain.metadata)
    for key, value in plain.metadata.items():
        found = file.metadata[key]
        found = found.tolist() if isinstance(found, np.ndarray) else found
        # repr tells 1 from True, and lets NaN equal NaN.
        assert repr(found) == repr(value), key
    assert list(file.tensors) == list(plain.infos)
    for name, (kind, dims, offset) in plain.infos.items():
        info = file.tensors[name]
        found = (info.kind.id, info.shape[::-1], info.start)
        assert found == (kind, dims, plain.blob + offset), name
        assert len(file.raw(name)) == info.size
        if info.kind.name in ggml.READERS:
            assert tuple(file.tensor(name).shape) == info.shape


def inputs(start: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Input number n is the same in every run."""
    known = seeds()
    for number in range(start, start + count):
        rng = random.Random(number)
        yield number, mutate(known[number % len(known)], rng)


def run(start: int, count: int, loads: int = 10) -> fuzzing.Found:
    """How many inputs were read and refused, and the failures by number; every 10th is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "input.gguf")
        return fuzzing.outcomes(
            inputs(start, count), lambda n, content: check(path, content, n % loads == 0)
        )


if __name__ == "__main__":
    fuzzing.main(__doc__, run)
