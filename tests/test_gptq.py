"""GPTQ: what holds for every format, and what it does with awkward layers and statistics."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gptq_problems import losses, problem
from hypothesis import given, settings
from hypothesis import strategies as st

from qlib import fit, grid
from qlib.calibrate import Stats
from qlib.methods.gptq import gptq, inverse_cholesky
from qlib.methods.rtn import imatrix, rtn
from qlib.presets import format as named_format
from qlib.scheme import Scheme

# `qlib.methods.gptq` is the function of that name.
module = sys.modules["qlib.methods.gptq"]
KINDS = ["mixed", "independent", "giant", "wild", "dead", "alike"]
SUPERBLOCK = Scheme(grid.GRIDS["uint6"], 8, fit.absmax)
LEARNED = grid.Grid("learned", torch.tensor([-1.0, -0.3, 0.0, 0.25, 0.9]))
FORMATS = {
    name: named_format(name)
    for name in (
        *("int4-g8", "int4-g16-asym", "int3-g16-asym-mse", "int2-g5-asym", "int4-g16-offset"),
        *("int8-row", "int3-row-asym", "int4-tensor", "int2-g2", "int1-g8", "int3-g64-mse"),
        *("nf4", "mxfp4", "nvfp4", "mxfp6_e2m3", "mxfp8_e4m3", "fp8_e4m3", "fp8_e5m2", "ternary"),
    )
} | {
    "superblock": Scheme(grid.int_grid(4), 8, fit.absmax, scale=SUPERBLOCK),
    "superblock-offset": Scheme(
        grid.GRIDS["uint4"], 8, fit.minmax, scale=SUPERBLOCK,
        offset=Scheme(grid.int_grid(6), 8, fit.absmax),
    ),
    "ternary-blocks": Scheme(grid.TERNARY, 8, fit.absmean),
    "signed-extreme": Scheme(grid.int_grid(4), 8, fit.absmax_signed),
    "learned": Scheme(LEARNED, 8, fit.absmax),
    "learned-tensor": Scheme(LEARNED, "tensor", fit.absmax),
    "bfloat16-scale": Scheme(grid.int_grid(3), 8, fit.mse, scale=torch.bfloat16),
    "sixteen-bits": Scheme(grid.FP16.grid, 8, fit.absmax, scale=torch.float32),
}  # fmt: skip
TAIL = 43  # no block size divides it
BIG = 1 + 1e-5  # the choice between GPTQ and rounding is made in float32


def never_worse(weight, q, base, stats) -> bool:
    """Whole tensor; and every row, unless the rows share what is stored."""
    ours, theirs = losses(weight, q, stats), losses(weight, base, stats)
    shared = any(
        len(part) != len(weight) and not torch.equal(part, base.parts[name])
        for name, part in q.parts.items()
    )
    each = bool((ours <= theirs * BIG).all())
    return bool(ours.sum() <= theirs.sum() * BIG) and (shared or each)


def values_seen(monkeypatch, function):
    """The result of function(), and the columns of values that error feedback was made from."""
    seen, values, keep = [], Scheme.values, module._keep_better

    def recorded(scheme, codes, scale, offset):
        seen.append(values(scheme, codes, scale, offset))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Scheme, "values", recorded)
        patch.setattr(module, "_keep_better", lambda q, *_: q)
        q = function()
    assert module._keep_better is keep
    columns = [x for x in seen if x.shape == (q.shape[0], 1)]
    return q, torch.cat(columns[: q.shape[1]], dim=1)


# -- every format ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"static_groups": False}], ids=str)
def test_every_format_gains_and_is_what_feedback_saw(name, options, monkeypatch):
    scheme, (weight, stats) = FORMATS[name], problem(1, 12, TAIL)
    q, seen = values_seen(monkeypatch, lambda: gptq(weight, scheme, stats, **options))
    if options.get("act_order"):
        order = stats.hessian.diagonal().argsort(descending=True)
        seen = torch.empty_like(seen).index_copy_(1, order, seen)
    assert torch.equal(q.dequantize(), seen)
    # With one code changed it is not.
    codes = scheme.unpack(q.parts["codes"], q.shape).clone()
    codes[3, -1] = (codes[3, -1] + 1) % 2
    q.parts["codes"] = scheme.pack(codes, q.shape)
    assert not torch.equal(q.dequantize(), seen)
    final, base = gptq(weight, scheme, stats, **options), rtn(weight, scheme)
    assert never_worse(weight, final, base, stats)
    assert losses(weight, final, stats).sum() < 0.9 * losses(weight, base, stats).sum()
    assert final.shape == (12, TAIL)
    assert final.nbytes == base.nbytes
    layout = {name: (part.dtype, tuple(part.shape)) for name, part in final.parts.items()}
    assert layout == scheme.layout(final.shape)
    assert list(layout) == list(base.parts)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1), (3, 2), (300, 3)])
@pytest.mark.parametrize("name", ["int2-g3-asym-mse", "nvfp4", "int4-tensor", "int3-row"])
def test_small_and_thin_weights(shape, name):
    weight, stats = problem(0, *shape)
    q, base = gptq(weight, name, stats), rtn(weight, name)
    assert q.shape == shape
    assert never_worse(weight, q, base, stats)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(1, 4),
    block=st.sampled_from(["g3", "g8", "g32", "row", "tensor"]),
    kind=st.sampled_from(["sym", "asym", "offset", "asym-mse", "sym-mse"]),
    inputs=st.sampled_from(KINDS),
    tokens=st.sampled_from([1, 3, 20, 200]),
    act_order=st.booleans(),
    static=st.booleans(),
    outlier=st.booleans(),
)
def test_never_above_rounding(
    seed, bits, block, kind, inputs, tokens, act_order, static, outlier
):  # fmt: skip
    weight, stats = problem(seed, 6, 20, tokens, inputs)
    if outlier:
        weight[0, 0] = 500
        weight[1] = 0
    name = f"int{bits}-{block}-{kind}"
    q = gptq(weight, name, stats, act_order, static)
    assert never_worse(weight, q, rtn(weight, name), stats)


def test_without_the_choice_some_rows_are_worse(monkeypatch):
    monkeypatch.setattr(module, "_keep_better", lambda q, *_: q)
    problems = [problem(seed, 6, 20, 3) for seed in range(20)]
    q = [(w, gptq(w, "int1-g8", s), rtn(w, "int1-g8"), s) for w, s in problems]
    assert not all(never_worse(*each) for each in q)


def test_rows_are_chosen_each_on_its_own():
    """Rows of one weight give what they give alone, if they share no scale."""
    weight, stats = problem(3, 8, 24, 5)
    together = gptq(weight, "int2-g8-asym", stats).dequantize()
    alone = [gptq(row[None], "int2-g8-asym", stats).dequantize() for row in weight]
    assert torch.equal(together, torch.cat(alone))
    base = rtn(weight, "int2-g8-asym").dequantize()
    kept = (together == base).all(1)
    assert 0 <= int(kept.sum()) < len(weight)
    assert not torch.equal(together, torch.cat([alone[1], alone[0], *alone[2:]]))


def test_rows_that_share_a_scale_are_chosen_together(monkeypatch):
    """A searching fit with importance finds another scale for the whole tensor than rounding's."""
    scheme, kept = Scheme(grid.int_grid(2), "tensor", fit.mse), []
    for seed in range(20):
        weight, stats = problem(seed, 4, 12, 2, "wild")
        q, base = gptq(weight, scheme, stats), rtn(weight, scheme)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_keep_better", lambda q, *_: q)
            raw = gptq(weight, scheme, stats)
        if torch.equal(raw.parts["scale"], base.parts["scale"]):
            continue
        kept.append(torch.equal(q.dequantize(), base.dequantize()))
        assert torch.equal(q.dequantize(), (base if kept[-1] else raw).dequantize())
        assert kept[-1] == (losses(weight, raw, stats).sum() >= losses(weight, base, stats).sum())
    assert 0 < sum(kept) < len(kept)


