"""The CPU kernels against `x @ q.dequantize().T` in float64, and the vectors they are made of."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit
from numba.core.errors import TypingError
from product_errors import budget, error, flip, quantized, randn

import qlib
from qlib import fit
from qlib.ggml.block import BlockFormat, GgmlType
from qlib.grid import GRIDS, Grid
from qlib.hadamard import base_matrix
from qlib.hadamard import hadamard as transform
from qlib.kernels.cpu import (
    bitstream,
    ggml,
    hadamard,
    native,
    nibbles,
    product,
    simd,
    ternary,
    threads,
)
from qlib.linear import QLinear
from qlib.pack import pack
from qlib.qtensor import QTensor
from qlib.scheme import Divisor, Scheme

LEARNED = Scheme(Grid("learned", torch.linspace(-2, 1, 11)), 64, fit.absmax, torch.bfloat16)
FORMATS = {
    nibbles: "int4-row int4-g32 int4-g96 int4-g32-asym int4-g128-asym int4-g64-offset int4-tensor "
    "int4-row-asym int4-tensor-asym nf4 nf4-dq fp4_bnb lloyd4 mxfp4 mxfp4-even nvfp4 "
    "nvfp4-reciprocal nvfp4-mse mlx4".split(),
    bitstream: "int8-row int8-g16 int8-g48-asym int8-row-asym int8-tensor int8-g64-offset mlx8 "
    "int1-g32 int2-g128 int2-row-asym int3-g32-asym int3-g96 int5-g64-offset int6-row-asym "
    "int7-g48-asym mlx3 mlx6 nf2 nf3 lloyd3 int4-g16-asym fp8_e4m3 fp8_e5m2-tensor mxfp8_e4m3 "
    "mxfp8_e5m2 mxfp6_e2m3 mxfp6_e3m2".split(),
    ternary: ["ternary"],
    ggml: ["q4_k", "q6_k", "q8_0"],
}
CASES = [(module, name) for module, names in FORMATS.items() for name in names]
CASES += [(nibbles, LEARNED)]
RUNGS = [product.gemv, product.gemm]


def shapes(module) -> list[tuple[int, int]]:
    if module is ggml:
        return [(1, 256), (33, 512), (5, 1280)]
    return [(1, 1), (3, 5), (4, 16), (3, 32), (2, 80), (64, 64), (33, 77), (17, 260), (2, 1000)]


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(("module", "format"), CASES)
def test_products_are_within_twice_torchs_error(module, format, rung, monkeypatch):
    for shape in shapes(module):
        monkeypatch.setattr(product, "CHUNK_WEIGHTS", 16 * shape[1])
        q = quantized(shape, format)
        assert module.why_not(q) is None
        packed, flipped = module.packed(q), module.packed(flip(q))
        for rows, dtype in ((1, torch.float32), (3, torch.float16), (17, torch.bfloat16)):
            x = randn(rows, shape[1], dtype=dtype, seed=rows)
            x[0, 0] = 1
            y, most = rung(x, packed), budget(x, q)
            assert (y.dtype, y.shape) == (dtype, (rows, shape[0]))
            assert error(x, q, y) <= most
            if shape != (1, 1):
                assert error(x, q, rung(x, flipped)) > most


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_block_and_mean(data):
    kind = f"int{data.draw(st.integers(1, 8))}"
    block = data.draw(st.sampled_from(["row", "tensor", "g32", "g64", "g96", "g160"]))
    suffix = data.draw(st.sampled_from(["", "-asym", "-offset"]))
    shape = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 400)))
    rows, mean = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.0, 3.0]))
    q = quantized(shape, f"{kind}-{block}{suffix}")
    module = nibbles if kind == "int4" else bitstream
    x = randn(rows, shape[1], seed=shape[1]) + mean
    more = randn(64, shape[1], seed=9) + mean
    # One output may come out luckily well in torch: two roundings of its largest sum are free.
    x[0, 0] = 3
    rounding = 2.0**-23 * (x.abs() @ q.dequantize().abs().T).max().item()
    most = max(budget(x, q), 2 * error(more, q, more @ q.dequantize().T), rounding)
    flipped = module.packed(flip(q))
    for rung in RUNGS:
        assert error(x, q, rung(x, module.packed(q))) <= most
        # A block of equal weights may have scale 0, and then its codes say nothing.
        if not torch.equal(flip(q).dequantize(), q.dequantize()):
            assert error(x, q, rung(x, flipped)) > most


@pytest.mark.parametrize("name", "fp8_e4m3 fp8_e5m2 mxfp8_e4m3 mxfp6_e2m3 mxfp6_e3m2".split())
def test_every_code_of_a_small_float(name):
    """Subnormals, infinities and NaN too, with the smallest and the largest scales."""
    format = qlib.format(name)
    codes = torch.arange(2**format.grid.bits, dtype=torch.uint8)
    scales = [2.0**-140, 1.0, 2.0**127] if format.scale is torch.float32 else [0, 127, 254]
    for scale in scales:
        q = qlib.quantize(torch.ones(1, len(codes)), name)
        parts = {"codes": pack(codes[None], format.grid.bits)}
        parts["scale"] = torch.full_like(q.parts["scale"], scale)
        q = QTensor(format, q.shape, parts)
        found = product.gemm(torch.eye(len(codes)), bitstream.packed(q))
        # Zeros times infinity make every product with such a weight NaN: look at it by itself.
        want, special = q.dequantize(), ~q.dequantize().isfinite()
        unpacked = torch.zeros(1, 1, len(codes))
        packed = bitstream.packed(q)
        threads.by_rows(packed.unpack, (*packed.operands, unpacked, 0), 1, 1)
        assert torch.equal(unpacked[0].nan_to_num(nan=1e30), want.nan_to_num(nan=1e30))
        if not special.any():
            assert torch.equal(found.T, want)
        wrong = want.roll(1)
        assert not torch.equal(unpacked[0].nan_to_num(nan=1e30), wrong.nan_to_num(nan=1e30))


@pytest.mark.parametrize(("module", "format"), CASES)
def test_gemm_unpacks_the_dequantized_weight(module, format):
    """Bit for bit, but where an offset is added: there one rounding less."""
    q = quantized((9, 512), format)
    unpacked = product.gemm(torch.eye(512), module.packed(q)).T
    if "offset" in q.parts or format == "q4_k":
        torch.testing.assert_close(unpacked, q.dequantize(), rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(unpacked, q.dequantize())
    assert not torch.equal(product.gemm(torch.eye(512), module.packed(flip(q))).T, unpacked)


GUARDED = """
import ctypes, mmap, sys, torch, qlib
from product_errors import randn
from qlib.kernels.cpu import bitstream, nibbles, product
from qlib.qtensor import QTensor

