"""GPTQ against the algorithms that it is equal to, written from their formulas in float64.

Every oracle knows the grid only as a list of values, and rounds by looking at each of them.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from gptq_problems import losses, problem

from qlib.methods.gptq import gptq, inverse_cholesky
from qlib.methods.rtn import rtn
from qlib.presets import format as named_format

DAMPING = 0.01


def damped(stats) -> np.ndarray:
    hessian = stats.hessian.double().numpy()
    return hessian + DAMPING * hessian.diagonal().mean() * np.eye(len(hessian))


def row_values(bits: int, scale: float) -> np.ndarray:
    return np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)) * scale


def nearest(x: float, values: np.ndarray) -> int:
    return int(np.abs(values - x).argmin())


def obq(weight, hessian, values, order=None):
    """Codes of one row by Optimal Brain Quantization (arXiv 2208.11580, eq. 3), in a fixed order.

    After every column the inverse of what remains of the Hessian is computed anew.
    """
    w, codes = weight.copy(), np.zeros(len(weight), int)
    left = list(range(len(w)) if order is None else order)
    while left:
        column, inverse = left[0], np.linalg.inv(hessian[np.ix_(left, left)])
        codes[column] = nearest(w[column], values)
        error = w[column] - values[codes[column]]
        w[left] -= error / inverse[0, 0] * inverse[:, 0]
        left = left[1:]
    return codes


def resolve(weight, hessian, values):
    """Codes of one row if the columns that are left are always the best real numbers.

    With the errors e_D of the columns that are done, e H e^T is least at H_LL e_L = -H_LD e_D.
    """
    n = len(weight)
    codes, error = np.zeros(n, int), np.zeros(n)
    for j in range(n):
        left, done = slice(j, n), slice(0, j)
        best = -np.linalg.solve(hessian[left, left], hessian[left, done] @ error[done])
        codes[j] = nearest(weight[j] - best[0], values)
        error[j] = weight[j] - values[codes[j]]
    return codes


def ldl(hessian):
    """M, D of H = M D M^T with M unit upper triangular, by Gaussian elimination from the end."""
    rest, n = hessian.copy(), len(hessian)
    m, d = np.eye(n), np.zeros(n)
    for k in reversed(range(n)):
        d[k] = rest[k, k]
        m[:k, k] = rest[:k, k] / d[k]
        rest[:k, :k] -= d[k] * np.outer(m[:k, k], m[:k, k])
    return m, d


def ldlq(weight, m, values):
    """Codes of one row by QuIP's adaptive rounding: linear feedback of the earlier errors."""
    codes, error = np.zeros(len(weight), int), np.zeros(len(weight))
    for k in range(len(weight)):
        codes[k] = nearest(weight[k] + error[:k] @ m[:k, k], values)
        error[k] = weight[k] - values[codes[k]]
    return codes


def check(weight, stats, bits, codes_of_row, **options) -> float:
    """Share of the codes that agree with the oracle, or with rounding where that is no worse."""
    scheme = named_format(f"int{bits}-row")
    q, base = gptq(weight, scheme, stats, damping=DAMPING, **options), rtn(weight, scheme)
    assert torch.equal(q.parts["scale"], base.parts["scale"])
    scales, plain = base.parts["scale"].double().numpy(), losses(weight, base, stats)
    equal = []
    for r, (row, codes) in enumerate(zip(weight.double().numpy(), unpacked(q))):
        values = row_values(bits, scales[r, 0])
        wanted = codes_of_row(row, values)
        error = row - values[wanted]
        if error @ stats.hessian.double().numpy() @ error >= plain[r]:
            wanted = unpacked(base)[r]
        equal.append(codes == wanted)
    return float(np.mean(equal))


def unpacked(q) -> np.ndarray:
    return q.format.unpack(q.parts["codes"], q.shape).int().numpy()


# -- the same algorithm under three names ---------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_equals_optimal_brain_quantization(bits, seed):
    weight, stats = problem(seed, 8, 8)
    hessian = damped(stats)
    assert check(weight, stats, bits, lambda w, values: obq(w, hessian, values)) == 1
    assert check(weight, stats, bits, lambda w, values: resolve(w, hessian, values)) == 1


def test_equals_optimal_brain_quantization_by_falling_diagonal():
    weight, stats = problem(5, 8, 8)
    hessian = damped(stats)
    order = sorted(range(8), key=lambda j: -hessian[j, j])
    assert order != list(range(8))
    assert check(weight, stats, 3, lambda w, v: obq(w, hessian, v, order), act_order=True) == 1
    assert check(weight, stats, 3, lambda w, v: obq(w, hessian, v), act_order=True) < 1


def test_optimal_brain_quantization_with_one_thing_wrong_differs():
    weight, stats = problem(1, 8, 8)
    hessian = damped(stats)
    flipped = hessian.copy()
    flipped[0, 1] = flipped[1, 0] = -hessian[0, 1]
    assert check(weight, stats, 3, lambda w, values: obq(w, flipped, values)) < 1
    backward = range(7, -1, -1)
    assert check(weight, stats, 3, lambda w, values: obq(w, hessian, values, backward)) < 1
    assert check(weight, stats, 3, lambda w, values: [nearest(x, values) for x in w]) < 1


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("columns", [37, 150])
def test_equals_ldlq(bits, columns):
    weight, stats = problem(2, 6, columns)
    m, d = ldl(damped(stats))
    np.testing.assert_allclose(m @ np.diag(d) @ m.T, damped(stats), atol=1e-9 * d.max())
    assert check(weight, stats, bits, lambda w, values: ldlq(w, m, values)) == 1
    # The factorization from the other end is as valid, but feeds back from columns yet to come.
    wrong = np.linalg.cholesky(damped(stats)).T
    wrong /= wrong.diagonal()[:, None]
    assert check(weight, stats, bits, lambda w, values: ldlq(w, wrong, values)) < 1


