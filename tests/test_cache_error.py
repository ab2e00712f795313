"""The error of attention through a cache: against KIVI's formula and torch's own attention."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from qlib.cache import QuantizedCache
from qlib.cache.error import Compared, attention_error
from qlib.cache.format import KVFormat
from qlib.config import Config
from qlib.model import Decoder

CONFIG = Config(61, 64, 48, 2, 4, 2, 32, max_position_embeddings=512)
LAYERS = 2


@pytest.fixture(scope="module")
def model() -> Decoder:
    generator = torch.Generator().manual_seed(0)
    return Decoder(CONFIG).normal_init(0.12, generator).requires_grad_(False)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(61, (2, 70), generator=torch.Generator().manual_seed(1))


class Recorder:
    """Stands where a cache does, and keeps what a whole text asks of it."""

    length = 0

    def __init__(self):
        self.asked: dict[int, tuple[torch.Tensor, ...]] = {}

    def attend(self, q, k, v, layer):
        self.asked[layer] = q, k, v
        return by_torch(q, k, v)


def by_torch(q, k, v) -> torch.Tensor:
    """Causal attention of a whole text, each key and value head repeated for its query heads."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def kivi(x: torch.Tensor, bits: int) -> torch.Tensor:
    """KIVI section 2.1 for groups of 32 values: what float16 scales and minima stand for."""
    groups = x.half().float().unflatten(-1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale, low = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
    codes = ((groups - low) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + low).flatten(-2)


def relative(other: torch.Tensor, exact: torch.Tensor) -> float:
    return float((other - exact).double().norm() / exact.double().norm())


@pytest.mark.parametrize("chunk", [7, 70])
def test_a_cache_without_errors_has_none(model, tokens, chunk):
    assert attention_error(model, KVFormat(dtype=None), tokens, chunk) == [0.0] * LAYERS
    rounded = attention_error(model, "f16", tokens, chunk)
    assert all(0 < error < 1e-3 for error in rounded)


def test_fewer_bits_have_larger_errors(model, tokens):
    ladder = [attention_error(model, f"int{bits}", tokens) for bits in (8, 6, 4, 2)]
    for fine, coarse in zip(ladder, ladder[1:]):
        assert all(2 * a < b for a, b in zip(fine, coarse, strict=True))
    assert all(0.2 < error < 1 for error in ladder[-1])


@pytest.mark.parametrize(("bits", "chunk"), [(4, 1), (4, 32), (2, 32), (2, 70)])
def test_errors_are_those_of_torchs_attention_to_rounded_tokens(model, tokens, bits, chunk):
    recorder = Recorder()
    model.hidden(tokens, recorder)
    found = attention_error(model, f"int{bits}", tokens, chunk)
    assert len(found) == len(recorder.asked) == LAYERS
    for error, (q, k, v) in zip(found, recorder.asked.values(), strict=True):
        exact = by_torch(q, k, v)
        coarse = by_torch(q, kivi(k, bits), kivi(v, bits))
        assert error == pytest.approx(relative(coarse, exact), 2e-3)
        # Exact keys, exact values and one more bit each have another error.
        for keys, values in ((k, kivi(v, bits)), (kivi(k, bits), v)):
            assert error != pytest.approx(relative(by_torch(q, keys, values), exact), 2e-2)
        finer = by_torch(q, kivi(k, bits + 1), kivi(v, bits + 1))
        assert error > 1.5 * relative(finer, exact)


def test_a_layer_is_judged_with_exact_inputs(model, tokens):
    """What the model goes on with is exact attention, whatever the other cache would have said."""
    cache = Compared("int2")
    exact = model.hidden(tokens)
    assert relative(model.hidden(tokens, cache), exact) < 1e-6
    assert cache.length == tokens.shape[1]
    # Through the coarse cache itself the model says something else.
    assert relative(model.hidden(tokens, QuantizedCache("int2")), exact) > 0.1


def test_errors_of_parts_of_a_text_add_up():
    """|difference| and |exact| are summed over all tokens, not averaged over chunks."""
    q, k, v = torch.randn(3, 1, 2, 6, 32, generator=torch.Generator().manual_seed(2))
    q[:, :, 3:] *= 3
    v[:, :, 3:] *= 50
    halves = [[x[:, :, part] for x in (q, k, v)] for part in (slice(0, 3), slice(3, 6))]
    both, whole = Compared("int2"), Compared("int2")
    for half in halves:
        both.attend(*half, 0)
    whole.attend(q, k, v, 0)
    assert both.errors == pytest.approx(whole.errors, 1e-5)
    first = Compared("int2")
    first.attend(*halves[0], 0)
    assert both.errors != pytest.approx(first.errors, 1e-2)


def test_layers_are_listed_from_the_first(model, tokens):
    with torch.no_grad():
        loud = Decoder(CONFIG)
        loud.load_state_dict(model.state_dict())
        # The values of the last layer alone: one channel that is far larger costs all the others.
        loud.model.layers[1].self_attn.v_proj.weight[5] *= 40
    before, after = (attention_error(m, "int2", tokens) for m in (model, loud))
    assert after[0] == before[0]
    assert after[1] != pytest.approx(before[1], 1e-2)


def test_squares_are_added_up_on_the_cpu(monkeypatch):
    """Wherever the model is: here on a device that has shapes and no numbers."""
    x = torch.ones(1, 2, 6, 32, device="meta")
    on_cpu = torch.Tensor.cpu
    as_ones = {"meta": lambda x: torch.ones(x.shape, dtype=x.dtype), "cpu": on_cpu}
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: as_ones[x.device.type](x))
    both = Compared(KVFormat(dtype=None))
    both.attend(x, x, x, 0)
    both.attend(x, x, x, 0)
    assert both._squares[0].tolist() == [2, 2]
    assert both.errors == [1]


def test_bad_requests(model, tokens):
    with pytest.raises(ValueError, match=r"^chunk must be a positive number of tokens, got 0$"):
        attention_error(model, "int4", tokens, chunk=0)
    for shape in ([1, 0], [0, 5]):
        message = f"an error of attention needs tokens, got {shape}"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            attention_error(model, "int4", tokens[:0].new_zeros(shape))
