"""Hadamard matrices, and the fast product with one.

A Hadamard matrix H has entries 1 and -1 and orthogonal rows: H @ H.T = n I. Multiplied by
H / sqrt(n), a row keeps its length, and an outlier is spread over all n numbers. There is a matrix
of size 1, and the Kronecker product of two is another, so that

    H_n = H_m ⊗ [[1, 1], [1, -1]] ⊗ ... ⊗ [[1, 1], [1, -1]],    n = m 2^k,

multiplies a row in k rounds of sums and differences (Sylvester 1867) and one product with the
base H_m, which is taken as small as possible. Bases come from two constructions:

- Paley's (1933), from the squares of a finite field of q elements: of size q + 1 where q leaves 3
  modulo 4, and of size 2 (q + 1), symmetric, where q leaves 1.
- Williamson's (1944), from four symmetric circulant matrices of size m / 4.

Number i of a row is (i // 2^k, i % 2^k): the base mixes numbers that lie 2^k apart. QuaRot
(arXiv 2404.00456) and this project's kernels have the same convention.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

# The first halves of the first rows of the circulants, for sizes that Paley does not give. Four
# sequences fit if the squares of their discrete Fourier transforms, which are real, have the sum m
# at every frequency. Found by trying all sequences for 92 and 116; for 172 those with the same sign
# at i and 6 i modulo 43; for 156 such a first one (16 i modulo 39), and a second one that takes
# the places of the other two if i is multiplied by 16.
WILLIAMSON = {
    92: "+--+-+-+++++ +--++-+-+-++ +++---++--++ +--+--+++---",
    116: "+++-+-++---+-++ +-+++++-+++-+-- +++--++-+-++--- ++--++--+-++---",
    156: "++------+--+-+--++-+ ++---+--++----+-+-++ ++-++-++---+-----+-+ +-+-----+-+++--+++--",
    172: "+-+++----+-++-++--++++ +-+-++--+-+-++++++-+-- +--+++--+----+-+--++-+ "
    "++++-++++---+++---+--+",
}


def hadamard_matrix(n: int) -> Float[Tensor, "n n"]:
    """The Hadamard matrix of size n by which `hadamard` multiplies: float32 entries 1 and -1.

    Raises ValueError if no construction here gives one: n must be 1, 2 or a multiple of 4, of which
    188 is the first that is missing.

    >>> hadamard_matrix(4)
    tensor([[ 1.,  1.,  1.,  1.],
            [ 1., -1.,  1., -1.],
            [ 1.,  1., -1., -1.],
            [ 1., -1., -1.,  1.]])
    """
    matrix = base_matrix(n).clone()
    two = matrix.new_tensor([[1, 1], [1, -1]])
    while len(matrix) < n:
        matrix = torch.kron(matrix, two)
    return matrix


def hadamard(
    x: Float[Tensor, "*rows n"], signs: Float[Tensor, " n"] | None = None, transpose: bool = False
) -> Float[Tensor, "*rows n"]:
    """`(x * signs) @ H / sqrt(n)` in O(n log n) and a product with the base, differentiable in x.

    Args:
        x: float64, float32, or 16 bits, which are computed in float32.
        signs: 1 and -1, constants, for a randomized transform.
        transpose: the inverse, `x @ H.T / sqrt(n) * signs`.

    Raises ValueError if there is no matrix of size n, if signs are not [n], or for integers.

    >>> hadamard(torch.tensor([0.0, 0.0, 8.0, 0.0]))
    tensor([ 4.,  4., -4., -4.])
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"hadamard: x is {x!r}, not a tensor; hadamard_matrix(n) gives a matrix")
    if not x.is_floating_point():
        raise ValueError(f"hadamard: x is {x.dtype}, not floating point: convert it")
    n = x.shape[-1] if x.ndim else 0
    if signs is not None and signs.shape != (n,):
        raise ValueError(f"hadamard: signs are {list(signs.shape)}, rows have {n}: give one each")
    return _operator(x, signs, transpose)


# An operator of torch, so that `torch.compile` keeps it in its graph as it is.
@torch.library.custom_op("qlib::hadamard", mutates_args=())
def _operator(x: Tensor, signs: Tensor | None, transpose: bool) -> Tensor:
    y = _product(x.detach(), None if transpose else signs, transpose)
    return y.mul_(signs) if transpose and signs is not None else y


