"""Which type each tensor of a Llama gets: the mixes behind llama.cpp's file types, and one's own.

A file type such as Q4_K_M is a mix: a type for most tensors, and better ones for those that hurt
most. TABLE records what llama.cpp's quantizer does (llama-quant.cpp); `for_bits` spends a number of
bits where a measured sensitivity is largest.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..knapsack import spend
from .block import TYPES

# File type, its id in general.file_type, its default type; then role=type@condition,... for the
# roles that differ: the first condition that holds decides, else the default type.
TABLE = """
F32      0 F32
F16      1 F16
BF16    32 BF16
Q4_0     2 Q4_0     ffn_down=Q4_1@eighth+imatrix
Q4_1     3 Q4_1
Q5_0     8 Q5_0     ffn_down=Q5_1@eighth+imatrix
Q5_1     9 Q5_1
Q8_0     7 Q8_0     output=Q8_0
Q2_K    10 Q2_K     attn_v=Q4_K@gqa4,Q3_K attn_output=Q3_K ffn_down=Q3_K
Q2_K_S  21 Q2_K     attn_v=Q4_K@gqa4 ffn_down=Q4_K@eighth
Q3_K_S  11 Q3_K
Q3_K_M  12 Q3_K     attn_v=Q5_K@two,Q4_K attn_output=Q4_K ffn_down=Q5_K@sixteenth,Q4_K
Q3_K_L  13 Q3_K     attn_v=Q5_K attn_output=Q5_K ffn_down=Q5_K
Q4_K_S  14 Q4_K     attn_v=Q5_K@four ffn_down=Q5_K@eighth
Q4_K_M  15 Q4_K     attn_v=Q6_K@more ffn_down=Q6_K@more
Q5_K_S  16 Q5_K
Q5_K_M  17 Q5_K     attn_v=Q6_K@more ffn_down=Q6_K@more
Q6_K    18 Q6_K
IQ4_NL  25 IQ4_NL   attn_v=Q5_K@gqa4 ffn_down=Q5_K@eighth+plain
IQ4_XS  30 IQ4_XS   attn_v=Q5_K@gqa4 ffn_down=Q5_K@eighth+plain
IQ3_S   26 IQ3_S    attn_v=Q4_K@gqa4
IQ3_M   27 IQ3_S    attn_v=Q4_K attn_output=Q4_K ffn_down=Q4_K@eighth
IQ3_XS  22 IQ3_S    attn_q=IQ3_XXS attn_k=IQ3_XXS attn_v=Q4_K@gqa4 ffn_gate=IQ3_XXS@middle
                    ffn_up=IQ3_XXS@middle
IQ3_XXS 23 IQ3_XXS  output=Q5_K token_embd=IQ3_S attn_q=IQ2_S attn_k=IQ2_S attn_output=IQ3_S
                    attn_v=Q4_K@gqa4,IQ3_S@plain ffn_down=Q4_K@eighth+plain,Q3_K@plain
IQ2_M   29 IQ2_S    output=Q5_K token_embd=IQ3_S attn_output=IQ3_S
                    attn_v=Q4_K@gqa4,IQ3_S ffn_down=IQ3_S@eighth
IQ2_S   28 IQ2_XS   output=Q5_K token_embd=IQ3_S attn_output=IQ3_S
                    attn_v=Q4_K@gqa4,IQ3_S ffn_down=IQ3_S@eighth
IQ2_XS  20 IQ2_XS   output=Q5_K token_embd=Q2_K attn_v=Q4_K@gqa4,Q2_K ffn_down=Q2_K@eighth
IQ2_XXS 19 IQ2_XXS  output=Q5_K token_embd=Q2_K attn_v=Q4_K@gqa4,Q2_K ffn_down=Q2_K@eighth
IQ1_M   31 IQ1_M    output=Q5_K token_embd=Q2_K attn_output=IQ2_XXS
                    attn_v=Q4_K@gqa4,Q2_K ffn_down=Q2_K@eighth
IQ1_S   24 IQ1_S    output=Q5_K token_embd=Q2_K attn_output=IQ2_XXS
                    attn_v=Q4_K@gqa4,Q2_K ffn_down=Q2_K@eighth
