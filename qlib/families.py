"""Families of quantization labels as data: their grammar, and what it says.

The labels of GGUF files and of caches are in label.py, which reads them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from .ggml import TYPES

Bpw = float | tuple[float, float]


@dataclass(frozen=True)
class Label:
    """What a label says, and what is customary where it says nothing.

    Args:
        name: as matched in the text; bits: nominal bits of a code, None if the name hides them.
        group: weights that share a scale (a whole block of ggml), None for rows and tensors.
        qlib: the same format's name in `qlib.format`, or None.
        quantizes: "weights", "weights and activations", "KV cache", or all three.
        method: how the codes are chosen, where the label tells.
        expected_bpw: bits per weight, or a (low, high) range, of what `bpw_of` says:
            "quantized weights", "whole file" (7B to 405B weights) or "cached values".
    """

    name: str
    bits: float | None
    format: str
    group: int | None
    qlib: str | None
    containers: tuple[str, ...]
    note: str
    quantizes: str = "weights"
    method: str | None = None
    expected_bpw: Bpw | None = None
    bpw_of: str = "quantized weights"


BITS = r"(\d+(?:\.\d+)?)bpw|(?<![a-z])(?:int|nf|q|w)([1-8])|(?<![\d.])([1-8])[-_ ]?bit"
GROUP = r"g(?:s|roup)?[-_ ]?(\d+)|(\d+)g"


def number(pattern: str, name: str) -> float | None:
    found = re.search(pattern, name, re.I)
    value = float(next(filter(None, found.groups()))) if found else None
    return int(value) if value and value.is_integer() else value


@dataclass(frozen=True)
class Family(Label):
    """Labels of one grammar. What a Label tells is the default; `bits` and `group` may be named.

    Args:
        pattern: regular expression, without regard to case; needs: a word elsewhere in the text.
        extra: bits that a group has besides its codes; "-asym" in `qlib`, or "asym" in a name,
            adds a zero point.
        rank: 2 for formats of weights, 1 for caches, 0 for words too general to be trusted.
    """

    pattern: str = ""
    needs: str = ""
    extra: int = 0
    rank: int = 2

    def label(self, name: str) -> Label:
        """What `name`, matched by the pattern, says."""
        bits, group = number(BITS, name) or self.bits, number(GROUP, name) or self.group
        group = None if "nogs" in name.lower() else group
        same, bpw = self.qlib, self.expected_bpw
        if self.extra and group:
            same = same.format(bits=bits, group=group)
            same += "-asym" * ("asym" in name.lower() and same.endswith(f"g{group}"))
            bpw = bits + (self.extra + bits * same.endswith("-asym")) / group
        elif bpw is None or bits != self.bits:
            # Unless the family tells, only rows have scales, and they cost next to nothing.
            known = bpw is not None and self.bits is not None
            bpw = tuple(bits + x - self.bits for x in bpw) if known else (bits, bits + 0.02)
            same = same and same.format(bits=bits, group=group).replace("-gNone", "")
        told = {field.name: getattr(self, field.name) for field in fields(Label)}
        told |= {"name": name, "bits": bits, "group": group, "qlib": same, "expected_bpw": bpw}
        return Label(**told)

    def matches(self, text: str) -> list[re.Match]:
        """The places in `text` where a label stands alone."""
        # A number does not begin within another one: "1.58bit" holds no "8bit".
        whole = rf"(?<![A-Za-z0-9])(?!(?<=\d\.)\d)(?:{self.pattern})(?![A-Za-z0-9])"
        return list(re.finditer(whole, text, re.I)) if self.needs in text.lower() else []


def block_bpw(kind: str) -> float:
    """Bits per weight of a type of ggml."""
    return 8 * TYPES[kind].size / TYPES[kind].block


MODIFIERS = r"(?:int)?[1-8][-_ ]?bits?|int[1-8]|w\da16|g(?:s|roup)?[-_ ]?\d+|\d+g|nogs|a?sym"


def around(key: str, more: str = MODIFIERS) -> str:
    """`key` with up to four modifiers before and after: 4bit-128g-gptq, AWQ (4-bit g128)."""
    word, gap = rf"(?:{MODIFIERS}|{more})", "[-_., ]{0,2}"
    words = f"{word}(?:{gap}{word}){{0,3}}"
    return rf"(?:{words}{gap})?(?:{key})(?: ?\({words}\)|{gap}{words})?"


BOTH, ALL = "weights and activations", "weights, activations and KV cache"
ST, CT, MLX = ("safetensors",), ("compressed-tensors",), ("MLX",)
GROUPS, ROWS, MIXED = "integers in groups", "integers, scaled by row", "a mix of widths"
ASYM, OFFSET, E4M3 = "int{bits}-g{group}-asym", "int{bits}-g{group}-offset", "fp8_e4m3"
FP8 = "Each tensor, row or 128 x 128 block has a scale; so may activations."
MX = "OCP microscaling: libraries round the shared power of two in different ways."
CODES = "Codes of several weights at once; incoherence first: random signs and Hadamard."
BPW = "An average over tensors; h6 or h8 are the bits of the head."
PLAIN = "Not quantized."
AQLM = "float16 codebooks of every matrix count: 0.07 bits per weight in a 70B model, 0.29 in a 7B."
TRITS = "Dynamic mixes such as UD-IQ1_S are called 1.58-bit too, and are not ternary."
F8 = r"f(?:p|loat)?8"
# fmt: off
FAMILIES = [
    Family("F16", 16, "floating point", None, None, ("GGUF", *ST), PLAIN,
           expected_bpw=16.0, rank=0, pattern="b?f(?:p|loat)?16"),
    Family("F32", 32, "floating point", None, None, ("GGUF", *ST), PLAIN,
           expected_bpw=32.0, rank=0, pattern="f(?:p|loat)?32"),
    Family("GPTQ-Int4", 4, GROUPS, 128, ASYM, ST, "4 bits and groups of 128 unless the name tells.",
           method="GPTQ", extra=16, pattern=around("(?:auto)?gptq(?:[-_]model)?")),
    Family("AWQ", 4, GROUPS, 128, ASYM, ST, "Salient input channels are scaled before rounding.",
           method="AWQ", extra=16, pattern=around("(?:auto)?awq")),
    Family("int4-AutoRound", 4, GROUPS, 128, "int{bits}-g{group}", ST, "Rounding is learned.",
           method="AutoRound", extra=16, pattern=around("auto-?round")),
    Family("HQQ-4bit-g64", 4, GROUPS, 64, OFFSET, ST, "Offsets are fitted without data.",
           method="HQQ", extra=32, pattern=around("hqq")),
    Family("mlx-4bit-g64", 4, GROUPS, 64, OFFSET, MLX, "Embedding and head are quantized too.",
           extra=32, needs="mlx", pattern=around("q[2-68]|[2-68][-_ ]?bit", "mlx|[ad]wq")),
    Family("4bit", 4, "unknown", None, None, (), "The name tells neither format nor method.",
           rank=0, expected_bpw=(4, 4.6), pattern="[1-8]-?bit"),
    Family("INT4", 4, "integers", None, None, (), "The name tells neither groups nor method.",
           rank=0, expected_bpw=(4, 4.6), pattern="int[1-7](?!_t)"),
    Family("INT8", 8, ROWS, None, "int8", (), "Whether activations are quantized is not told.",
           rank=0, pattern="int8(?!_t)"),
    Family("INT4-g128", 4, GROUPS, 128, "int{bits}-g{group}", (), "A group has 16 bits of scale.",
           rank=0, extra=16, pattern=r"int[1-8][-_](?:g\d+|\d+g)(?:[-_]a?sym)?"),
    Family("W4A16", 4, GROUPS, 128, "int{bits}-g{group}", CT, "Activations stay in 16 bits.",
           extra=16, pattern=around("w[2-7]a16")),
    Family("W8A16", 8, ROWS, None, "int8", CT, "Activations stay in 16 bits.",
           pattern=around("w8a16")),
    Family("W8A16-FP8", 8, "E4M3", None, E4M3, CT, "Activations stay in 16 bits.",
           pattern="w8a16[-_]fp8|fp8[-_]w8a16"),
    Family("W8A8", 8, ROWS, None, "int8", CT, "Activations are INT8, scaled by token.", BOTH,
           pattern=around("w8a8")),
    Family("W8A8-FP8", 8, "E4M3", None, E4M3, CT, FP8, BOTH, pattern="w8a8[-_]fp8|fp8[-_]w8a8"),
    Family("W4A8", 4, GROUPS, 128, "int{bits}-g{group}", CT, "Activations are INT8 or FP8.", BOTH,
           extra=16, pattern=around("w[2-7]a(?:fp)?8", "fp8")),
    Family("W4A4", 4, ROWS, None, "int{bits}", CT, "Rotations come first: QuaRot, SpinQuant.", BOTH,
           pattern=around("w[2-8]a4")),
    Family("W4A8KV4", 4, GROUPS, 128, "int{bits}-g{group}", ST, "KV: bits of keys and values.", ALL,
           extra=16, pattern=r"w[2-7]a(?:4|8|16)[-_]?kv\d+"),
    Family("W8A8KV8", 8, ROWS, None, "int8", ST, "KV: bits of keys and values.", ALL,
           pattern=r"w8a(?:4|8|16)[-_]?kv\d+"),
    Family("FP8", 8, "E4M3", None, E4M3, ST, FP8, BOTH,
           pattern=r"fp8(?:[-_](?:dynamic|static|block|tensor|channel))*(?![-_]?e\d+m\d)"),
    Family("FP8-KV", 8, "E4M3", None, E4M3, ST, FP8, ALL,
           rank=1, pattern="fp8[-_]kv(?![-_]cache)"),
    Family("E4M3", 8, "E4M3", None, E4M3, ST, FP8, pattern=rf"(?:{F8}[-_]?)?e4m3(?:fn)?"),
    Family("E5M2", 8, "E5M2", None, "fp8_e5m2", ST, FP8, pattern=rf"(?:{F8}[-_]?)?e5m2"),
    Family("NVFP4", 4, "E2M1, a scale in E4M3", 16, "nvfp4", (*CT, "ModelOpt", "MLX", "GGUF"),
           "The scales have a scale: one float32 for a tensor.", BOTH,
           expected_bpw=block_bpw("NVFP4"), pattern="nvfp4(?:[-_]?w4a4)?"),
    Family("NVFP4A16", 4, "E2M1, a scale in E4M3", 16, "nvfp4", CT, "Activations stay in 16 bits.",
           expected_bpw=block_bpw("NVFP4"), pattern="nvfp4[-_]?(?:w4)?a16"),
    Family("FP4", 4, "E2M1", None, None, ST, "NVFP4 in NVIDIA's names; MXFP4 or others elsewhere.",
           rank=1, expected_bpw=(4.25, 4.5), pattern="fp4"),
    Family("MXFP4", 4, "E2M1, a power of two", 32, "mxfp4", (*ST, *CT, "MLX", "GGUF"), MX,
           expected_bpw=block_bpw("MXFP4"), pattern="mxfp4"),
    Family("MXFP6", 6, "E2M3, a power of two", 32, "mxfp6_e2m3", CT, MX,
           extra=8, pattern="mxfp6(?:[-_]?e2m3)?"),
    Family("MXFP6_E3M2", 6, "E3M2, a power of two", 32, "mxfp6_e3m2", (), MX,
           extra=8, pattern="mxfp6[-_]?e3m2"),
    Family("MXFP8", 8, "E4M3, a power of two", 32, "mxfp8_e4m3", (*CT, "MLX"), MX,
           extra=8, pattern="mxfp8(?:[-_]?e4m3)?"),
    Family("MXFP8_E5M2", 8, "E5M2, a power of two", 32, "mxfp8_e5m2", (), MX,
           extra=8, pattern="mxfp8[-_]?e5m2"),
    Family("bnb-4bit", 4, "NF4", 64, "nf4", ST, "The low end is with double quantization.",
           method="bitsandbytes", expected_bpw=(4.127, 4.5),
           pattern=r"(?:bnb|bitsandbytes)(?:[-_ ](?:4-?bit|int4|nf4))*|nf4(?:[-_ ]bnb)?"),
    Family("bnb-8bit", 8, ROWS, None, "int8", ST, "Activations above 6 are multiplied in float16.",
           BOTH, method="LLM.int8()",
           pattern=r"(?:bnb|bitsandbytes)[-_ ](?:8-?bit|int8)|llm\.int8(?:\(\))?|int8[-_ ]bnb"),
    Family("4.0bpw-h6-exl2", None, MIXED, None, None, ("EXL2",), BPW, method="GPTQ",
           expected_bpw=(2, 8), pattern=around("exl2", r"\d+(?:\.\d+)?bpw|h\d")),
    Family("exl3-3.0bpw", None, "trellis codes, " + MIXED, None, None, ("EXL3",), BPW,
           method="QTIP", expected_bpw=(1, 8), pattern=around("exl3", r"\d+(?:\.\d+)?bpw|h\d")),
    Family("4.0bpw", None, MIXED, None, None, ("EXL2", "EXL3"), BPW,
           rank=1, pattern=r"(?=[\d.]*[1-9])\d+(?:\.\d+)?bpw(?:-h\d)?"),
    Family("AQLM-2Bit-1x16", 2, "one vector of 8 weights", 8, None, ST, AQLM, method="AQLM",
           expected_bpw=(2.07, 2.29), pattern="(?:aqlm(?:[-_]pv)?[-_]?)?2bit[-_]1x16|aqlm"),
    Family("AQLM-1Bit-1x16", 1, "one vector of 16 weights", 16, None, ST, AQLM, method="AQLM",
           expected_bpw=(1.14, 1.58), pattern="(?:aqlm(?:[-_]pv)?[-_]?)?1bit[-_]1x16"),
    Family("AQLM-2Bit-2x8", 2, "sums of two vectors of 8 weights", 8, None, ST, AQLM,
           method="AQLM", pattern="(?:aqlm(?:[-_]pv)?[-_]?)?2bit[-_]2x8"),
    Family("QuIP#", 2, "vectors of the E8 lattice", None, None, ST, CODES, method="QuIP#",
           pattern="(?:quip(?:#|[-_]?sharp)|e8p(?:rvq)?)(?:[-_ ][234]-?bit)?"),
    Family("QTIP-2Bit", 2, "trellis codes", None, None, ST, CODES, method="QTIP",
           pattern="qtip(?:[-_ ][1-8]-?bit)?"),
    Family("BitNet b1.58", 1.58, "-1, 0, +1", None, "ternary", (*ST, "GGUF"), TRITS,
           method="BitNet", expected_bpw=(1.6, block_bpw("TQ2_0")),
           pattern=r"bitnet(?:[-_ ]?b1[._]58)?|b1[._]58|1[._]58[-_ ]?bits?"),
    Family("ternary", 1.58, "-1, 0, +1", None, "ternary", (), "Five trits fit in a byte.",
           rank=0, expected_bpw=(1.6, block_bpw("TQ2_0")), pattern="ternary"),
]
# fmt: on
