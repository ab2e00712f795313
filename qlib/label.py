"""The labels of quantization in the names of files and repositories, and what they mean.

A label is a custom of those who publish models: Q4_K_M, GPTQ-Int4 and NVFP4 name a recipe, a
method and a number format. EVERY holds them as data; `find` tries every family.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import replace

from .families import FAMILIES, Family, Label, block_bpw
from .ggml import TYPES
from .presets import NAMED

# Labels of GGUF files and the bits per weight of whole files, Llama 2 7B to Llama 3.1 405B:
# llama.cpp, tools/quantize/README.md; file sizes at bartowski/Meta-Llama-3.1-70B-Instruct-GGUF.
_TABLE = """
Q4_0 4.5 4.7     Q4_1 5.0 5.2     Q5_0 5.5 5.6     Q5_1 6.0 6.1     Q8_0 8.5 8.51
Q2_K 2.9 3.4     Q3_K 3.8 4.0     Q4_K 4.8 4.9     Q5_K 5.6 5.75    Q6_K 6.55 6.6
Q2_K_S 2.7 3.0   Q2_K_L 3.0 3.7   Q2_K_XL 2.5 3.5  Q3_K_S 3.4 3.65  Q3_K_M 3.8 4.0
Q3_K_L 4.1 4.3   Q3_K_XL 4.2 4.8  Q4_K_S 4.5 4.7   Q4_K_M 4.8 4.9   Q4_K_L 4.8 5.3
Q4_K_XL 4.4 5.4  Q5_K_S 5.5 5.6   Q5_K_M 5.6 5.75  Q5_K_L 5.65 6.05 Q5_K_XL 5.4 6.4
Q6_K_L 6.55 6.85 Q6_K_XL 6.5 7.5  Q8_K_XL 8.5 10.6 IQ1_S 1.7 2.05   IQ1_M 1.85 2.2
IQ2_XXS 2.1 2.4  IQ2_XS 2.35 2.6  IQ2_S 2.5 2.75   IQ2_M 2.7 2.95   IQ3_XXS 3.1 3.3
IQ3_XS 3.3 3.5   IQ3_S 3.45 3.7   IQ3_M 3.6 3.8    IQ4_XS 4.25 4.5  IQ4_NL 4.5 4.7
TQ1_0 1.7 2.2    TQ2_0 2.1 2.6    Q1_0 1.1 1.9     Q2_0 2.2 2.8     MXFP4_MOE 4.3 4.7
Q4_0_4_4 4.5 4.7 Q4_0_4_8 4.5 4.7 Q4_0_8_8 4.5 4.7
"""
_CELLS = iter(_TABLE.split())
FILES = {name: (float(low), float(high)) for name, low, high in zip(_CELLS, _CELLS, _CELLS)}
# The block of most weights, where the label does not begin with it.
MOSTLY = {"IQ2_M": "IQ2_S", "IQ3_XS": "IQ3_S", "IQ3_M": "IQ3_S", "Q8_K_XL": "Q8_0"}
KINDS = {
    "IQ4": "16 uneven levels times a block's scale",
    "IQ": "vectors of a fixed grid with signs, times a block's scale",
    "TQ": "-1, 0, +1 times a float16 scale per block",
    "MX": "E2M1, a power of two per block",
    r"Q\d_K": "integers in blocks of 256, whose sub-blocks have quantized scales",
    r"Q\d_1": "integers, a float16 scale and minimum per block",
    "Q": "integers, a float16 scale per block",
}
LARGE = "The smaller mix of this block, but with embedding and output in Q8_0."
NOTES = dict.fromkeys(["Q2_K_L", "Q3_K_XL", "Q4_K_L", "Q5_K_L", "Q6_K_L"], LARGE)
ARM = "Q4_0 with rows interleaved for ARM, which llama.cpp now does when it loads a Q4_0 file."
NOTES |= dict.fromkeys(["Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8"], ARM)
NOTES |= {
    "MXFP4_MOE": "Experts are MXFP4, and all other matrices Q8_0.",
    "IQ2_S": "A file of this name is mostly IQ2_XS, with 2.5 to 2.75 bits per weight in all.",
}
UNSLOTH = "Unsloth chooses a type for every tensor of every model; only the file tells which."


def gguf(name: str) -> list[Family]:
    """The label `name` of GGUF files, and UD-`name`, the same as a dynamic mix of Unsloth."""
    low, high = FILES[name]
    block = MOSTLY.get(name) or max((kind for kind in TYPES if name.startswith(kind)), key=len)
    bpw, bits = block_bpw(block), 1.58 if "TQ" in name else int(re.search(r"\d", name)[0])
    kind = next(text for start, text in KINDS.items() if re.match(start, block))
    note = f"A mix of blocks, most of them {block} with {bpw:g} bits per weight."
    # Q4_K is no part of Q4_K_Z, which nobody knows, but a name may go on as in Q4_K_M_v2.
    pattern = name.replace("_", "[-_]") + r"(?!_(?:[A-Z]{1,2}|R?\d)(?![A-Za-z0-9]))"
    more = {"bpw_of": "whole file", "expected_bpw": (low, high), "pattern": pattern}
    mix = Family(name, bits, kind, TYPES[block].block, None, ("GGUF",), note, **more)
    # Seen: 1.67 for UD-IQ1_S of DeepSeek-R1, 10.4 for UD-Q8_K_XL of Qwen3.6-27B.
    spread = round(bpw - 0.1, 4), round(bpw + (2.1 if name == "Q8_K_XL" else 0.9), 4)
    more = {"pattern": "UD[-_]" + pattern, "method": "Unsloth Dynamic", "expected_bpw": spread}
    dynamic = replace(mix, name=f"UD-{name}", note=UNSLOTH, **more)
    if name == block:
        note = f"A whole file has {low:g} to {high:g} bits per weight: some tensors get more."
        more = {"qlib": name.lower() if name.lower() in NAMED else None, "expected_bpw": bpw}
        mix = replace(mix, note=note, bpw_of="quantized weights", **more)
    return [replace(mix, note=NOTES.get(name, mix.note)), dynamic]


CACHED = ["F16", "Q8_0", "Q5_0", "Q5_1", "Q4_0", "Q4_1", "IQ4_NL", "FP8", "E4M3", "E5M2"]
CACHED += ["INT8", "INT4-g128", "NVFP4"]


def cache(family: Family) -> Family:
    """The same format for keys and values: "fp8 KV", "kv_cache_dtype=fp8", "-ctk q8_0"."""
    kind, key = f"(?:{family.pattern})", r"kv(?:[-_ ]?cache)?(?:[-_ ]?(?:dtype|type))?"
    return replace(
        family, name=f"{family.name} KV", quantizes="KV cache", bpw_of="cached values", rank=1,
        containers=(), note="Bits of each cached key and value.",
        pattern=rf"{kind} kv(?: ?cache)?|{kind}[-_]kv[-_]cache|{key}[ =:_-]{{1,2}}{kind}"
        rf"|(?:-ct[kv]|--cache-type-[kv])[ =]{kind}",
    )  # fmt: skip


EVERY = [*FAMILIES, *(family for name in FILES for family in gguf(name))]
EVERY += [cache(family) for family in EVERY if family.name in CACHED]


def outermost(spans: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """The (start, end) that lie in no other one."""
    outer, reach = set(), -1
    for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        if end > reach:
            outer.add((start, end))
            reach = end
    return outer


def find(text: str) -> Label | None:
    """The label in `text`, or None: of those within no other, the most telling, longest, last.

    >>> find("Llama-3.1-8B-Instruct-UD-Q5_K_XL.gguf").name, find("openai/gpt-oss-20b")
    ('UD-Q5_K_XL', None)
    """
    found = [(match, family) for family in EVERY for match in family.matches(text)]
    outer = outermost({match.span() for match, _ in found})

    def telling(pair: tuple[re.Match, Family]) -> tuple:
        match, family = pair
        length = match.end() - match.start()
        return match.span() in outer, family.rank, length, match.start(), bool(family.needs)

    if not found:
        return None
    match, family = max(found, key=telling)
    return family.label(match[0])


def parse(text: str) -> Label:
    """The label in `text`. Raises ValueError, with the nearest labels, if there is none.

    >>> parse("Q4_0").expected_bpw, parse("mlx-community/Mistral-7B-4bit-g32").expected_bpw
    (4.5, 5.0)
    """
    if label := find(text):
        return label
    known = {family.name.upper(): family.name for family in EVERY}
    words = [text, *re.split(r"[\s/]|\.gguf$", text), *re.findall(r"[\w#]+", text)]
    near = {known[x]: 0 for w in words for x in difflib.get_close_matches(w.upper(), known, 2)}
    hint = f"did you mean {', '.join([*near][:3])}?" if near else "labels look like Q4_K_M or FP8"
    raise ValueError(f"no quantization label in {text!r}; {hint}")
