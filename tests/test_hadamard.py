"""Hadamard matrices in integers, and the fast product against the dense one."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sympy import fwht

from qlib import hadamard as module
from qlib.hadamard import base_matrix, hadamard, hadamard_matrix
from qlib.kernels.cpu import hadamard as cpu

# Of QuaRot's list and of models: (n, the base expected).
BASES = {12: 12, 20: 20, 28: 28, 36: 36, 40: 20, 44: 44, 52: 52, 60: 60, 76: 76, 92: 92}
BASES |= {108: 108, 116: 116, 140: 140, 156: 156, 172: 172, 576: 36, 1536: 12, 14336: 28}
BASES |= {11008: 172, 13824: 108, 18944: 148, 5120: 20, 28672: 28, 29568: 924, 8960: 140}
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Powers of two below a vector, of 1, 2, 4 and more vectors; bases of each construction.
SIZES = [1, 2, 8, 16, 32, 64, 128, 256, 2048, 12, 24, 48, 192, 384, 320, 576, 28 * 64, 92 * 16]


def possible(n: int) -> bool:
    try:
        base_matrix(n)
    except ValueError:
        return False
    return True


def is_hadamard(matrix: torch.Tensor) -> bool:
    """Decided exactly: float32 holds all these integers."""
    n = len(matrix)
    return bool((matrix.abs() == 1).all()) and torch.equal(matrix @ matrix.T, n * torch.eye(n))


def randn(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.manual_seed(0)).to(dtype)


def dense(x: torch.Tensor, transpose: bool = False) -> torch.Tensor:
    matrix = hadamard_matrix(x.shape[-1]).double()
    return x.double() @ (matrix.T if transpose else matrix) / math.sqrt(len(matrix))


def test_every_matrix_to_400_is_orthogonal():
    sizes = [n for n in range(1, 401) if possible(n)]
    assert all(is_hadamard(hadamard_matrix(n)) for n in sizes)
    missing = [n for n in range(4, 401, 4) if n not in sizes]
    assert missing == [188, 236, 260, 268, 292, 324, 356, 372, 376]
    assert [n for n in sizes if n % 4] == [1, 2]


def test_every_base_to_1200_is_orthogonal():
    sizes = [n for n in range(404, 1201, 4) if possible(n) and len(base_matrix(n)) == n]
    assert len(sizes) > 60
    assert all(is_hadamard(base_matrix(n)) for n in sizes)


@pytest.mark.parametrize(("n", "m"), BASES.items())
def test_sizes_of_models(n, m):
    base = base_matrix(n)
    assert len(base) == m
    assert is_hadamard(base)
    wrong = base.clone()
    wrong[m // 2, m // 3] *= -1
    assert not is_hadamard(wrong)


@pytest.mark.parametrize("n", [1, 2, 4, 64, 1024])
def test_powers_of_two_are_sylvesters(n):
    """In closed form: the sign of entry i, j is the parity of the bits that i and j share."""
    want = torch.tensor([[1.0 - 2 * ((i & j).bit_count() % 2) for j in range(n)] for i in range(n)])
    assert torch.equal(hadamard_matrix(n), want)
    assert n == 1 or not torch.equal(hadamard_matrix(n), want.roll(1, 0))


@pytest.mark.parametrize("n", [2, 16, 64])
def test_the_product_is_sympys(n):
    x = [i * i % 23 - 11 for i in range(n)]
    y = hadamard(torch.tensor(x, dtype=torch.float64)) * math.sqrt(n)
    assert torch.allclose(y, torch.tensor([float(v) for v in fwht(x)], dtype=y.dtype), atol=1e-11)
    x[1] += 1
    assert not torch.allclose(y, torch.tensor([float(v) for v in fwht(x)], dtype=y.dtype))


def test_a_matrix_is_the_callers_own():
    hadamard_matrix(12).zero_()
    assert is_hadamard(hadamard_matrix(12))
    base_matrix.cache_clear()
    with torch.device("meta"), torch.inference_mode():
        base_matrix(12)
    assert base_matrix(12).device.type == "cpu"
    assert not base_matrix(12).is_inference()


@pytest.mark.parametrize(("p", "k"), [(5, 1), (23, 1), (3, 2), (3, 3), (5, 2), (7, 2)])
def test_fields(p, k):
    """Half of the elements are squares, and a square times a square is one."""
    squares = module._squares(p, k)
    assert len(set(squares)) == (p**k - 1) // 2
    if k == 1:
        assert {s for (s,) in squares} == {i * i % p for i in range(1, p)}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_product_is_the_dense_one(n, dtype, transpose):
    x = randn(3, 2, n, dtype=dtype)
    y = hadamard(x, transpose=transpose)
    assert y.dtype is dtype
    assert y.shape == x.shape
    tolerance = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 4 * torch.finfo(dtype).eps)
    want = dense(x, transpose)
    # Float32 rounds sums of n numbers about 1, 16 bits round the result once.
    assert (y.double() - want).abs().max() <= tolerance
    x[0, 0, n // 2] += 8
    assert (y.double() - dense(x, transpose)).abs().max() > tolerance


@pytest.mark.parametrize("n", [11008, 14336, 4096])
def test_long_rows(n):
    x = randn(3, n, dtype=torch.float32)
    y = hadamard(x)
    assert (y - hadamard(x.double())).abs().max() < 5e-6
    assert (y.norm(dim=1) / x.norm(dim=1) - 1).abs().max() < 1e-6
    assert (hadamard(y, transpose=True) - x).abs().max() < 1e-5
    single = torch.zeros(1, n, dtype=torch.float64)
    single[0, 5] = math.sqrt(n)
    # One number is spread over all: a row of the matrix.
    assert (hadamard(single).abs() - 1).abs().max() < 1e-12


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([n for n in range(1, 300) if possible(n)]),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_any_size_and_batch(n, batch, dtype, strided):
    x = randn(*batch, 2 * n if strided else n, dtype=dtype)
    x = x[..., ::2] if strided else x
    signs = torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    y = hadamard(x, signs)
    assert y.shape == x.shape
    close = {"atol": 1e-12 if dtype is torch.float64 else 4e-6, "rtol": 0}
    torch.testing.assert_close(y.double(), dense(x.double() * signs), **close)
    torch.testing.assert_close(hadamard(y, signs, transpose=True), x, **close)


@pytest.mark.parametrize("n", [8, 12, 44, 92])
def test_gradients(n):
    signs = torch.where(torch.arange(n) % 5 == 0, -1.0, 1.0)
    x = randn(2, n).requires_grad_()
    for transpose in (False, True):
        assert torch.autograd.gradcheck(lambda x, t=transpose: hadamard(x, signs, t), x)
        assert torch.autograd.gradgradcheck(lambda x, t=transpose: hadamard(x, signs, t) ** 2, x)


def test_gradient_of_the_compiled_kernel():
    x = randn(3, 576, dtype=torch.float32).requires_grad_()
    target = randn(3, 576, dtype=torch.float32)
    (hadamard(x) * target).sum().backward()
    want = dense(target, transpose=True)
    assert (x.grad - want).abs().max() < 2e-6
    # The base of 576 is symmetric, so that only another one tells a matrix from its transpose.
    assert torch.equal(base_matrix(576), base_matrix(576).T)
    assert not torch.equal(base_matrix(704), base_matrix(704).T)
    y = hadamard(randn(1, 704, dtype=torch.float32))
    assert (y - dense(randn(1, 704), transpose=True)).abs().max() > 0.1


def test_a_wrong_base_is_noticed():
    x = randn(2, 576, dtype=torch.float32)
    factors, base = torch.full((576,), 1 / 24), base_matrix(576).clone()
    assert (cpu.hadamard(x, base, factors) - dense(x)).abs().max() < 2e-6
    base = base.clone()
    base[7, 5] *= -1
    assert (cpu.hadamard(x, base, factors) - dense(x)).abs().max() > 1e-3


def test_rows_shared_by_threads():
    threads = torch.get_num_threads()
    x = randn(513, 1152, dtype=torch.float32)
    try:
        torch.set_num_threads(1)
        alone = hadamard(x)
        torch.set_num_threads(3)
        assert torch.equal(hadamard(x), alone)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(hadamard(x[200:201]), alone[200:201])


def test_torch_compile_keeps_it_whole():
    x, signs = randn(2, 192, dtype=torch.float32), torch.ones(192)
    signs[3] = -1
    traced = torch.compile(lambda x: hadamard(x, signs), backend="aot_eager", fullgraph=True)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    assert torch.equal(traced(theirs), hadamard(ours, signs))
    traced(theirs).square().sum().backward()
    hadamard(ours, signs).square().sum().backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert (ours.grad - 2 * x).abs().max() < 1e-5
    torch.library.opcheck(torch.ops.qlib.hadamard, (ours.detach(), signs, True))


def test_an_outlier_and_what_is_no_number():
    x = torch.zeros(3, 128)
    x[0, 3], x[1, 5], x[2, 7] = 1e30, math.inf, math.nan
    y = hadamard(x)
    assert y[0].isfinite().all()
    assert not y[1:].isfinite().any()


@pytest.mark.parametrize(
    ("n", "remedy"),
    [
        (6, "pad the rows to 8"),
        (7, "pad the rows to 8"),
        (10, "pad the rows to 12"),
        (15, "pad the rows to 16"),
        (188, "pad the rows to 192"),
        (668, "pad the rows to 672"),
        (
            13696,
            "multiply blocks of 128, the largest power of two that divides it, or pad the rows to "
            "13824",
        ),
    ],
)
def test_sizes_that_are_not_known(n, remedy):
    message = f"no construction of a Hadamard matrix of size {n} is known here: {remedy}"
    for call in (lambda: hadamard_matrix(n), lambda: hadamard(torch.zeros(2, n))):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call()


def test_a_padded_row_has_a_small_base():
    refused = 0
    for n in range(3, 600):
        try:
            base_matrix(n)
        except ValueError as error:
            refused += 1
            wider = int(re.search(r"pad the rows to (\d+)$", str(error))[1])
            assert n < wider <= max(n + 4, n * 17 / 16)
            assert len(base_matrix(wider)) <= 128
    # Of four sizes three are no multiple of 4.
    assert refused > 0.75 * 597


@pytest.mark.parametrize("n", [0, -4])
def test_sizes_that_are_no_sizes(n):
    message = f"a Hadamard matrix has a size of 1 or more, got {n}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        hadamard_matrix(n)


def test_a_size_is_no_row():
    message = "hadamard: x is 12, not a tensor; hadamard_matrix(n) gives a matrix"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        hadamard(12)


@pytest.mark.parametrize(
    ("x", "signs", "message"),
    [
        (torch.ones(4).int(), None, "x is torch.int32, not floating point: convert it"),
        (torch.ones(4), torch.ones(3), "signs are [3], rows have 4: give one each"),
        (torch.ones(4), torch.ones(1, 4), "signs are [1, 4], rows have 4: give one each"),
    ],
)
def test_arguments(x, signs, message):
    with pytest.raises(ValueError, match=f"^hadamard: {re.escape(message)}$"):
        hadamard(x, signs)


def test_the_kernel_refuses_what_it_does_not_check_later():
    for n, m in ((96, 12), (32, 1), (128, 3), (16, 1)):
        message = f"hadamard: rows of {n} are not {m} times a power of two from 16, and 64 or more"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            cpu.hadamard(torch.zeros(1, n), torch.ones(m, m), torch.ones(n))
    with pytest.raises(ValueError, match=re.escape("factors are [63], rows have 64")):
        cpu.hadamard(torch.zeros(1, 64), torch.ones(1, 1), torch.ones(63))
