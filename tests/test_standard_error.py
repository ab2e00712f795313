"""Standard errors of correlated tokens against a bootstrap, and the error of weights."""

from __future__ import annotations

import math

import pytest
import torch

from qlib import metrics
from qlib.metrics import mean_and_error


def correlated(n: int, phi: float, seed: int) -> torch.Tensor:
    """AR(1): x[t] = phi * x[t-1] + noise, started in its stationary distribution."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    value, values = noise[0].item() / math.sqrt(1 - phi**2), []
    for fresh in noise.tolist():
        value = phi * value + fresh
        values.append(value)
    return torch.tensor(values)


def bootstrap_error(x: torch.Tensor, block: int, draws: int = 400) -> float:
    """Moving-block bootstrap: resample blocks that start anywhere, take the spread of the means."""
    generator = torch.Generator().manual_seed(0)
    count = math.ceil(len(x) / block)
    starts = torch.randint(len(x) - block + 1, (draws, count, 1), generator=generator)
    return x[starts + torch.arange(block)].flatten(1).mean(1).std().item()


def independent_error(x: torch.Tensor) -> float:
    return (x.std() / math.sqrt(len(x))).item()


def test_standard_error_of_correlated_tokens_equals_a_bootstrap():
    x = correlated(20_000, 0.8, seed=0)
    mean, error = mean_and_error(x)
    assert mean == pytest.approx(x.mean().item())
    assert error == pytest.approx(bootstrap_error(x, block=150), rel=0.2)
    # Theory: the variance of the mean grows by (1 + phi) / (1 - phi) = 9.
    assert error == pytest.approx(3 * independent_error(x), rel=0.2)


def test_the_independent_formula_is_too_small():
    x = correlated(20_000, 0.8, seed=0)
    assert independent_error(x) < 0.5 * bootstrap_error(x, block=150)


def test_standard_error_of_independent_values_equals_the_plain_formula():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(5))
    assert mean_and_error(x)[1] == pytest.approx(independent_error(x), rel=0.15)


def test_the_tail_counts_in_the_mean():
    x = torch.tensor([1.0] * 64 + [3.0] * 64 + [100.0] * 2)
    mean, error = mean_and_error(x)
    assert mean == pytest.approx((64 + 192 + 200) / 130)
    assert error == pytest.approx(1.0)  # two block means, 1 and 3: std sqrt(2), over sqrt(2)


def test_too_few_tokens_have_no_standard_error():
    mean, error = mean_and_error(torch.ones(127))
    assert mean == 1
    assert math.isnan(error)


def test_snr_of_exact_and_empty_signals():
    weight = torch.tensor([[1.0, -2.0, 0.5]])
    assert metrics.snr_db(weight, weight) == math.inf
    assert metrics.snr_db(weight, torch.zeros_like(weight)) == 0


def test_proxy_loss_is_the_output_error():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(5, 8, generator=generator), torch.randn(200, 8, generator=generator)
    approximation = weight + 0.1 * torch.randn(5, 8, generator=generator)
    direct = (x @ (weight - approximation).T).square().sum() / (x @ weight.T).square().sum()
    hessian = x.T @ x / len(x)
    found = metrics.proxy_loss(weight, approximation, hessian)
    assert found == pytest.approx(direct.item(), rel=1e-4)
    approximation[0, 0] += 0.2
    assert metrics.proxy_loss(weight, approximation, hessian) != pytest.approx(found, rel=1e-4)
