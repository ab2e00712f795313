"""Names of cache formats, and what a KVFormat refuses."""

from __future__ import annotations

import re

import pytest
import torch

import qlib
from qlib import fit
from qlib.cache import QuantizedCache
from qlib.cache.format import Constant, KVFormat
from qlib.cache.names import EXAMPLES, kv_format
from qlib.grid import E4M3, GRIDS

INT4 = kv_format("int4").keys


def refusal(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


@pytest.mark.parametrize("name", EXAMPLES.split())
def test_every_example_is_a_format_and_stores_ten_tokens(name):
    cache = QuantizedCache(name)
    x = torch.randn(1, 2, 10, 64, generator=torch.Generator().manual_seed(0))
    k, v = cache.update(x, x, layer=0)
    assert k.shape == v.shape == x.shape
    assert (k - x).norm() < 0.8 * x.norm()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("f16", KVFormat()),
        ("bf16", KVFormat(dtype=torch.bfloat16)),
        ("fp8", KVFormat(Constant(E4M3), Constant(E4M3))),
        ("fp8-token", KVFormat(qlib.format("fp8_e4m3"), qlib.format("fp8_e4m3"))),
        ("int4", KVFormat(INT4, INT4)),
        ("int4-hadamard", KVFormat(INT4, INT4, rotate="keys")),
        ("int4-s4-w8", KVFormat(INT4, INT4, window=8, sinks=4)),
        ("int4-hadamard-kv-s4-w8", KVFormat(INT4, INT4, "token", "token", 8, 4, "keys+values")),
        ("int4-hadamard-kv-w8-s4", KVFormat(INT4, INT4, "token", "token", 8, 4, "keys+values")),
        ("kivi4", KVFormat(INT4, INT4, key_axis="channel", window=128)),
        ("kivi4-w32", KVFormat(INT4, INT4, key_axis="channel", window=32)),
        ("int4-g64-asym", KVFormat(*[qlib.format("int4-g64-asym")] * 2)),
        ("q8_0", KVFormat(*[qlib.format("q8_0")] * 2)),
        ("polar3", KVFormat(*[qlib.polarquant.format("polar3")] * 2)),
    ],
)
def test_names(name, expected):
    assert kv_format(name) == expected
    assert kv_format(expected) is expected


def test_the_residual_of_turboquant_is_for_keys():
    form = kv_format("turbo3-qjl")
    assert (form.keys.qjl, form.values.qjl) == (True, False)
    assert form.keys.bits == form.values.bits == 3


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("int4_hadamard", "int4-hadamard"),
        ("Int4", "int4"),
        ("kivi2-w32-h", "kivi2-w32-s4"),
        ("int4-hadamard-hadamard", "int4-hadamard"),
        ("int4-w8-hadamard", "int4-hadamard"),
        ("kivi2-w64-w32", "kivi2-w32-s4"),
        ("kivi2-s4-w32-s8", "kivi2-w32-s4"),
        ("Q8_0", "q8_0"),
        ("int4-g64-asim", "int4-g32-asym"),
        ("kivi", "kivi4"),
        ("turbo0", "turbo4"),
        ("", None),
        ("nonsense", None),
    ],
)
def test_unknown_names(name, near):
    hint = f"did you mean {near!r}? " if near else ""
    known = f"known are {', '.join(EXAMPLES.split())} and qlib.formats()"
    grammar = "then -hadamard or -hadamard-kv may follow, then -w{window} and -s{sinks}"
    with refusal(f"unknown KV cache format {name!r}: {hint}{known}; {grammar}"):
        kv_format(name)


@pytest.mark.parametrize("given", [None, 4])
def test_what_is_no_name(given):
    for call in (kv_format, QuantizedCache):
        with pytest.raises(TypeError) as caught:
            call(given)
        assert str(caught.value) == f"format must be a name or a KVFormat, got {given}"


def test_refused_combinations():
    with refusal('rotate must be None, "keys" or "keys+values", got \'values\''):
        KVFormat(rotate="values")
    with refusal("window must be a number of tokens, got -1"):
        KVFormat(window=-1)
    with refusal("sinks must be a number of tokens, got 1.5"):
        KVFormat(sinks=1.5)
    with refusal('the axis of values must be "token" or "channel", got \'head\''):
        KVFormat(value_axis="head")
    with refusal("keys by channel need blocks of n tokens, not block 'row'"):
        KVFormat(keys=qlib.format("int4"), key_axis="channel")
    with refusal("keys by channel need blocks of n tokens, not block None"):
        KVFormat(keys=Constant(E4M3), key_axis="channel")
    need = "window 40 is not a multiple of the block 32; use window=64 (in a name: -w64)"
    with refusal(f"keys by channel: {need}"):
        kv_format("kivi4-w40")
    assert kv_format("kivi4-w64").window == 64


def test_a_name_is_no_format_of_keys_or_values():
    for given in ({"keys": "int4"}, {"values": "int4"}, {"keys": INT4, "values": "int4"}):
        name = [*given][-1]
        with pytest.raises(TypeError) as caught:
            KVFormat(**given)
        message = f"{name} must be a Format, got 'int4'; use kv_format(name)"
        assert str(caught.value) == message
    assert KVFormat(INT4, None).keys is INT4


@pytest.mark.parametrize(("name", "bits"), [("f16", 16.0), ("f32", 32.0), ("int4", 5.0)])
def test_bits_are_floats(name, bits):
    assert kv_format(name).bits(64) == (bits, bits)
    assert [type(found) for found in kv_format(name).bits(64)] == [float, float]


@pytest.mark.parametrize("low", [-3.0, 0.0, 5.0, 1000.0])
def test_own_range_meets_both_ends(low):
    blocks = torch.tensor([[low, low + 1.3, low + 7.5]])
    scale, offset = fit.own_range(blocks, GRIDS["uint4"])
    assert (scale.item(), offset.item()) == (0.5, low)
    plain = qlib.fit.minmax(blocks, GRIDS["uint4"])[0].item()
    # Zero costs nothing only where the range holds it.
    assert (plain == 0.5) == (low <= 0)


def test_static_scale():
    x = torch.tensor([[0.5, 3.0, -900.0]])
    q = Constant(E4M3, scale=2.0).quantize(x)
    expected = (x / 2).clamp(-448, 448).to(torch.float8_e4m3fn).float() * 2
    assert torch.equal(q.dequantize(), expected)
    assert not torch.equal(Constant(E4M3).quantize(x).dequantize(), expected)
    assert q.nbytes == 3
    assert str(q.format) == "e4m3, scale 2 for all"
    with pytest.raises(ValueError, match="cannot round NaN"):
        Constant(E4M3).quantize(torch.tensor([[float("nan")]]))