# -- what the Hessian does ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int3-g8-asym", "int4-row", "nvfp4", "nf4", "int2-g5"])
@pytest.mark.parametrize("options", [{}, {"act_order": True}], ids=str)
def test_diagonal_hessian_gives_rounding(name, options):
    weight, stats = problem(2, 6, TAIL)
    base, full = rtn(weight, name), gptq(weight, name, stats, **options)
    assert not torch.equal(full.dequantize(), base.dequantize())
    stats.hessian = torch.diag(stats.mean_square)
    q = gptq(weight, name, stats, **options)
    assert all(torch.equal(q.parts[part], base.parts[part]) for part in base.parts)


@pytest.mark.parametrize("name", ["int3-g16-asym", "int3-g24-asym", "int4-g200", "int4-row", "nf4"])
def test_codes_do_not_depend_on_the_batches(name):
    weight, stats = problem(6, 4, 150)
    wanted = gptq(weight, name, stats)
    for block in (1, 7, 16, 40, 1000):
        q = gptq(weight, name, stats, block=block)
        assert torch.equal(q.parts["codes"], wanted.parts["codes"])
        # A float32 scale may come out of another order of additions.
        torch.testing.assert_close(q.dequantize(), wanted.dequantize(), rtol=1e-5, atol=1e-5)