def test_ldlq_diagonal_is_the_inverse_square_of_the_factor():
    _, stats = problem(3, 1, 40)
    m, d = ldl(damped(stats))
    upper = inverse_cholesky(stats.hessian, DAMPING).double().numpy()
    np.testing.assert_allclose(upper.diagonal() ** -2.0, d, rtol=1e-3)
    np.testing.assert_allclose(upper / upper.diagonal()[:, None], np.linalg.inv(m), atol=1e-3)
    assert not np.allclose(upper.diagonal() ** -2.0, damped(stats).diagonal(), rtol=0.1)


# -- scales fitted on the way ---------------------------------------------------------------------


def grouped(weight, hessian, bits, size, updated=True):
    """Values of one row with min-max scales, float16, fitted when a group's first column comes."""
    n, top = len(weight), 2**bits - 1
    error, values = np.zeros(n), np.zeros(n)
    for j in range(n):
        best = -np.linalg.solve(hessian[j:, j:], hessian[j:, :j] @ error[:j])
        now = weight[j:] - best
        if j % size == 0:
            group = now[:size] if updated else weight[j : j + size]
            low, high = min(group.min(), 0), max(group.max(), 0)
            scale = float(np.float16((high - low) / top))
            zero = np.clip(np.round(-low / scale), 0, top)
        values[j] = (np.clip(np.round(now[0] / scale) + zero, 0, top) - zero) * scale
        error[j] = weight[j] - values[j]
    return values


@pytest.mark.parametrize(("columns", "size"), [(24, 8), (23, 8), (20, 5), (9, 16), (6, 1)])
@pytest.mark.parametrize("static", [True, False])
def test_scales_come_from_the_original_or_the_updated_weights(columns, size, static):
    weight, stats = problem(7, 5, columns)
    options = {"damping": DAMPING, "static_groups": static}
    q = gptq(weight, f"int3-g{size}-asym", stats, **options).dequantize().double().numpy()
    base = rtn(weight, f"int3-g{size}-asym")
    rows, hessian = weight.double().numpy(), damped(stats)
    found = [False, False]
    for updated in (True, False):
        wanted = np.stack([grouped(row, hessian, 3, size, updated) for row in rows])
        error = rows - wanted
        loss = np.einsum("ri,ij,rj->r", error, stats.hessian.double().numpy(), error)
        kept = (loss >= losses(weight, base, stats))[:, None]
        wanted = np.where(kept, base.dequantize().double().numpy(), wanted)
        found[not updated] = np.allclose(q, wanted, rtol=1e-6, atol=1e-6)
    # With a single group the updated weights are the original ones.
    one_group = size >= columns
    assert found == [not static or one_group, static or one_group]


# -- how far from the best ------------------------------------------------------------------------


def all_losses(row, values, hessian):
    """e H e^T of every combination of codes, smallest code sets first."""
    combinations = np.array(list(itertools.product(values, repeat=len(row))))
    error = row - combinations
    return np.einsum("ci,ij,cj->c", error, hessian, error)


def test_exhaustive_search_is_never_worse_and_sometimes_better():
    best, ours, half = [], [], []
    for seed in range(6):
        weight, stats = problem(seed, 4, 6)
        q, hessian = gptq(weight, "int2-row", stats), stats.hessian.double().numpy()
        scales = q.parts["scale"].double().numpy()[:, 0]
        for row, scale in zip(weight.double().numpy(), scales):
            values = row_values(2, scale)
            best.append(all_losses(row, values, hessian).min())
            half.append(all_losses(row, values[1:3], hessian).min())
        ours += losses(weight, q, stats).tolist()
    best, ours, half = map(np.array, (best, ours, half))
    assert (best <= ours * (1 + 1e-9)).all()
    assert 0 < (best < ours * 0.999).sum() < len(best)
    # A search that may use only two of the four codes does lose.
    assert (half > ours).any()


def test_error_without_clipping_is_bounded():
    """Babai's bound (arXiv 2507.18553): at most a quarter of sum_j (scale / U_jj)^2 in each row."""
    weight, stats = problem(4, 16, 48, kind="alike")
    # The first column is never moved: as the largest, it leaves room for all others.
    weight[:, 0] = 8
    q, base = gptq(weight, "int8-row", stats), rtn(weight, "int8-row")
    assert 0 < unpacked(q)[:, 1:].min() < unpacked(q)[:, 1:].max() < 255
    d = ldl(damped(stats))[1].sum()
    bound = q.parts["scale"].double().numpy()[:, 0] ** 2 * d / 4
    for tensor, holds in ((q, True), (base, False)):
        error = (weight - tensor.dequantize()).double().numpy()
        loss = np.einsum("ri,ij,rj->r", error, damped(stats), error)
        assert (loss <= bound).all() == holds


def test_three_weights_by_hand():
    """Steps of 1/4. Column 0 is off by 0.44 steps, so column 1 is asked for 1.44 + 0.44 / 2."""
    weight, stats = torch.tensor([[0.36, 0.36, 1.75]]), problem(0, 1, 3)[1]
    stats.hessian = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
    assert rtn(weight, "int4-row").dequantize().tolist() == [[0.25, 0.25, 1.75]]
    assert gptq(weight, "int4-row", stats, damping=0).dequantize().tolist() == [[0.25, 0.5, 1.75]]
    # Opposite signs: the error has to be repeated, not undone.
    stats.hessian[0, 1] = stats.hessian[1, 0] = -0.5
    assert gptq(weight, "int4-row", stats, damping=0).dequantize().tolist() == [[0.25, 0.25, 1.75]]
