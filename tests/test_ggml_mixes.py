"""Mixes against what llama.cpp's quantizer chose, and mixes of one's own against brute force."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import gguf as peer
import numpy as np
import pytest
from tiny_models import raises

from qlib.ggml import TYPES, mixes

RECORDED = json.loads((Path(__file__).parent / "mix_types.json").read_text())
CASES = RECORDED["cases"]
ROLES = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()


def llama(layers=16, gqa=2, tied=False, width=256):
    """Shapes by name; `width` divides as the case demands."""
    shapes = {"token_embd.weight": (64, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (64, width)
    for i in range(layers):
        shapes |= {f"blk.{i}.{role}.weight": (width, width) for role in ROLES}
        shapes |= {f"blk.{i}.attn_k.weight": (width // gqa, width)}
        shapes |= {f"blk.{i}.{norm}.weight": (width,) for norm in ("attn_norm", "ffn_norm")}
    return shapes


def chosen(case):
    model, _, file_type = case.partition("/")
    gqa = 4 if "gqa4" in model else 2
    shapes = llama(RECORDED["layers"], gqa, model.endswith("tied"))
    return mixes.assign(file_type, shapes, gqa, imatrix=False)


def expected(recorded):
    types = {}
    for role, found in recorded.items():
        most, others = (found, {}) if isinstance(found, str) else found
        if role.endswith(".weight"):
            types[role] = most
            continue
        types |= {f"blk.{i}.{role}.weight": most for i in range(RECORDED["layers"])}
        types |= {f"blk.{i}.{role}.weight": kind for kind, at in others.items() for i in at}
    return types


@pytest.mark.parametrize("case", CASES)
def test_types_are_those_of_llama_cpp(case):
    mix = chosen(case)
    norms = {name for name in mix.types if "norm" in name}
    assert {mix.types[name] for name in norms} == {"F32"}
    assert mix.fallbacks == ()
    if CASES[case] is None:
        file_type = case.partition("/")[2]
        assert any(mixes.needs_importance(file_type, *pair) for pair in mix.types.items())
    else:
        assert {n: kind for n, kind in mix.types.items() if n not in norms} == expected(CASES[case])


def test_every_condition_matters_to_the_record(monkeypatch):
    """A condition turned around must contradict a recorded case: the comparison can fail."""
    silent = []
    for name, holds in mixes.CONDITIONS.items():
        monkeypatch.setitem(mixes.CONDITIONS, name, lambda place, holds=holds: not holds(place))
        known = (case for case, found in CASES.items() if found is not None)
        if not any(
            {n: k for n, k in chosen(c).types.items() if "norm" not in n} != expected(CASES[c])
            for c in known
        ):
            silent.append(name)
        monkeypatch.setitem(mixes.CONDITIONS, name, holds)
    # Only types that need an imatrix ask for the middle layers, and nothing was recorded of them.
    assert silent == ["middle"]


# Read in llama-quant.cpp, not recorded by running it: the types that need an imatrix.
WITH_IMATRIX = {
    "IQ2_XXS": ("IQ2_XXS", "Q2_K", "Q5_K", "Q2_K", "IQ2_XXS", "Q2_K", "IQ2_XXS"),
    "IQ2_XS": ("IQ2_XS", "Q2_K", "Q5_K", "Q2_K", "IQ2_XS", "Q2_K", "IQ2_XS"),
    "IQ2_S": ("IQ2_XS", "IQ3_S", "Q5_K", "IQ3_S", "IQ3_S", "IQ3_S", "IQ2_XS"),
    "IQ2_M": ("IQ2_S", "IQ3_S", "Q5_K", "IQ3_S", "IQ3_S", "IQ3_S", "IQ2_S"),
    "IQ1_S": ("IQ1_S", "Q2_K", "Q5_K", "Q2_K", "IQ2_XXS", "Q2_K", "IQ1_S"),
    "IQ1_M": ("IQ1_M", "Q2_K", "Q5_K", "Q2_K", "IQ2_XXS", "Q2_K", "IQ1_M"),
    "IQ3_XXS": ("IQ2_S", "IQ3_S", "Q5_K", "IQ3_XXS", "IQ3_S", "IQ3_XXS", "IQ3_XXS"),
    "Q2_K_S": ("Q2_K", "Q2_K", "Q6_K", "Q2_K", "Q2_K", "Q4_K", "Q2_K"),
    "Q4_0": ("Q4_0", "Q4_0", "Q6_K", "Q4_0", "Q4_0", "Q4_1", "Q4_0"),
    "Q5_0": ("Q5_0", "Q5_0", "Q6_K", "Q5_0", "Q5_0", "Q5_1", "Q5_0"),
    "IQ4_XS": ("IQ4_XS", "IQ4_XS", "Q6_K", "IQ4_XS", "IQ4_XS", "IQ4_XS", "IQ4_XS"),
}


@pytest.mark.parametrize("file_type", WITH_IMATRIX)
def test_types_with_an_imatrix(file_type):
    types = mixes.assign(file_type, llama(), 2, imatrix=True).types
    places = "blk.0.attn_q token_embd output blk.0.attn_v blk.0.attn_output blk.0.ffn_down".split()
    found = [types[f"{place}.weight"] for place in [*places, "blk.9.ffn_down"]]
    assert tuple(found) == WITH_IMATRIX[file_type]
    of_four = mixes.assign(file_type, llama(gqa=4), 4, imatrix=True).types
    grouped = {"Q4_0": "Q4_0", "Q5_0": "Q5_0", "IQ4_XS": "Q5_K"}
    assert of_four["blk.0.attn_v.weight"] == grouped.get(file_type, "Q4_K")


def test_iq3_xs_saves_in_the_middle_layers():
    types = mixes.assign("IQ3_XS", llama(), 2, imatrix=True).types
    kinds = [types[f"blk.{i}.ffn_up.weight"] for i in range(16)]
    assert kinds == ["IQ3_S"] * 2 + ["IQ3_XXS"] * 12 + ["IQ3_S"] * 2
    assert types["blk.0.attn_k.weight"] == types["blk.0.attn_q.weight"] == "IQ3_XXS"


def test_the_70b_model_has_better_v():
    kinds = {gqa: mixes.assign("Q3_K_S", llama(80, gqa), gqa, False) for gqa in (1, 8)}
    assert kinds[1].types["blk.0.attn_v.weight"] == "Q3_K"
    assert kinds[8].types["blk.0.attn_v.weight"] == "Q5_K"


def test_ids_are_those_of_gguf():
    theirs = {kind.name.removeprefix("MOSTLY_").removeprefix("ALL_"): int(kind)
              for kind in peer.LlamaFileType}  # fmt: skip
    ours = {name: kind.id for name, kind in mixes.FILE_TYPES.items()}
    assert {name: theirs[name] for name in ours} == ours


def test_table_names_only_what_exists():
    for kind in mixes.FILE_TYPES.values():
        assert kind.default in TYPES
        for role, options in kind.rules.items():
            assert role in (*ROLES, "output", "token_embd")
            assert all(name in TYPES for name, _ in options)
            # What stands after an unconditional type is never reached.
            assert all(conditions for _, conditions in options[:-1])


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        ("IQ1_S", "IQ4_NL"), ("IQ1_M", "IQ4_NL"), ("IQ2_XXS", "IQ4_NL"), ("IQ2_XS", "IQ4_NL"),
        ("IQ2_S", "IQ4_NL"), ("IQ3_XXS", "IQ4_NL"), ("IQ3_S", "IQ4_NL"), ("IQ4_XS", "IQ4_NL"),
        ("Q2_K", "Q4_0"), ("Q3_K", "Q4_0"), ("TQ1_0", "Q4_0"), ("TQ2_0", "Q4_0"),
        ("Q4_K", "Q5_0"), ("Q5_K", "Q5_1"), ("Q6_K", "Q8_0"),
    ],
)  # fmt: skip
def test_fallbacks(wanted, got):
    """The list is llama.cpp's: blocks of 32 for blocks of 256, and F16 where 32 is too many."""
    mix = mixes.fitted({"w": wanted}, {"w": (3, 576)})
    assert mix.types == {"w": got}
    (fallback,) = mix.fallbacks
    assert (fallback.tensor, fallback.wanted, fallback.got) == ("w", wanted, got)
    assert mixes.fitted({"w": wanted}, {"w": (3, 100)}).types == {"w": "F16"}
    assert mixes.fitted({"w": wanted}, {"w": (3, 512)}) == mixes.Mix({"w": wanted})


