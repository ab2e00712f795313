"""The benchmark of attention: what it calls a failure, and the results that it has left."""

from __future__ import annotations

import bench_attention
import pytest
import torch

from qlib import results
from qlib.cache import QuantizedCache


def test_the_measured_caches_have_the_bytes_that_they_have_here():
    """What book/results/attention_cpu.json says, as far as it does not depend on the machine."""
    board = results.load("attention_cpu")
    groups, dim = board["shapes"]["SmolLM2-135M"][1:]
    rows = [row for row in board["rows"] if row["model"] == "SmolLM2-135M"]
    k, v = torch.randn(
        2, 1, groups, board["context"], dim, generator=torch.Generator().manual_seed(0)
    )
    for row in rows:
        cache = QuantizedCache(row["cache"])
        cache.update(k, v, layer=0)
        # The tokens that were appended meanwhile wait, or do not, in the window of kivi4.
        assert row["bytes_per_token"] == pytest.approx(cache.bytes_per_token, rel=0.02)
    sixteen = min(row["ms"] for row in rows if row["cache"] in bench_attention.SIXTEEN)
    assert all(row["to_16_bit"] == pytest.approx(sixteen / row["ms"]) for row in rows)
    assert bench_attention.failures(board["rows"]) == []
    slow = [row | {"to_16_bit": 0.9} if row["cache"] == "int4" else row for row in rows]
    assert bench_attention.failures(slow) == [
        "SmolLM2-135M, int4 is slower than 16 bits, 0.90 times its speed"
    ]
