"""Attention to packed keys and values against torch in float64 on what the stores mean."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import qlib
from qlib import fit, grid
from qlib.cache import QuantizedCache, direct
from qlib.cache.store import Store
from qlib.kernels.cpu import attention as cpu
from qlib.kernels.cpu import simd, threads
from qlib.qtensor import QTensor
from qlib.scheme import Scheme

BATCH = 2
# Groups, query heads of one, head_dim: SmolLM2's, Llama-3-8B's with fewer groups, odd ones.
SHAPES = [(3, 3, 64), (2, 4, 128), (1, 7, 32), (2, 1, 96)]
COUNTS = [1, 31, 32, 33, 127, 128, 129, 1000]
NAMES = ["int4", "int4-hadamard", "int4-hadamard-kv", "int4-g64", "int8", "int4-w5-s3", "int8-s1"]
NAMES += ["kivi4", "kivi8-w32", "kivi4-w64-s4", "kivi4-g64", "kivi4-g32-w0"]


def qkv(tokens: int, shape=SHAPES[0], seed: int = 0, dtype=torch.float32):
    """A new query, and keys and values with an offset in every channel, as real models have."""
    (groups, heads, dim), generator = shape, torch.Generator().manual_seed(seed)
    normal = partial(torch.randn, generator=generator)
    k, v = normal(2, BATCH, groups, tokens, dim) + normal(2, 1, groups, 1, dim)
    return normal(BATCH, groups * heads, 1, dim).to(dtype), k.to(dtype), v.to(dtype)


def filled(name: str, k: torch.Tensor, v: torch.Tensor) -> tuple[Store, Store]:
    cache = QuantizedCache(name)
    cache.update(k, v, layer=0)
    return cache.stores[0]


def exact(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    q, keys, values = q.double(), keys.double(), values.double()
    return F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)


def check(q: torch.Tensor, keys: Store, values: Store, want: torch.Tensor | None = None) -> None:
    """At most twice the error of torch's own float32 attention, or 1e-5 of the largest output."""
    k, v = keys.read().float(), values.read().float()
    want = exact(q, k, v) if want is None else want
    own = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    allowed = max(2 * (own - exact(q, k, v)).abs().max(), 1e-5 * want.abs().max())
    error = (direct.attend(q, keys, values) - want).abs().max()
    assert error <= allowed, f"{error} > {allowed}"


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("name", NAMES)
def test_attention_equals_torch_on_what_is_stored(name, tokens):
    for seed, shape in enumerate(SHAPES):
        if "g64" not in name or shape[2] % 64 == 0:
            q, k, v = qkv(tokens, shape, seed)
            check(q, *filled(name, k, v))


def test_large_scores_do_not_overflow():
    q, k, v = qkv(200)
    check(q * 300, *filled("kivi4", k, v))
    assert direct.attend(q * 300, *filled("int4", k, v)).isfinite().all()


@pytest.mark.parametrize("name", ["int4", "kivi4", "int8", "kivi8"])
@pytest.mark.parametrize("which", [0, 1], ids=["keys", "values"])
@pytest.mark.parametrize("part", ["codes", "scale", "offset"])
def test_one_changed_bit_is_noticed(name, which, part):
    q, k, v = qkv(160)
    stores = filled(name, k, v)
    want = exact(q, stores[0].read(), stores[1].read())
    check(q, *stores, want)
    stored = stores[which].packed.parts[part]
    flat = stored.view(torch.uint8 if part == "codes" else torch.int16)
    # The highest bit of a code; the exponent's lowest bit of a scale or minimum.
    flat[1, 2, 1].reshape(-1)[-1:].bitwise_xor_(0x80 if part == "codes" else 0x400)
    with pytest.raises(AssertionError):
        check(q, *stores, want)


def test_another_order_of_heads_is_noticed():
    q, k, v = qkv(160)
    stores = filled("int4", k, v)
    want = exact(q, stores[0].read(), stores[1].read())
    with pytest.raises(AssertionError):
        check(q.flip(1), *stores, want)