TQ1_0   36 TQ1_0    token_embd=Q4_K
TQ2_0   37 TQ2_0    token_embd=Q4_K
"""
# The output matrix, and the embedding where it serves as one, unless the table says otherwise.
OUTPUT = "Q6_K"
DENSE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Place:
    """Where a tensor stands: its layer of so many, query heads per key head, imatrix or none."""

    layer: int
    layers: int
    gqa: int
    imatrix: bool


# Integer divisions as in llama.cpp: in a model of fewer than 8 layers the first eighth is empty.
CONDITIONS: dict[str, Callable[[Place], bool]] = {
    "gqa4": lambda p: p.gqa >= 4,
    "imatrix": lambda p: p.imatrix,
    "plain": lambda p: not p.imatrix,
    "two": lambda p: p.layer < 2,
    "four": lambda p: p.layer < 4,
    "sixteenth": lambda p: p.layer < p.layers // 16,
    "eighth": lambda p: p.layer < p.layers // 8,
    "middle": lambda p: p.layers // 8 <= p.layer < 7 * p.layers // 8,
    "more": lambda p: (
        not p.layers // 8 <= p.layer < 7 * p.layers // 8 or (p.layer - p.layers // 8) % 3 == 2
    ),
}


@dataclass(frozen=True)
class FileType:
    """A row of TABLE: rules are role -> ((type, conditions), ...)."""

    name: str
    id: int
    default: str
    rules: Mapping[str, Sequence[tuple[str, Sequence[str]]]]

    def choose(self, role: str, place: Place) -> str:
        """The type of the tensor with this role."""
        for kind, conditions in self.rules.get(role, ()):
            if all(CONDITIONS[condition](place) for condition in conditions):
                return kind
        return OUTPUT if role == "output" and self.default not in DENSE else self.default


def _parse(row: str) -> FileType:
    name, number, default, *rules = row.split()
    read = {}
    for role, options in (rule.split("=") for rule in rules):
        pairs = (option.partition("@") for option in options.split(","))
        read[role] = tuple(
            (kind, tuple(when.split("+")) if when else ()) for kind, _, when in pairs
        )
    return FileType(name, int(number), default, read)


# A row that starts with spaces continues the one before.
FILE_TYPES = {kind.name: kind for kind in map(_parse, re.findall(r"^\w.*(?:\n +.*)*", TABLE, re.M))}

# What is stored where a row is no whole number of blocks: blocks of 32, and past them F16.
FALLBACKS = {name: "IQ4_NL" for name in TYPES if name.startswith(("IQ1", "IQ2", "IQ3", "IQ4_XS"))}
FALLBACKS |= dict.fromkeys(("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0")
FALLBACKS |= {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# These types are garbage without an importance matrix, and in a Q2_K_S file so is Q2_K.
NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")


def ggml_name(kind: str) -> str:
    """A type as ggml spells it: q4_K, iq4_xs, f16."""
    return kind.lower().replace("_k", "_K")


@dataclass(frozen=True)
class Fallback:
    """A tensor that does not get the type it should: printed as llama.cpp warns of it."""

    tensor: str
    wanted: str
    got: str
    reason: str

    def __str__(self) -> str:
        return f"{self.tensor} - {self.reason} -> falling back to {ggml_name(self.got)}"


@dataclass(frozen=True)
class Mix:
    """The type of every tensor, and which of them are not what was wanted."""

    types: dict[str, str]
    fallbacks: tuple[Fallback, ...] = ()


def assign(file_type: str, shapes: Mapping[str, tuple[int, ...]], gqa: int, imatrix: bool) -> Mix:
    """The type of every tensor of a Llama, as llama.cpp's quantizer chooses it.

    Args:
        file_type: a name in FILE_TYPES.
        shapes: by GGUF name; without "output.weight" the embedding is the output as well.
        gqa: query heads per key head.
        imatrix: whether an importance matrix is at hand.

    Raises ValueError for an unknown file type.
    """
    if file_type not in FILE_TYPES:
        near = difflib.get_close_matches(file_type.upper(), FILE_TYPES, n=1, cutoff=0.0)[0]
        known = ", ".join(FILE_TYPES)
        raise ValueError(
            f"unknown file type {file_type!r}: did you mean {near!r}? known are {known}"
        )
    chosen = FILE_TYPES[file_type]
    layers = sum(name.endswith(".attn_v.weight") for name in shapes)
    wanted = {}
    for name, shape in shapes.items():
        *block, role, _ = name.split(".")
        place = Place(int(block[1]) if block else 0, layers, gqa, imatrix)
        if role == "token_embd" and "output.weight" not in shapes:
            role = "output"
        kind = chosen.choose(role, place)
        # Only the 70B model has 80 layers: its v matrices are small, and cheap to make better.
        if role == "attn_v" and layers == 80 and gqa > 1 and kind in ("Q3_K", "Q4_K"):
            kind = "Q5_K"
        # A row that the file type's own blocks do not divide makes the output Q8_0 at once.
        if role == "output" and shape[-1] % TYPES[chosen.default].block:
            kind = "Q8_0"
        wanted[name] = kind if len(shape) > 1 else "F32"
    return fitted(wanted, shapes)


def fitted(wanted: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Mix:
    """The wanted types, each replaced where its blocks do not divide the tensor's rows."""
    types, fallbacks = dict(wanted), []
    for name, kind in wanted.items():
        width, block = shapes[name][-1], TYPES[kind].block
        if width % block:
            got = FALLBACKS.get(kind, "F16")
            types[name] = "F16" if width % TYPES[got].block else got
            reason = f"ncols {width} not divisible by {block} (required for type {ggml_name(kind)})"
            fallbacks.append(Fallback(name, kind, types[name], reason))
    return Mix(types, tuple(fallbacks))