def test_fallback_speaks_as_llama_cpp_does():
    name = "blk.0.attn_q.weight"
    (fallback,) = mixes.fitted({name: "Q4_K"}, {name: (9, 576)}).fallbacks
    assert str(fallback) == (
        "blk.0.attn_q.weight - ncols 576 not divisible by 256 (required for type q4_K) "
        "-> falling back to q5_0"
    )


def test_smollm2_falls_back_and_its_output_is_q8_0():
    """Width 576: the embedding, which is the output too, is Q8_0 without a warning."""
    shapes = llama(30, 3, tied=True, width=576)
    mix = mixes.assign("Q4_K_M", shapes, 3, imatrix=False)
    assert mix.types["token_embd.weight"] == "Q8_0"
    assert len(mix.fallbacks) == 7 * 30
    assert {(f.wanted, f.got) for f in mix.fallbacks} == {("Q4_K", "Q5_0"), ("Q6_K", "Q8_0")}


def test_blocks_of_32_that_do_not_fit():
    mix = mixes.assign("Q8_0", llama(1, width=100), 2, imatrix=False)
    assert {kind for name, kind in mix.types.items() if "norm" not in name} == {"F16"}
    assert len(mix.fallbacks) == 9


def test_who_needs_an_imatrix():
    need = mixes.needs_importance
    assert need("IQ2_XXS", "blk.0.attn_q.weight", "IQ2_XXS")
    assert not need("IQ2_XXS", "token_embd.weight", "IQ2_XXS")
    assert not need("IQ2_XXS", "blk.0.attn_v.weight", "Q2_K")
    assert need("Q2_K_S", "blk.0.attn_v.weight", "Q2_K")
    assert not need(None, "blk.0.attn_v.weight", "Q2_K")