@_operator.register_fake
def _(x: Tensor, signs: Tensor | None, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


def _remember(ctx, inputs: tuple, output: Tensor) -> None:
    _, ctx.signs, ctx.transpose = inputs


def _backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
    # The gradient of a linear map is multiplied by its transpose.
    return _operator(gradient, ctx.signs, not ctx.transpose), None, None


_operator.register_autograd(_backward, setup_context=_remember)


def _product(x: Tensor, signs: Tensor | None, transpose: bool) -> Tensor:
    """`(x * signs) @ H / sqrt(n)` by the fastest code for the device, the dtype and the size."""
    from .kernels.dispatch import missing

    n, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    base, factors = _operands(n, transpose, wide, x.device)
    fast = wide is torch.float32
    if fast and x.is_cuda and missing("gpu") is None:
        from .kernels.gpu import hadamard as gpu

        if gpu.why_not(n, len(base)) is None:
            x = x if signs is None else (x * signs).to(x.dtype)
            return gpu.hadamard(x, base if len(base) > 1 else None)
    factors = factors if signs is None else (factors * signs).to(wide)
    rows = x.reshape(-1, n).to(wide)
    if fast and x.device.type == "cpu" and missing("cpu") is None:
        from .kernels.cpu import hadamard as cpu

        if cpu.why_not(n, len(base)) is None:
            return cpu.hadamard(rows, base, factors).view(x.shape).to(x.dtype)
    return _in_torch(rows * factors, base).view(x.shape).to(x.dtype)


@lru_cache(maxsize=64)
def _operands(
    n: int, transpose: bool, dtype: torch.dtype, device: torch.device
) -> tuple[Float[Tensor, "m m"], Float[Tensor, " n"]]:
    """The base, or its transpose, and the factor 1 / sqrt(n) of every number of a row."""
    base = base_matrix(n).to(device, dtype)
    base = base.T.contiguous() if transpose else base
    return base, torch.full((n,), 1 / math.sqrt(n), dtype=dtype, device=device)


def _in_torch(y: Float[Tensor, "rows n"], base: Float[Tensor, "m m"]) -> Float[Tensor, "rows n"]:
    """`y @ H`. It is overwritten: two buffers take turns, each round reads one and writes one."""
    rows, m, spare = len(y), len(base), torch.empty_like(y)
    if m > 1:
        torch.matmul(base.T, y.unflatten(1, (m, -1)), out=spare.unflatten(1, (m, -1)))
        y, spare = spare, y
    half = y.shape[1] // m // 2
    while half:
        pairs = (rows, y.shape[1] // (2 * half), 2, half)
        (a, b), (plus, minus) = y.view(pairs).unbind(2), spare.view(pairs).unbind(2)
        torch.add(a, b, out=plus)
        torch.sub(a, b, out=minus)
        y, spare, half = spare, y, half // 2
    return y


@lru_cache(maxsize=64)
def base_matrix(n: int) -> Float[Tensor, "m m"]:
    """The smallest base of size n, float32 on the CPU; every caller shares it: not to be changed.

    Raises ValueError as `hadamard_matrix`.
    """
    if n < 1:
        raise ValueError(f"a Hadamard matrix has a size of 1 or more, got {n}")
    power, m = n & -n, n // (n & -n)
    while m <= n:
        # It outlives the context of its first caller.
        with torch.device("cpu"), torch.inference_mode(False):
            matrix = _construct(m)
        if matrix is not None:
            return matrix.float()
        m *= 2
    # A wider row has a base of at most 128; blocks of less than 32 hardly spread an outlier.
    step = max(4, 1 << n.bit_length() >> 5)
    blocks = f"multiply blocks of {power}, the largest power of two that divides it, or "
    remedy = f"{blocks if power >= 32 else ''}pad the rows to {n - n % step + step}"
    raise ValueError(f"no construction of a Hadamard matrix of size {n} is known here: {remedy}")


def _construct(m: int) -> Tensor | None:
    if m == 1:
        return torch.ones(1, 1)
    if m in WILLIAMSON:
        return _williamson(WILLIAMSON[m].split())
    # The second kind first: it is symmetric, so that the transform is its own inverse.
    if m % 8 == 4 and _prime_of(m // 2 - 1):
        return _paley_second(m // 2 - 1)
    if m % 4 == 0 and _prime_of(m - 1):
        return _paley_first(m - 1)
    return None


def _paley_first(q: int) -> Tensor:
    return _bordered(q, -1) + torch.eye(q + 1)


def _paley_second(q: int) -> Tensor:
    plus, mixed = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(_bordered(q, 1), plus) + torch.kron(torch.eye(q + 1), mixed)


def _bordered(q: int, corner: int) -> Float[Tensor, "q+1 q+1"]:
    """[[0, 1], [corner, Q]], where Q[a, b] is 0 for a = b, 1 if a - b is a square, and else -1."""
    p = _prime_of(q)
    k = round(math.log(q, p))
    places = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // places % p
    table = -torch.ones(q)
    table[0] = 0
    table[(torch.tensor(_squares(p, k)) * places).sum(1)] = 1
    matrix = torch.zeros(q + 1, q + 1)
    matrix[0, 1:], matrix[1:, 0] = 1, corner
    matrix[1:, 1:] = table[((digits[:, None] - digits) % p * places).sum(2)]
    return matrix


def _squares(p: int, k: int) -> list[tuple[int, ...]]:
    """The squares other than 0 of the field of p^k > 4 elements, polynomials of k coefficients.

    A product with X is reduced by X^k = tail. If the powers of X are all the polynomials but 0,
    then each has an inverse, so that they form the field; and the even powers are the squares.
    """
    for tail in product(range(p), repeat=k):
        powers = [(1, *[0] * (k - 1))]
        for _ in range(p**k - 2):
            *low, top = powers[-1]
            powers.append(tuple((c + top * t) % p for c, t in zip((0, *low), tail)))
        if len(set(powers)) == p**k - 1:
            return powers[::2]
    raise ValueError(f"{p} is not a prime")


def _prime_of(q: int) -> int | None:
    """The prime of which q is a power, or None."""
    p = next((d for d in range(2, math.isqrt(q) + 1) if q % d == 0), q)
    while q % p == 0 and q > 1:
        q //= p
    return p if q == 1 and p > 1 else None


def _williamson(halves: list[str]) -> Tensor:
    rows = [torch.tensor([1.0 if c == "+" else -1.0 for c in half]) for half in halves]
    rows = [torch.cat([row, row[1:].flip(0)]) for row in rows]
    a, b, c, d = (torch.stack([row.roll(i) for i in range(len(row))]) for row in rows)
    blocks = [[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]]
    return torch.cat([torch.cat(block, 1) for block in blocks])