def needs_importance(file_type: str | None, tensor: str, kind: str) -> bool:
    """Whether llama.cpp refuses to make this tensor without an importance matrix."""
    # llama.cpp measures none for these two.
    if tensor in ("token_embd.weight", "output.weight"):
        return False
    return kind in NEED_IMPORTANCE or (file_type == "Q2_K_S" and kind == "Q2_K")


def for_bits(
    target_bpw: float,
    sensitivities: Mapping[str, Mapping[str, float]],
    shapes: Mapping[str, tuple[int, ...]],
    candidates: Sequence[str],
) -> Mix:
    """A mix of one's own: at most `target_bpw` bits per weight, spent where they help most.

    How is decided by `knapsack.spend`.

    Args:
        target_bpw: over all tensors of `shapes`.
        sensitivities: tensor -> candidate -> harm: a KL, or a weighted squared error. Summed.
        shapes: the tensors of two dimensions that are to be stored; candidates that do not divide
            a tensor's rows are passed over for it.
        candidates: names of types.

    Raises ValueError if even the smallest types take more, or a sensitivity is missing or negative.
    """
    sizes, harm = _tables(sensitivities, shapes, candidates)
    weights = sum(math.prod(shape) for shape in shapes.values())
    least = 8 * sizes.min(1).sum() / weights
    if target_bpw < least:
        raise ValueError(f"{target_bpw:g} bits per weight: these candidates take {least:.3f}")
    chosen = spend(sizes, harm, target_bpw * weights / 8)
    return Mix({name: candidates[i] for name, i in zip(shapes, chosen)})


def _tables(sensitivities, shapes, candidates) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and harm [tensors, candidates]; a type that does not divide a row is infinitely big."""
    for candidate in candidates:
        if candidate not in TYPES:
            raise ValueError(f"unknown type {candidate!r}; known are {', '.join(TYPES)}")
    sizes, harm = np.zeros((2, len(shapes), len(candidates)))
    sizes[:] = np.inf
    for i, (name, shape) in enumerate(shapes.items()):
        for j, kind in enumerate(TYPES[candidate] for candidate in candidates):
            if shape[-1] % kind.block == 0:
                sizes[i, j] = math.prod(shape) // kind.block * kind.size
                harm[i, j] = sensitivities.get(name, {}).get(kind.name, math.nan)
                if not 0 <= harm[i, j] < math.inf:
                    raise ValueError(f"{name}: no sensitivity of 0 or more for {kind.name}")
        if np.isinf(sizes[i]).all():
            raise ValueError(f"{name}: rows of {shape[-1]} fit none of {', '.join(candidates)}")
    return sizes, harm