def test_unknown_file_type():
    known = ", ".join(mixes.FILE_TYPES)
    with raises(f"unknown file type 'Q4_K_X': did you mean 'Q4_K_S'? known are {known}"):
        mixes.assign("Q4_K_X", llama(), 2, imatrix=False)


CANDIDATES = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0"]


def bits(mix, shapes):
    kinds = {name: TYPES[kind] for name, kind in mix.types.items()}
    total = sum(math.prod(shapes[n]) // kind.block * kind.size for n, kind in kinds.items())
    return 8 * total / sum(map(math.prod, shapes.values()))


def problem(tensors=60, seed=0):
    """Tensors of many sizes and sensitivities, the harm falling fourfold with every bit."""
    rng = np.random.default_rng(seed)
    shapes = {f"t{i}": (int(rng.integers(1, 9)) * 16, 512) for i in range(tensors)}
    scale = {name: rng.lognormal(0, 2) for name in shapes}
    bpw = {name: 8 * TYPES[name].size / TYPES[name].block for name in CANDIDATES}
    return shapes, {n: {c: s * 4.0 ** -bpw[c] for c in CANDIDATES} for n, s in scale.items()}


@pytest.mark.parametrize("target", [2.7, 3.3, 4.5, 5.0, 6.1, 8.4])
def test_own_mix_meets_its_target(target):
    shapes, harm = problem()
    mix = mixes.for_bits(target, harm, shapes, CANDIDATES)
    assert 0.99 * target <= bits(mix, shapes) <= target
    assert mix.types.keys() == shapes.keys()


def test_own_mix_gives_bits_to_what_is_sensitive():
    shapes, harm = problem()
    mix = mixes.for_bits(4.5, harm, shapes, CANDIDATES)
    size = {c: TYPES[c].size / TYPES[c].block for c in CANDIDATES}
    density = {name: harm[name]["Q2_K"] / math.prod(shapes[name]) for name in shapes}
    ranked = sorted(shapes, key=density.get)
    given = [size[mix.types[name]] for name in ranked]
    assert np.mean(given[:20]) < np.mean(given[20:40]) < np.mean(given[40:])
    total = sum(harm[name][kind] for name, kind in mix.types.items())
    assert total < 0.7 * sum(found["Q4_K"] for found in harm.values())


def test_own_mix_is_near_the_best_of_all():
    """All 4^6 mixes of six tensors: the greedy one is at most 10% worse than the best."""
    shapes, harm = problem(6, seed=3)
    kinds = CANDIDATES[:4]
    every = [dict(zip(shapes, choice)) for choice in itertools.product(kinds, repeat=6)]
    for target in (3.0, 3.5, 4.0, 4.5, 5.0):
        fits = [types for types in every if bits(mixes.Mix(types), shapes) <= target]
        best = min(sum(harm[n][k] for n, k in types.items()) for types in fits)
        mix = mixes.for_bits(target, harm, shapes, kinds)
        assert sum(harm[n][k] for n, k in mix.types.items()) <= 1.1 * best


def test_bits_that_help_nobody_are_not_spent():
    shapes = {"a": (4, 256), "b": (4, 256)}
    harm = {"a": {"Q4_K": 1.0, "Q8_0": 0.0}, "b": {"Q4_K": 1.0, "Q8_0": 1.0}}
    assert mixes.for_bits(99, harm, shapes, ["Q4_K", "Q8_0"]).types == {"a": "Q8_0", "b": "Q4_K"}


def test_candidates_that_do_not_divide_a_row_are_passed_over():
    shapes = {"a": (4, 32), "b": (4, 256)}
    harm = {"a": {"Q8_0": 1.0}, "b": {"Q4_K": 1.0, "Q8_0": 0.5}}
    assert mixes.for_bits(6, harm, shapes, ["Q4_K", "Q8_0"]).types == {"a": "Q8_0", "b": "Q4_K"}
    with raises("a: rows of 32 fit none of Q4_K"):
        mixes.for_bits(6, harm, shapes, ["Q4_K"])


def test_what_cannot_be_met():
    shapes, harm = {"a": (4, 256)}, {"a": {"Q4_K": 1.0}}
    with raises("4 bits per weight: these candidates take 4.500"):
        mixes.for_bits(4, harm, shapes, ["Q4_K"])
    for bad in ({}, {"a": {"Q4_K": -1.0}}, {"a": {"Q4_K": math.nan}}, {"a": {"Q5_K": 1.0}}):
        with raises("a: no sensitivity of 0 or more for Q4_K"):
            mixes.for_bits(5, bad, shapes, ["Q4_K"])