def guarded(part, behind):
    # Two pages, the second of which nobody may read; the part ends where the first ends.
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None)
    assert libc.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    first = mmap.PAGESIZE - part.numel() + behind
    whole[first : first + part.numel() - behind] = part.flatten()[: part.numel() - behind]
    return whole[first : first + part.numel()].view(part.shape)

for name in sys.argv[2:]:
    for inputs in (1, 5, 16, 40, 77, 128, 200):
        q = qlib.quantize(randn(3, inputs), name)
        behind = int(sys.argv[1])
        q = QTensor(q.format, q.shape, {**q.parts, "codes": guarded(q.parts["codes"], behind)})
        module = nibbles if nibbles.why_not(q) is None else bitstream
        for rung in (product.gemv, product.gemm):
            for rows in (1, 3):
                y = rung(randn(rows, inputs), module.packed(q))
                assert (y - randn(rows, inputs) @ q.dequantize().T).abs().max() < 1e-3
"""


def test_nothing_behind_the_codes_is_read():
    """The codes end at the end of a page; to read one byte of the next ends the process."""
    names = "int1-row int2-g32 int3-g32 int5-row int6-g16 int7-row int8-row fp8_e4m3 int4-g32"
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(__file__)}
    for behind, some in ((0, names.split()), (1, ["int3-g32"]), (1, ["int4-g32"])):
        command = [sys.executable, "-c", GUARDED, str(behind), *some]
        code = subprocess.run(command, env=environment, check=False).returncode
        assert code == (-signal.SIGSEGV if behind else 0)


HUGE = dataclasses.replace(qlib.format("int2-g16"), scale=torch.float32)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize(
    ("format", "peak"),
    [
        (Scheme(Grid("learned", torch.tensor([torch.nan, -1, 0, 1])), 16, fit.absmax), 1),
        (Scheme(Grid("e4m3", torch.tensor([-1, 0, 0.5, 1])), 16, fit.absmax), 1),
        (HUGE, 3e38),
    ],
    ids=["nan", "name", "huge"],
)
def test_a_row_that_code_0_would_make_infinite_behind_its_end(rung, format, peak):
    weight = randn(3, 20).abs()
    weight[:, -1] = peak
    q = qlib.quantize(weight, format)
    for rows in (1, 3):
        x = 1e-3 * randn(rows, 20)
        want = x @ q.dequantize().T
        assert want.isfinite().all()
        torch.testing.assert_close(rung(x, bitstream.packed(q)), want, rtol=1e-5, atol=1e-6)


def test_nothing_times_nothing():
    for rows in (1, 3, 9):
        for shape in ((0, 32), (3, 0)):
            layout = qlib.format("int3-row").layout(shape).items()
            parts = {name: torch.zeros(size, dtype=dtype) for name, (dtype, size) in layout}
            packed = bitstream.packed(QTensor(qlib.format("int3-row"), shape, parts))
            for rung in RUNGS:
                assert torch.equal(
                    rung(torch.ones(rows, shape[1]), packed), torch.zeros(rows, shape[0])
                )


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q8_0"])
def test_blocks_of_any_bytes_are_what_gguf_reads(name):
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType[name]
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (40, 768 // block, size), dtype=np.uint8)
    for high in {"Q4_K": (1, 3), "Q6_K": (209,), "Q8_0": (1,)}[name]:
        raw[:, :, high] &= 0x3F  # float16 steps below 2: none is infinite
    raw = raw.reshape(40, -1)
    want = torch.from_numpy(dequantize(raw, kind))
    q = QTensor(qlib.format(name.lower()), (40, 768), {"blocks": torch.from_numpy(raw)})
    for rung in RUNGS:
        found = rung(torch.eye(768), ggml.packed(q)).T
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    raw[0, 4] ^= 1  # one bit of one scale or code
    assert not torch.allclose(product.gemm(torch.eye(768), ggml.packed(q)).T, want, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (64, 200)])
def test_additions_alone_make_the_ternary_product(shape):
    q = quantized(shape, "ternary")
    x = randn(3, shape[1])
    x[0, 0] = 1
    y = ternary.additions(x, ternary.packed(q))
    torch.testing.assert_close(y, x @ q.dequantize().T, rtol=1e-4, atol=1e-4)
    wrong = ternary.additions(x, ternary.packed(flip(q)))
    assert not torch.allclose(wrong, y, rtol=1e-4, atol=1e-4)


def test_every_byte_has_its_five_trits():
    codes = torch.arange(243, dtype=torch.uint8)[:, None]
    q = QTensor(
        qlib.format("ternary"), (243, 5), {"codes": codes, "scale": torch.ones(1, 1).half()}
    )
    assert torch.equal(product.gemv(torch.eye(5), ternary.packed(q)).T, q.dequantize())


@pytest.mark.parametrize("rung", RUNGS)
def test_special_activations_and_zero_blocks(rung):
    weight = randn(20, 77)
    weight[:, 32:64] = 0
    weight[3] = 0
    q = qlib.quantize(weight, "int4-g32-asym")
    x = randn(4, 77)
    packed = nibbles.packed(q)
    assert error(x, q, rung(x, packed)) <= budget(x, q)
    assert not rung(x, packed)[:, 3].any()
    x[0, 5], x[-1, 70] = float("nan"), float("inf")
    for y, want in zip(rung(x, packed), x @ q.dequantize().T):
        assert torch.equal(y.isnan(), want.isnan())
        assert torch.equal(y.isinf(), want.isinf())


# A type that calls itself Q8_0, with blocks of 16 weights in 16 bytes.
TINY = BlockFormat(
    GgmlType("Q8_0", 8, 16, 16),
    lambda x, importance: np.zeros(x.shape, np.uint8),
    lambda raw, out: np.copyto(out, raw),
)
DIVIDED = Scheme(qlib.format("mxfp4").grid, 32, fit.absmax, scale=Divisor(torch.float32))
NARROW_ZERO = dataclasses.replace(qlib.format("int8-g32-asym"), offset=GRIDS["uint4"])
FLOAT_OFFSET = dataclasses.replace(qlib.format("fp8_e4m3"), offset=torch.float16)
BYTE_ZERO = dataclasses.replace(qlib.format("int4-g32-asym"), offset=GRIDS["uint8"])


@pytest.mark.parametrize(
    ("module", "format", "reason"),
    [
        (nibbles, "int3-g32", "the grid int3 does not have codes of 4 bits"),
        (nibbles, "int4-g24", "blocks of 24 are neither 16 nor a multiple of 32"),
        (nibbles, "int4-g16-asym", "blocks of 16 have an offset"),
        (
            nibbles,
            BYTE_ZERO,
            "the zero point is stored as uint8, not as an integer of 4 bits",
        ),
        (nibbles, "q4_k", "BlockFormat is not a Scheme"),
        (bitstream, "ternary", "the grid ternary does not have codes of 1 to 8 bits"),
        (
            bitstream,
            "mxint8",
            "the grid mxint8 has over 16 values, neither integers nor small floats",
        ),
        (bitstream, "nf5", "the grid nf5 has over 16 values, neither integers nor small floats"),
        (bitstream, "int8-g24", "blocks of 24 are not a multiple of 16"),
        (
            bitstream,
            NARROW_ZERO,
            "the zero point is stored as uint4, not as an integer of 8 bits",
        ),
        (
            bitstream,
            dataclasses.replace(qlib.format("int3-g32-asym"), offset=GRIDS["lloyd3"]),
            "the zero point is stored as lloyd3, not as an integer of 3 bits",
        ),
        (
            nibbles,
            Scheme(Grid("own", torch.tensor([torch.nan, *range(15)])), 32, fit.absmax),
            "code 0 of the grid own is no number, and it pads the rows",
        ),
        (bitstream, FLOAT_OFFSET, "small floats have an offset"),
        (bitstream, "q8_0", "BlockFormat is not a Scheme"),
        (ggml, "int4", "the format is not ggml's Q4_K, Q6_K or Q8_0"),
        (ggml, "q5_k", "the format is not ggml's Q4_K, Q6_K or Q8_0"),
        (ggml, TINY, "the format is not ggml's Q4_K, Q6_K or Q8_0"),
        (nibbles, DIVIDED, "the scale divides"),
        (bitstream, dataclasses.replace(DIVIDED, grid=GRIDS["int8"]), "the scale divides"),
        (ternary, "int2-row", "the weights are not ternary"),
        (
            ternary,
            Scheme(GRIDS["ternary"], 5, fit.absmean),
            "the scale is not one for the tensor or one for a row",
        ),
        (
            ternary,
            Scheme(Grid("own", torch.tensor([-2.0, 0, 1])), "row", fit.absmax),
            "the three values are not -1, 0, 1",
        ),
    ],
)
def test_why_not(module, format, reason):
    assert module.why_not(quantized((4, 256), format)) == reason


OPENMP = [None, threads._openmp()]


@njit(nogil=True)
def note(seen, number, nothing, start, stop):
    """Each thread's rows, and what it found in its arguments."""
    for row in range(start, stop):
        seen[row, 0], seen[row, 1] = start, stop
        seen[row, 2] += number if nothing is None else 0