@pytest.mark.parametrize("name", ["int4", "int4-hadamard-kv-w5-s3", "kivi4-w32-s2", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_cache_gives_the_same_with_and_without_the_kernel(name, dtype, monkeypatch):
    """Token by token over several groups, in every dtype of queries."""
    q, k, v = qkv(100, dtype=dtype)
    fast, slow = QuantizedCache(name), QuantizedCache(name)
    called = []
    attend = direct.attend
    monkeypatch.setattr(direct, "attend", lambda *a: called.append(1) or attend(*a))
    why_not = direct.why_not
    for start in [0, *range(20, 100)]:
        new = slice(start, 20 if start == 0 else start + 1)
        x = q.expand(-1, -1, new.stop - new.start, -1)
        monkeypatch.setattr(direct, "why_not", why_not)
        one = fast.attend(x, k[:, :, new], v[:, :, new], layer=0)
        monkeypatch.setattr(direct, "why_not", lambda *_: "not now")
        two = slow.attend(x, k[:, :, new], v[:, :, new], layer=0)
        assert (one.dtype, one.shape) == (dtype, two.shape)
        assert (one - two).abs().max() <= 1e-5 + 2 * torch.finfo(dtype).eps * two.abs().max()
    # By channel, nothing is packed before token 34, whose values are packed with token 35; tokens
    # 66 and 98 complete groups.
    assert len(called) == (63 if "kivi" in name else 80)
    assert fast.nbytes == slow.nbytes


def test_beams_are_followed():
    q, k, v = qkv(70)
    fast = QuantizedCache("int4")
    fast.update(k[:, :, :69], v[:, :, :69], layer=0)
    fast.select(torch.tensor([1, 1, 0]))
    rows = torch.tensor([1, 1, 0])
    q, k, v = q[rows], k[rows], v[rows]
    y = fast.attend(q, k[:, :, 69:], v[:, :, 69:], layer=0)
    keys, values = fast.stores[0]
    assert (y - exact(q, keys.read(), values.read())).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["int4", "kivi4", "int8"])
def test_threads_do_not_change_the_result(name, monkeypatch):
    q, k, v = qkv(1100)
    stores, before = filled(name, k, v), torch.get_num_threads()
    monkeypatch.setattr(threads, "WORTH_A_THREAD", 1)
    try:
        torch.set_num_threads(1)
        one = direct.attend(q, *stores)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert (direct.attend(q, *stores) - one).abs().max() <= 1e-6
            check(q, *stores)
    finally:
        torch.set_num_threads(before)


REASONS = {
    "f16": "not both of keys and values have packed tokens",
    "int3": "the grid uint3 is neither of 4 bits nor uint8",
    "int4-g16": "rows of 64 are not whole blocks of 16, a multiple of 32",
    "int4-g128": "rows of 64 are not whole blocks of 128, a multiple of 32",
    "mxfp4": "scale and offset are not both float16",
    "turbo4": "TurboQuant of 4 bits, qr rotation 0 is not a Scheme",
}


@pytest.mark.parametrize("name", REASONS)
def test_other_formats_take_the_other_path(name, monkeypatch):
    q, k, v = qkv(40)
    reason = direct.why_not(q, *filled(name, k, v))
    assert reason == REASONS[name]
    monkeypatch.setattr(direct, "attend", None)
    QuantizedCache(name).attend(q.expand(-1, -1, 40, -1), k, v, layer=0)


def test_other_queries_take_the_other_path():
    q, k, v = qkv(40)
    stores = filled("int4", k, v)
    assert direct.why_not(q, *stores) is None
    assert direct.why_not(q.expand(-1, -1, 2, -1), *stores) == "there are 2 new tokens"
    assert direct.why_not(q.double(), *stores) == "queries are float64 on cpu"
    assert direct.why_not(q.requires_grad_(), *stores) == "q needs a gradient"
    with torch.no_grad():
        assert direct.why_not(q, *stores) is None
    q = q.detach()
    found = direct.why_not(q[..., :32], *stores)
    assert found == "queries [2, 9, 1, 32] do not fit layer 0: keys"
    assert direct.why_not(q[:1], *stores) == "queries [1, 9, 1, 64] do not fit layer 0: keys"


def test_a_token_that_completes_a_group_takes_the_other_path():
    q, k, v = qkv(63)
    stores = filled("kivi4-w32", k[:, :, :62], v[:, :, :62])
    assert direct.why_not(q, *stores) is None
    stores = filled("kivi4-w32", k, v)
    reason = "the new token completes a group, and still reads it in full precision"
    assert direct.why_not(q, *stores) == reason


def test_without_numba_the_other_path(monkeypatch):
    q, k, v = qkv(40)
    monkeypatch.setattr(direct, "missing", lambda _: "numba is not installed")
    assert direct.why_not(q, *filled("int4", k, v)) == "numba is not installed"


def matrices(scheme: Scheme, count: int, rows: int, cols: int) -> tuple[QTensor, torch.Tensor]:
    """Packed matrices [count, rows, cols], and what they mean."""
    generator = torch.Generator().manual_seed(rows)
    q = scheme.quantize(torch.randn(count * rows, cols, generator=generator))
    parts = {name: part.unflatten(0, (count, rows)) for name, part in q.parts.items()}
    return QTensor(scheme, (count, rows, cols), parts), q.dequantize().view(count, rows, cols)


def affine(name: str = "uint4", block: int = 32, offset=torch.float16) -> Scheme:
    return Scheme(grid.GRIDS[name], block, fit.minmax, offset=offset)


SIZES = st.integers(1, 3), st.integers(1, 5), st.integers(1, 700), st.integers(1, 5)


@given(*SIZES, st.sampled_from(["uint4", "uint8"]))
@settings(max_examples=25, deadline=None)
def test_both_products_of_any_size(count, heads, rows, blocks, name):
    q, meant = matrices(affine(name), count, rows, 32 * blocks)
    used, generator = max(1, rows - 3), torch.Generator().manual_seed(1)
    meant = meant[:, :used].double()
    x = torch.randn(count, heads, 32 * blocks, generator=generator)
    want = x.double() @ meant.mT
    assert (cpu.dot(x, q, used) - want).abs().max() <= 1e-5 * want.abs().max() + 1e-5
    p = torch.randn(count, heads, used, generator=generator)
    want = p.double() @ meant
    assert (cpu.mix(p, q, used) - want).abs().max() <= 1e-5 * want.abs().max() + 1e-5
    assert (cpu.mix(p + 1, q, used) - want).abs().max() > 1e-3


def test_sums_of_groups():
    q, meant = matrices(affine(), 2, 24, 32)
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    want = torch.cat([x.double() @ group for group in meant.double().split(8, dim=1)], dim=2)
    assert (cpu.mix(x, q, 24, group=8) - want).abs().max() < 1e-5
    assert (cpu.mix(x, q, 24, group=8).roll(32, 2) - want).abs().max() > 1e-2


def test_kernels_refuse_what_they_cannot_take():
    q, _ = matrices(affine("uint3"), 1, 4, 32)
    message = "attention: the grid uint3 is neither of 4 bits nor uint8"
    for call in (cpu.dot, cpu.mix):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            call(torch.ones(1, 1, 32), q, 4)
    learned = Scheme(
        grid.Grid("mine", torch.arange(16.0) ** 2), 32, fit.minmax, offset=torch.float16
    )
    assert cpu.why_not(learned, 64) == "the grid mine is learned"
    assert cpu.why_not(affine(offset=None), 64) == "scale and offset are not both float16"


def test_products_refuse_what_machine_code_would_misread():
    """It checks no bounds: each of these was a crash, or numbers from behind the end."""
    q, _ = matrices(affine(), 2, 16, 64)
    x, p = torch.ones(2, 3, 64), torch.ones(2, 3, 16)
    taken = "need torch.float32 [2, heads, "
    for wrong in (
        x[:1],
        x[0],
        x.half(),
        x.double(),
        x.repeat(3, 1, 1),
    ):
        got = f"attention: x is {wrong.dtype} {list(wrong.shape)}, {taken}64]"
        with pytest.raises(ValueError, match=f"^{re.escape(got)}$"):
            cpu.dot(wrong, q, 16)
    for wrong in (p[:, :, :4], p[:1], p.double(), torch.ones(2, 3, 17)):
        got = f"attention: x is {wrong.dtype} {list(wrong.shape)}, {taken}16]"
        with pytest.raises(ValueError, match=f"^{re.escape(got)}$"):
            cpu.mix(wrong, q, 16)
    for used in (17, 2_000_000, -1):
        message = f"attention: {used} rows are in use, q is [2, 16, 64]"
        for call, numbers in ((cpu.dot, x), (cpu.mix, p)):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                call(numbers, q, used)
    with pytest.raises(ValueError, match=r"^attention: 16 rows are not whole groups of 5$"):
        cpu.mix(torch.ones(2, 3, 5), q, 16, 5)
    with pytest.raises(ValueError, match=r"^machine code reads the CPU's memory, not meta's$"):
        cpu.dot(x.to("meta"), q, 16)


@pytest.mark.parametrize("call", [cpu.dot, cpu.mix])
def test_products_refuse_other_parts(call):
    q, _ = matrices(affine(), 2, 16, 64)
    x = torch.ones(2, 3, 64 if call is cpu.dot else 16)
    for name, part in q.parts.items():
        for wrong in (part[:1], part[:, :8].clone(), part[..., :-1].clone(), part.float(), None):
            parts = {k: v for k, v in {**q.parts, name: wrong}.items() if v is not None}
            with pytest.raises(ValueError, match=r"^attention: q of \[2, 16, 64\] has {"):
                call(x, QTensor(q.format, q.shape, parts), 16)
        parts = q.parts | {name: torch.cat([part, part], 1)[:, :16]}
        with pytest.raises(ValueError, match=r"^attention: parts of q are not contiguous$"):
            call(x, QTensor(q.format, q.shape, parts), 16)
    flat = QTensor(q.format, (16, 64), {name: part[0] for name, part in q.parts.items()})
    with pytest.raises(ValueError, match=re.escape("16 rows are in use, q is [16, 64]")):
        call(x, flat, 16)
    nothing = QTensor(q.format, (2, 16, 0), q.parts)
    with pytest.raises(ValueError, match=r"^attention: rows of 0 are not whole blocks of 32, a"):
        call(x, nothing, 16)


def test_no_rows_in_use_and_no_heads():
    q, _ = matrices(affine(), 2, 16, 64)
    assert cpu.dot(torch.ones(2, 3, 64), q, 0).shape == (2, 3, 0)
    assert torch.equal(cpu.mix(torch.ones(2, 3, 0), q, 0), torch.zeros(2, 3, 64))
    assert cpu.dot(torch.ones(2, 0, 64), q, 16).shape == (2, 0, 16)
    assert cpu.mix(torch.ones(2, 0, 16), q, 16).shape == (2, 0, 64)


def test_queries_of_any_strides_and_signs():
    q, meant = matrices(affine(), 2, 16, 64)
    for call, n, matrix in ((cpu.dot, 64, meant.mT), (cpu.mix, 16, meant)):
        x = torch.randn(2, n, 3, generator=torch.Generator().manual_seed(0)).mT
        want = x.double() @ matrix.double()
        assert (call(x, q, 16) - want).abs().max() < 1e-4
        assert (call(torch._neg_view(x), q, 16) + want).abs().max() < 1e-4


def test_generated_tokens_are_equal(monkeypatch):
    model, tokenizer = qlib.load("bpw-small")
    tokens = torch.tensor([tokenizer.encode("Once upon a time")])
    for name in ("int4", "kivi4-w32", "int4-hadamard-s4"):
        fast = model.generate(tokens, 50, cache=QuantizedCache(name))
        with monkeypatch.context() as patch:
            patch.setattr(direct, "why_not", lambda *_: "not now")
            slow = model.generate(tokens, 50, cache=QuantizedCache(name))
        assert torch.equal(fast, slow)


def check_narrow() -> None:
    assert not simd.WIDE
    for name in ("int4", "kivi4"):
        q, k, v = qkv(160)
        check(q, *filled(name, k, v))


def test_narrow_processors():
    """The same without AVX-512."""
    code = "import test_kernels_cpu_attention as t; t.check_narrow()"
    environment = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c"}
    environment["PYTHONPATH"] = os.path.dirname(__file__)
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