def test_batches_that_cut_groups_would_change_the_codes(monkeypatch):
    def cut(columns, size, block):
        return ((i, min(i + block, columns)) for i in range(0, columns, block))

    weight, stats = problem(6, 4, 150)
    running = {"format": "int3-g24-asym", "stats": stats, "static_groups": False}
    wanted = gptq(weight, **running).dequantize()
    monkeypatch.setattr(module, "_batches", cut)
    assert torch.equal(gptq(weight, **running, block=24).dequantize(), wanted)
    assert not torch.equal(gptq(weight, **running, block=40).dequantize(), wanted)


def test_batches_cover_every_column_once():
    for columns, size, block in [(10, 1, 4), (150, 24, 128), (150, 128, 16), (7, 8, 8), (9, 3, 2)]:
        spans = list(module._batches(columns, size, block))
        assert [i for start, stop in spans for i in range(start, stop)] == list(range(columns))
        # A batch that does not hold all of a group starts where the group does, or inside it.
        for start, stop in spans:
            assert start % size == 0 or stop <= (start // size + 1) * size


def mean_loss(name: str, inputs: str, seeds=range(8), **options) -> float:
    total = 0.0
    for seed in seeds:
        weight, stats = problem(seed, 8, 40, kind=inputs)
        base = losses(weight, rtn(weight, name), stats).sum()
        total += float(losses(weight, gptq(weight, name, stats, **options), stats).sum() / base)
    return total / len(seeds)


def test_act_order_helps_where_channels_differ_in_size():
    wild = [mean_loss("int4-row", "wild", act_order=flag) for flag in (False, True)]
    assert wild[1] < 0.85 * wild[0]
    # Where they do not, the order hardly matters.
    plain = [mean_loss("int4-row", "independent", act_order=flag) for flag in (False, True)]
    assert 0.97 < plain[1] / plain[0] < 1.03


@pytest.mark.parametrize("act_order", [False, True])
def test_searching_fits_gain_from_the_hessian(act_order, monkeypatch):
    with_it = mean_loss("int2-g8-asym-mse", "wild", act_order=act_order)
    monkeypatch.setattr(module, "_importance", lambda hessian, *_: torch.ones(len(hessian)))
    assert with_it < 0.8 * mean_loss("int2-g8-asym-mse", "wild", act_order=act_order)


def test_static_groups_are_those_of_rounding():
    weight, stats = problem(8, 6, TAIL)
    base = rtn(weight, "int3-g8-asym")
    for options, same in (
        ({}, True),
        ({"static_groups": False}, False),
        ({"act_order": True}, True),
    ):
        q = gptq(weight, "int3-g8-asym", stats, **options)
        assert torch.equal(q.parts["scale"], base.parts["scale"]) == same


def test_dead_channels_are_rounded_not_erased():
    weight, stats = problem(9, 6, 24, kind="dead")
    dead = stats.mean_square == 0
    q, base = gptq(weight, "int4-row", stats), rtn(weight, "int4-row")
    assert int(dead.sum()) == 2
    assert torch.equal(q.dequantize()[:, dead], base.dequantize()[:, dead])
    assert not torch.equal(q.dequantize()[:, ~dead], base.dequantize()[:, ~dead])
    assert (q.dequantize()[:, dead] != 0).any()


def test_inputs_of_zeros_give_rounding():
    weight, stats = problem(0, 4, 16)[0], Stats.of(torch.zeros(10, 16))
    for name in ("int4-g8", "int3-g8-asym-mse"):
        assert torch.equal(gptq(weight, name, stats).dequantize(), rtn(weight, name).dequantize())


# -- the factor of the inverse --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("damping", [0.001, 0.01, 1.0])
def test_inverse_cholesky(kind, damping):
    hessian = problem(1, 1, 30, kind=kind)[1].hessian
    upper = inverse_cholesky(hessian, damping)
    assert upper.dtype == torch.float32
    assert torch.equal(upper, upper.triu())
    exact = hessian.double().numpy()
    exact = exact + damping * exact.diagonal().mean() * np.eye(30)
    product = (upper.double() @ torch.from_numpy(exact) @ upper.double().T).numpy()
    np.testing.assert_allclose(product, np.eye(30), atol=2e-2)
    product = (upper.double() @ torch.from_numpy(exact * 1.1) @ upper.double().T).numpy()
    assert not np.allclose(product, np.eye(30), atol=2e-2)


def test_float64_where_float32_fails():
    # Whole numbers are exact in float32: the rank is 5 of 12, and only the damping is small.
    x = torch.from_numpy(np.random.default_rng(0).integers(-3, 4, (5, 12))).float()
    hessian, share = x.T @ x, 1e-9
    mean = hessian.diagonal().mean()
    shifted = hessian.flip(0, 1) + share * mean * torch.eye(12)
    assert int(torch.linalg.cholesky_ex(shifted).info) > 0
    exact = torch.linalg.inv(hessian.double() + share * mean * torch.eye(12).double())
    upper = inverse_cholesky(hessian, share).double()
    torch.testing.assert_close(upper.T @ upper, exact, rtol=0, atol=1e-4 * float(exact.max()))
    upper = inverse_cholesky(hessian, 10 * share).double()
    assert not torch.allclose(upper.T @ upper, exact, rtol=0, atol=1e-4 * float(exact.max()))


def test_damping_grows_tenfold_until_it_suffices():
    # Eigenvalues 2.1 and -0.1, mean of the diagonal 1: 0.01 and 0.1 do not suffice, 1 does.
    hessian = torch.tensor([[1.0, 1.1], [1.1, 1.0]])
    assert torch.equal(inverse_cholesky(hessian, 0.01), inverse_cholesky(hessian, 1.0))
    assert not torch.equal(inverse_cholesky(hessian, 0.02), inverse_cholesky(hessian, 1.0))


# -- what is refused, and what is left alone ------------------------------------------------------


def refuses(message: str, weight, format, stats, **options) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gptq(weight, format, stats, **options)


def test_refuses_what_it_cannot_quantize():
    weight, stats = problem(0, 4, 6)
    other, empty = problem(0, 4, 8)[1], Stats.of(torch.zeros(0, 6))
    broken = Stats.of(torch.eye(6))
    broken.hessian[0, 1] = torch.nan
    broken.hessian[2, 2] = torch.inf
    negative = Stats.of(torch.eye(6))
    negative.hessian[0, 1] = negative.hessian[1, 0] = 3000
    refuses(
        "weight [4, 6] and Hessian [8, 8] do not fit: a weight [out, in] needs a Hessian [in, in] "
        "of the same layer's inputs",
        weight, "int4-g2", other,
    )  # fmt: skip
    refuses(
        "weight [6] and Hessian [6, 6] do not fit: a weight [out, in] needs a Hessian [in, in] "
        "of the same layer's inputs",
        weight[0], "int4-g2", stats,
    )  # fmt: skip
    refuses(
        "the statistics hold 0 tokens: run calibration text through the layer",
        weight, "int4-g2", empty,
    )  # fmt: skip
    refuses(
        "the Hessian [6, 6] holds 2 NaN or infinite values: the layer's inputs overflow; "
        "calibrate in float32, or use rtn",
        weight, "int4-g2", broken,
    )  # fmt: skip
    refuses(
        "the Hessian [6, 6] is not positive definite with damping 10: use damping=0.01, and a "
        "Hessian that is a mean of x x^T (Stats.of)",
        weight, "int4-g2", negative,
    )  # fmt: skip
    refuses(
        "damping must be at least 0 and block at least 1, got -0.1, 128",
        weight, "int4-g2", stats, damping=-0.1,
    )  # fmt: skip
    refuses(
        "damping must be at least 0 and block at least 1, got 0.01, 0",
        weight, "int4-g2", stats, block=0,
    )  # fmt: skip
    weight[1, 1] = torch.nan
    refuses(
        "weight [4, 6] holds 1 NaN or infinite values; repair them first",
        weight, "int4-g2", stats,
    )  # fmt: skip


def test_refuses_formats_that_are_not_a_grid_with_scales():
    class Codebook:
        def __str__(self):
            return "codebook of 256 vectors"

    weight, stats = problem(0, 4, 6)
    refuses(
        "gptq needs a Scheme, such as 'int4-g128', got codebook of 256 vectors: use rtn",
        weight, Codebook(), stats,
    )  # fmt: skip
    with pytest.raises(ValueError, match="unknown format 'int9'"):
        gptq(weight, "int9", stats)


def test_arguments_stay_as_they_are():
    weight, stats = problem(0, 6, 16)
    weight.requires_grad_()
    before = weight.detach().clone(), stats.hessian.clone()
    q = gptq(weight, "int4-g8-asym-mse", stats, act_order=True)
    assert torch.equal(weight.detach(), before[0])
    assert torch.equal(stats.hessian, before[1])
    assert not any(part.requires_grad for part in q.parts.values())


def test_half_precision_weights():
    weight, stats = problem(0, 6, 16)
    half = weight.bfloat16()
    q, wanted = gptq(half, "int4-g8", stats), gptq(half.float(), "int4-g8", stats)
    assert torch.equal(q.dequantize(), wanted.dequantize())
    assert not torch.equal(q.dequantize(), gptq(weight, "int4-g8", stats).dequantize())


# -- imatrix --------------------------------------------------------------------------------------


def test_imatrix_weights_the_fit_by_the_mean_square():
    weight, stats = problem(4, 6, 40, kind="wild")
    q, name = imatrix(weight, "int3-g8-asym-mse", stats), "int3-g8-asym-mse"
    x = stats.mean_square
    wanted = rtn(weight, name, x.expand(6, 40))
    assert torch.equal(q.dequantize(), wanted.dequantize())
    assert not torch.equal(q.dequantize(), rtn(weight, name, x.flip(0)).dequantize())
    diagonal = replace(stats, hessian=torch.diag(x))
    plain = losses(weight, rtn(weight, name), diagonal).sum()
    assert losses(weight, q, diagonal).sum() < 0.9 * plain
    # A fit that does not search has no use for it.
    q, plain = imatrix(weight, "int3-g8", stats), rtn(weight, "int3-g8")
    assert torch.equal(q.dequantize(), plain.dequantize())


def test_imatrix_refuses_statistics_of_nothing():
    with pytest.raises(ValueError, match=r"^the statistics hold 0 tokens: run"):
        imatrix(torch.ones(2, 6), "int4-g2-mse", Stats.of(torch.zeros(0, 6)))