@pytest.mark.parametrize("openmp", OPENMP, ids=["pool", "openmp"])
def test_threads_share_the_rows(openmp, monkeypatch):
    q = quantized((50, 96), "int4-g32")
    x, packed = randn(2, 96), nibbles.packed(q)
    alone = product.gemv(x, packed)
    monkeypatch.setattr(threads, "_openmp", lambda: openmp)
    monkeypatch.setattr(threads, "WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    seen = torch.zeros(50, 3)
    threads.by_rows(note, (seen, np.float32(-2.5), None), 50, 50)
    shares, counts = seen.unique(dim=0, return_counts=True)
    assert shares.tolist() == [[0, 16, -2.5], [16, 33, -2.5], [33, 50, -2.5]]
    assert counts.tolist() == [16, 17, 17]
    for _ in range(20):
        assert torch.equal(product.gemv(x, packed), alone)
    row, factors = randn(50, 64), torch.ones(64)
    turned = hadamard.hadamard(row, torch.ones(1, 1), factors)
    child = os.fork()
    if child == 0:
        # A child that waits for its parent's threads must not wait forever.
        signal.alarm(60)
        same = torch.equal(product.gemv(x, packed), alone)
        same &= torch.equal(hadamard.hadamard(row, torch.ones(1, 1), factors), turned)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@njit(nogil=True)
def fail(from_row, start, stop):
    if start >= from_row:
        raise MemoryError


@pytest.mark.parametrize("openmp", OPENMP, ids=["pool", "openmp"])
def test_a_thread_that_fails_says_so(openmp, monkeypatch):
    monkeypatch.setattr(threads, "_openmp", lambda: openmp)
    monkeypatch.setattr(threads, "WORTH_A_THREAD", 1)
    for count in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        message = "a compiled function failed: perhaps there is no memory left"
        with pytest.raises(RuntimeError, match=f"^{message}$"):
            threads.by_rows(fail, (5 * (count - 1),), 10, 10)
        threads.by_rows(fail, (6,), 10, 10)


@pytest.mark.parametrize("openmp", OPENMP, ids=["pool", "openmp"])
def test_several_python_threads_may_multiply_at_once(openmp, monkeypatch):
    """Each has a team of its own, and layers and inputs that are not the others'."""
    monkeypatch.setattr(threads, "_openmp", lambda: openmp)
    layers = [QLinear(quantized((64, 128), name)) for name in ("int4-g32", "nf4", "int8", "int4")]
    inputs = [randn(16, 128, seed=i) for i in range(4)]

    def results(i: int) -> list[torch.Tensor]:
        with torch.no_grad():
            found = layers[i](inputs[i][:1]), layers[i](inputs[i])
        return [*found, transform(inputs[i])]

    want, before = [results(i) for i in range(4)], torch.get_num_threads()
    monkeypatch.setattr(threads, "WORTH_A_THREAD", 1)
    wrong, rounds = [], []

    def again(i: int) -> None:
        # The number is that of the calling thread.
        torch.set_num_threads(2)
        for _ in range(30):
            rounds.append(i)
            wrong.extend(i for a, b in zip(results(i), want[i]) if (a - b).abs().max() > 1e-4)

    callers = [threading.Thread(target=again, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    torch.set_num_threads(before)
    assert not wrong
    assert sorted(rounds) == sorted(30 * [0, 1, 2, 3])
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(results(0)[2:], want[1][2:]))


def test_the_default_device_and_dtype_are_nobodys_business():
    """In a process of its own: what reads another device's memory as the processor's dies."""
    code = """
import torch, qlib
from product_errors import quantized, randn
from qlib.activations import inputs
from qlib.cache import QuantizedCache
from qlib.hadamard import hadamard
from qlib.kernels.cpu import product, ternary
from qlib.linear import QLinear

def results():
    found = []
    for name, q in weights.items():
        layer = QLinear(q, inputs=inputs("int8-row") if name == "int8-row" else None)
        with torch.device(device):
            found += [layer(x[:1]), layer(x)]
    with torch.device(device):
        packed = ternary.packed(ragged)
        found += [rung(x[:, :250], packed) for rung in (product.gemv, ternary.additions)]
        found.append(hadamard(x))
    cache, k = QuantizedCache("int4"), x.view(1, 20, 4, 64).transpose(1, 2)
    cache.attend(k, k, k, layer=0)
    with torch.device(device):
        found.append(cache.attend(k[:, :, :1], k[:, :, :1], k[:, :, :1], layer=0))
    return found

names = ("int4-g32", "nf4", "nf4-dq", "nvfp4", "int8", "ternary", "q4_k", "int8-row")
weights = {name: quantized((256, 256), name) for name in names}
ragged = quantized((256, 250), "ternary")
x, device = randn(20, 256), "cpu"
want = results()
device = "meta"
for dtype in (torch.float32, torch.float64):
    torch.set_default_dtype(dtype)
    found = results()
    assert all(a.dtype == torch.float32 and a.device.type == "cpu" for a in found)
    assert all(map(torch.equal, found, want))
assert (found[0] - want[2]).abs().max() > 1e-2
"""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_machine_code_takes_only_memory_of_the_cpu():
    message = "^machine code reads the CPU's memory, not meta's$"
    with pytest.raises(ValueError, match=message):
        native.words(torch.zeros(2), torch.zeros(2, device="meta"))
    with pytest.raises(ValueError, match=message):
        threads.by_rows(note, (torch.zeros(3, 3, device="meta"), np.float32(1), None), 3, 3)
    with pytest.raises(ValueError, match=message):
        hadamard.hadamard(torch.zeros(2, 64), torch.ones(1, 1), torch.ones(64, device="meta"))


def test_a_view_of_negated_numbers_is_read_as_what_it_means():
    x = randn(3, 64)
    negated = torch._neg_view(x)
    assert negated.is_neg()
    packed = nibbles.packed(quantized((4, 64), "int4-g32"))
    for f in (
        lambda x: product.gemv(x, packed),
        lambda x: product.gemm(x, packed),
        lambda x: hadamard.hadamard(x, torch.ones(1, 1), torch.ones(64)),
    ):
        assert torch.equal(f(negated), f(-x))
        assert not torch.equal(f(negated), f(x))


@pytest.mark.parametrize("rung", [*RUNGS, ternary.additions])
def test_activations_that_are_no_floats_of_the_cpu_are_refused(rung):
    packed = ternary.packed(quantized((4, 64), "ternary"))
    for x, found in (
        (torch.zeros(2, 64, dtype=torch.int32), "torch.int32 on cpu"),
        (torch.zeros(2, 64, device="meta"), "torch.float32 on meta"),
        (torch.zeros(2, 64, dtype=torch.complex64), "torch.complex64 on cpu"),
    ):
        message = f"product: x is {found}, need floating point on the CPU"
        with pytest.raises(ValueError, match=f"^{message}$"):
            rung(x, packed)
    assert rung(torch.zeros(0, 64), packed).shape == (0, 4)
    x = randn(3, 128, dtype=torch.float64)[:, ::2]
    want = x @ quantized((4, 64), "ternary").dequantize().double().T
    assert (rung(x, packed) - want).abs().max() < 1e-4


@pytest.mark.parametrize(("module", "name"), [(m, names[0]) for m, names in FORMATS.items()])
def test_a_weight_with_other_tensors_is_refused(module, name):
    """Compiled code would read behind their ends."""
    q, kernel = quantized((4, 256), name), module.__name__.rpartition(".")[2]
    for part, stored in q.parts.items():
        for wrong in (stored[:2, :-1], stored.float(), None):
            parts = {k: v for k, v in {**q.parts, part: wrong}.items() if v is not None}
            if wrong is not None and (wrong.dtype, wrong.shape) == (stored.dtype, stored.shape):
                continue
            with pytest.raises(ValueError, match=rf"^{kernel}: q of \[4, 256\] has {{.*}}, need "):
                module.packed(QTensor(q.format, q.shape, parts))
    other = quantized((4, 256), "mxint8")
    with pytest.raises(ValueError, match=f"^{kernel}: {re.escape(module.why_not(other))}$"):
        module.packed(other)


def test_additions_are_for_ternary_weights():
    packed = ggml.packed(quantized((4, 256), "q8_0"))
    with pytest.raises(ValueError, match=r"^additions: the weights are not ternary$"):
        ternary.additions(randn(1, 256), packed)


def test_the_transform_takes_only_rows_and_a_square_base():
    ones = torch.ones
    for x, base, found in (
        (torch.zeros(2, 64, 64), ones(1, 1), "torch.float32 [2, 64, 64], base is [1, 1]"),
        (torch.zeros(4, 256), ones(4, 6400), "torch.float32 [4, 256], base is [4, 6400]"),
        (torch.zeros(64), ones(1, 1), "torch.float32 [64], base is [1, 1]"),
        (torch.zeros(2, 64), ones(()), "torch.float32 [2, 64], base is []"),
        (torch.zeros(2, 64).int(), ones(1, 1), "torch.int32 [2, 64], base is [1, 1]"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'hadamard: x is {found}')}$"):
            hadamard.hadamard(x, base, ones(64))
    message = "hadamard: rows of 64 are not 0 times a power of two from 16, and 64 or more"
    with pytest.raises(ValueError, match=f"^{message}$"):
        hadamard.hadamard(torch.zeros(2, 64), ones(0, 0), ones(64))
    assert hadamard.hadamard(torch.zeros(0, 64), ones(1, 1), ones(64)).shape == (0, 64)


def test_a_base_may_be_the_view_of_its_transpose():
    base, x = base_matrix(44).float(), randn(3, 44 * 16)
    assert not torch.equal(base, base.T)
    found = hadamard.hadamard(x, base.T, torch.ones(704))
    assert torch.equal(found, hadamard.hadamard(x, base.T.contiguous(), torch.ones(704)))
    assert not torch.equal(found, hadamard.hadamard(x, base, torch.ones(704)))


@pytest.mark.parametrize("rung", [*RUNGS, ternary.additions])
def test_activations_of_another_width_are_refused(rung):
    packed = ternary.packed(quantized((4, 64), "ternary"))
    with pytest.raises(ValueError, match=r"^product: x is \[1, 63\], weight is \[4, 64\]$"):
        rung(randn(1, 63), packed)


def test_vectors_are_read_only_from_what_lies_as_they_do():
    first = njit(lambda array: simd.total(simd.load(array, 0)))
    assert first(np.ones(16, np.float32)) == 16
    for array in (np.ones(16), np.ones(16, np.int8), np.ones(32, np.float32)[::2]):
        with pytest.raises(TypingError):
            first(array)


def test_a_lookup_is_one_instruction_where_registers_are_wide():
    look = njit(lambda t, b: simd.total(simd.lookup(simd.load(t, 0), simd.load_bytes(b, 0))))
    table, index = np.arange(16, dtype=np.float32), np.arange(16, dtype=np.uint8)
    assert look(table, index) == table.sum()
    code = next(iter(look.inspect_asm().values()))
    assert ("vpermps" in code or "vpermd" in code) or not simd.WIDE


@njit
def arithmetic(x, y, index):
    a, b, i = simd.load(x, 0), simd.load(y, 0), simd.load_bytes(index, 0)
    low = simd.lookup(a, i)
    out = np.empty(16 * 6, np.float32)
    simd.store(out, 0, a + b * simd.splat(np.float32(3)))
    simd.store(out, 16, a - b)
    simd.store(out, 32, low)
    simd.store(out, 48, simd.floats((i * 3) - (i >> 2)))
    simd.store(out, 64, simd.two_halves(np.float32(1), np.float32(2)))
    simd.store(out, 80, simd.lookup_two(a, b, i))
    return out, simd.total(a)


def check_vectors() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 16)).astype(np.float32)
    index = rng.integers(0, 256, 16, dtype=np.uint8)
    out, total = arithmetic(x, y, index)
    whole = index.astype(int)
    want = [x + y * 3, x - y, x[whole % 16], whole * 3 - whole // 4, [1] * 8 + [2] * 8]
    want.append(np.concatenate((x, y))[whole % 32])
    assert np.allclose(out.reshape(6, 16), want, rtol=1e-6, atol=1e-6)
    assert abs(total - x.sum()) < 1e-5


def test_vectors():
    check_vectors()


def test_vectors_of_narrow_processors():
    """The same without AVX-512, where a lookup is made of two of eight entries."""
    code = "import test_kernels_cpu as t; assert not t.simd.WIDE; t.check_vectors()"
    environment = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}
    environment["PYTHONPATH"] = os.path.dirname(__file__)
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@njit
def some(row, count):
    return simd.total(simd.floats(simd.load_some_bytes(row, len(row) - count, count)))


def test_the_last_bytes_of_a_row_and_nothing_behind_them():
    page = np.arange(64, dtype=np.uint8)
    for count in range(1, 16):
        assert some(page[:32], count) == page[32 - count : 32].sum()
