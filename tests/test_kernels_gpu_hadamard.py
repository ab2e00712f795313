"""The Walsh-Hadamard kernel against the matrix, by the interpreter, and what it compiles to."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_child import CAPABILITIES, compiled, facts, interpreted

from qlib.kernels.gpu import hadamard

# Rows, n, size of the base.
CASES = [(1, 1, 1), (3, 2, 1), (5, 16, 1), (3, 64, 1), (33, 128, 1), (3, 512, 1), (2, 4096, 1)]
CASES += [(3, 12, 12), (2, 48, 12), (1, 640, 20), (1, 896, 28)]
# The interpreter cuts float32 off at bfloat16 where a GPU rounds, so bfloat16 is only compiled.
DTYPES = ["float16", "float32"]


def paley(m: int) -> torch.Tensor:
    """Hadamard matrix [12, 12], [20, 20] or [28, 28], from the squares modulo a prime (1933)."""
    # 11 and 19 are primes of Paley's first kind; 27 is none, 28 = 2 (13 + 1) of the second kind.
    twice = m == 28
    q = m // 2 - 1 if twice else m - 1
    squares = {i * i % q for i in range(1, q)}
    chi = torch.tensor([[(i != j) * (1 if (i - j) % q in squares else -1) for j in range(q)]
                        for i in range(q)])  # fmt: skip
    core = torch.zeros(q + 1, q + 1, dtype=chi.dtype)
    core[0, 1:], core[1:, 0], core[1:, 1:] = 1, 1 if twice else -1, chi
    one = torch.eye(q + 1, dtype=chi.dtype)
    if not twice:
        return core + one
    plus, mixed = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return torch.kron(core, plus) + torch.kron(one, mixed)


def matrix(n: int, m: int) -> torch.Tensor:
    """The whole transform, float64 [n, n], each sign on its own: H[i, j] = (-1)^(bits of i & j)."""
    i = torch.arange(n // m)
    both = i[:, None] & i
    ones = sum(both >> bit & 1 for bit in range(15))
    power = (1 - 2 * (ones % 2)).double()
    return torch.kron(paley(m).double() if m > 1 else torch.ones(1, 1).double(), power) / n**0.5


def errors() -> dict[str, list[float]]:
    """For each case: the kernel's error, with one sign of x turned over, and twice torch's."""
    found = {}
    for rows, n, m in CASES:
        base = paley(m) if m > 1 else None
        exact = matrix(n, m)
        for dtype in DTYPES:
            x = torch.randn(rows, n, generator=torch.manual_seed(n)).to(getattr(torch, dtype))
            x[0, 0] = 3
            wrong = x.clone()
            wrong[0, 0] = -3
            want = x.double() @ exact
            budget = 2 * (x @ exact.to(x.dtype) - want).abs().max().item()
            got = [hadamard.hadamard(v, base) for v in (x, wrong)]
            got = [(y.double() - want).abs().max().item() for y in got]
            found[f"{(rows, n, m)} {dtype}"] = [*got, budget]
    return found


def round_trips() -> list[float]:
    found = []
    for n, m in ((256, 1), (2048, 1), (96, 12), (112, 28)):
        x = torch.randn(2, 2, n, generator=torch.manual_seed(n))
        base = paley(m) if m > 1 else None
        y = hadamard.hadamard(x, base)
        assert y.shape == x.shape
        back = hadamard.hadamard(y, None if base is None else base.T)
        found.append((back - x).abs().max().item())
    return found


def everything() -> dict:
    return errors() | {"round trips": round_trips()}


@pytest.fixture(scope="module")
def measured():
    return interpreted(everything)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_equals_the_matrix(measured, case, dtype):
    error, wrong, budget = measured[f"{case} {dtype}"]
    assert error <= budget
    assert wrong > budget


def test_the_transform_is_its_own_inverse(measured):
    assert max(measured["round trips"]) < 2e-6


@pytest.mark.parametrize("m", [12, 20, 28])
def test_bases_are_hadamard_matrices(m):
    assert paley(m).abs().eq(1).all()
    assert torch.equal(paley(m) @ paley(m).T, m * torch.eye(m, dtype=torch.int64))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.sampled_from([1, 12, 20, 28]), st.integers(0, 3))
def test_the_reference_equals_the_matrix(rounds, m, rows):
    n = m * 2**rounds
    x = torch.randn(rows, 2, n, dtype=torch.float64)
    y = hadamard.reference(x, paley(m) if m > 1 else None)
    assert y.shape == x.shape
    assert torch.allclose(y, x @ matrix(n, m), atol=1e-12)
    if rows:
        wrong = x.clone()
        wrong[0, 0, 0] += 1
        assert not torch.allclose(y, wrong @ matrix(n, m), atol=1e-12)


# n, size of the base, dtype, capability.
TARGETS = [(4096, 1, "bfloat16", cc) for cc in CAPABILITIES]
TARGETS += [(n, 1, "float32", 90) for n in (128, 32768)] + [(8192, 1, "float16", 100)]
TARGETS += [(14336, 28, "float16", 90), (11008, 172, "bfloat16", 80)]

ACCESSES = {"loads": r"ld\.global", "wide loads": r"ld\.global\.v4\.b32"}
ACCESSES |= {"stores": r"st\.global", "wide stores": r"st\.global\.v4\.b32"}


def assembled() -> dict[str, dict]:
    found = {}
    for target in TARGETS:
        n, m, dtype, capability = target
        x = torch.zeros(8, n, dtype=getattr(torch, dtype))
        launched = hadamard.launch(x, torch.ones(m, m) if m > 1 else None)[0]
        code = launched.compiled(capability)
        found[str(target)] = facts(code, **ACCESSES)
        found[str(target)]["exchanges"] = code["ttgir"].count("ttg.convert_layout")
    return found


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_machine_code(code, target):
    found = code[str(target)]
    assert found["stack"] == 0
    assert found["stores"] == found["wide stores"] > 0
    if target[1] == 1:
        assert found["loads"] == found["wide loads"] > 0
        # Of up to 15 rounds, all but these few stay within a thread.
        assert found["exchanges"] <= 4


@pytest.mark.parametrize(
    ("n", "m", "message"),
    [
        (48, None, "hadamard: rows of 48 are not 1 times a power of two: need a base"),
        (0, None, "hadamard: rows of 0 are not 1 times a power of two: need a base"),
        (40, 12, "hadamard: rows of 40 are not 12 times a power of two: need a base"),
        (65536, None, "hadamard: rows of 65536 are too long, up to 32768 fit: need blocks"),
        (28672, 28, None),
        (57344, 28, "hadamard: rows of 57344 are too long, up to 32768 fit: need blocks"),
    ],
)
def test_sizes(n, m, message):
    x, base = torch.zeros(2, n), None if m is None else torch.ones(m, m)
    if message is None:
        assert hadamard.launch(x, base)[1].shape == x.shape
    else:
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            hadamard.hadamard(x, base)
