"""Changes of basis: the product stays what it was."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlib.transform import Diagonal, Hadamard, Orthogonal, Permute, Transform

N = 24


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.manual_seed(3), dtype=torch.float64).to(dtype)


def rotation(n: int) -> torch.Tensor:
    return torch.linalg.qr(randn(n, n, dtype=torch.float64))[0]


TRANSFORMS = {
    "diagonal": lambda: Diagonal(torch.linspace(-3, 4, N)),
    "permute": lambda: Permute(torch.arange(N).roll(5)),
    "hadamard": lambda: Hadamard(N),
    "randomized": lambda: Hadamard.random(N, 1),
    "orthogonal": lambda: Orthogonal(rotation(N)),
}


def law(transform: Transform, x: torch.Tensor, w: torch.Tensor) -> float:
    """How far the product with both transformed is from the product, relative to its size."""
    want = x.double() @ w.double().T
    got = transform.input(x).double() @ transform.weight(w).double().T
    return ((got - want).abs().max() / want.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_the_law(name, dtype):
    transform = TRANSFORMS[name]()
    x, w = randn(3, 5, N, dtype=dtype), randn(7, N, dtype=dtype)
    assert law(transform, x, w) < 8 * torch.finfo(dtype).eps
    assert transform.input(x).dtype is transform.weight(w).dtype is dtype
    assert torch.equal(transform(x), transform.input(x))
    assert not torch.equal(transform(x), x)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_broken_transform_breaks_the_law(name):
    """One number of the buffer changes between the input and the weight."""
    transform, broken = TRANSFORMS[name](), TRANSFORMS[name]()
    x, w = randn(5, N, dtype=torch.float64), randn(7, N, dtype=torch.float64)
    buffers = list(broken.buffers())
    if buffers:
        buffer = buffers[0]
        buffer[:2] = buffer[:2].flip(0) if name == "permute" else -buffer[:2]
    else:
        broken.weight = lambda w: Hadamard.weight(broken, w).roll(1, -1)
    transform.weight = broken.weight
    assert law(transform, x, w) > 1e-3


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([1, 2, 12, 20, 44, 64]), st.integers(0, 4), st.integers(0, 9))
def test_the_law_for_any_size(n, rows, seed):
    x, w = randn(rows, n, dtype=torch.float64), randn(3, n, dtype=torch.float64)
    order = torch.randperm(n, generator=torch.manual_seed(seed))
    for transform in (Hadamard.random(n, seed), Permute(order), Orthogonal(rotation(n))):
        if rows:
            assert law(transform, x, w) < 1e-12
        assert transform.input(x).shape == x.shape


def test_what_each_one_computes():
    x = torch.tensor([6.0, 4.0])
    assert Diagonal(torch.tensor([2.0, 4.0])).input(x).tolist() == [3, 1]
    assert Diagonal(torch.tensor([2.0, 4.0])).weight(x).tolist() == [12, 16]
    assert Permute(torch.tensor([1, 0])).input(x).tolist() == [4, 6]
    assert Hadamard(2, torch.tensor([1.0, -1.0])).input(2**0.5 * x).tolist() == pytest.approx(
        [2, 10]
    )
    assert Orthogonal(torch.tensor([[0.0, -1.0], [1.0, 0.0]])).input(x).tolist() == [4, -6]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_gradients(name):
    x = randn(2, N, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(TRANSFORMS[name]().double(), x)


def test_buffers_are_saved_and_move():
    assert {n: list(t().state_dict()) for n, t in TRANSFORMS.items()} == {
        "diagonal": ["scales"],
        "permute": ["order"],
        "hadamard": [],
        "randomized": ["signs"],
        "orthogonal": ["matrix"],
    }
    assert not any(list(t().parameters()) for t in TRANSFORMS.values())
    other = Hadamard.random(N, 2)
    other.load_state_dict(Hadamard.random(N, 1).state_dict())
    assert torch.equal(other(randn(1, N)), Hadamard.random(N, 1)(randn(1, N)))
    assert Permute(torch.tensor([1, 0])).half().order.dtype is torch.int64
    assert Diagonal(torch.ones(2)).to("meta").scales.is_meta


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_numbers_keep_their_dtype_when_a_model_changes_its_own(name, dtype):
    """float16 has neither 1e-8 nor 1e5, and bfloat16 three digits."""
    extreme = {"diagonal": lambda: Diagonal(torch.logspace(-8, 5, N))}
    transform, model = (TRANSFORMS | extreme)[name](), nn.Module()
    model.layer, before = transform, copy.deepcopy(transform.state_dict())
    model.to(dtype)
    for key, tensor in transform.state_dict().items():
        assert torch.equal(tensor, before[key])
        assert tensor.dtype is before[key].dtype
    x = randn(3, N)
    assert transform.input(x.to(dtype)).dtype is dtype
    want = (TRANSFORMS | extreme)[name]().input(x)
    assert torch.equal(model.float().layer.input(x), want)


def test_a_transform_of_inference_mode_can_be_trained_through():
    with torch.inference_mode():
        transforms = [make() for make in TRANSFORMS.values()]
        transforms += [copy.deepcopy(make().half()) for make in TRANSFORMS.values()]
    for transform in transforms:
        x = randn(3, N).requires_grad_()
        transform.input(x).square().sum().backward()
        assert x.grad.abs().sum() > 0
        assert not any(buffer.is_inference() for buffer in transform.buffers())


def test_buffers_are_copies():
    scales = torch.ones(2)
    transform = Diagonal(scales)
    scales[0] = 5
    assert transform.scales.tolist() == [1, 1]


def test_random_signs_are_the_same_everywhere():
    # Written down, so that a change of the stream is noticed.
    signs = Hadamard.random(12, 0).signs
    assert signs.int().tolist() == [-1, -1, 1, 1, -1, 1, -1, 1, 1, -1, -1, -1]
    assert not torch.equal(signs, Hadamard.random(12, 1).signs)


def test_names():
    shown = [str(t()) for t in TRANSFORMS.values()]
    both = ["Hadamard(24)", "Hadamard(24, randomized)"]
    assert shown == ["Diagonal(24)", "Permute(24)", *both, "Orthogonal(24)"]


WRONG = [
    (lambda: Hadamard(576).input(torch.zeros(575)), "Hadamard of 576 got inputs of 575"),
    (lambda: Hadamard(576)(torch.tensor(1.0)), "Hadamard of 576 got inputs of 0"),
    (lambda: Permute(torch.arange(3)).weight(torch.zeros(3, 4)), "Permute of 3 got weights of 4"),
    (lambda: Diagonal(torch.tensor([1, 0.0])), "scales [2] must be [n], finite and not 0"),
    (lambda: Diagonal(torch.tensor([1, torch.nan])), "scales [2] must be [n], finite and not 0"),
    (lambda: Diagonal(torch.ones(2, 2)), "scales [2, 2] must be [n], finite and not 0"),
    (lambda: Permute(torch.tensor([0, 2, 2])), "order [3] must name each of its channels once"),
    (lambda: Permute(torch.tensor([1, 2])), "order [2] must name each of its channels once"),
    (lambda: Permute(torch.tensor([0.0])), "order [1] must name each of its channels once"),
    (lambda: Hadamard(2, torch.ones(3)), "signs [3] must be 2 numbers, each 1 or -1"),
    (lambda: Hadamard(2, torch.tensor([1, 0.5])), "signs [2] must be 2 numbers, each 1 or -1"),
    (lambda: Hadamard(6), "no construction of a Hadamard matrix of size 6 is known here: "
     "pad the rows to 8"),
    (lambda: Orthogonal(torch.ones(2, 3)), "an orthogonal matrix is [n, n], got [2, 3]"),
    (lambda: Orthogonal(torch.eye(2) * 1.5), "matrix [2, 2] is not orthogonal: matrix @ matrix.T "
     "is off by 1.2e+00; take the Q of torch.linalg.qr(matrix)"),
    (lambda: Orthogonal(torch.eye(2) * torch.nan), "matrix [2, 2] is not orthogonal: "
     "matrix @ matrix.T is off by nan; take the Q of torch.linalg.qr(matrix)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "message"), WRONG, ids=[m for _, m in WRONG])
def test_arguments(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


def test_a_float16_rotation_is_orthogonal_enough_only_up_to_its_tolerance():
    Orthogonal(rotation(N).float())
    with pytest.raises(ValueError, match="is not orthogonal"):
        Orthogonal(rotation(N).bfloat16())
