"""The kernels on a real GPU (`make gpu`): results at real sizes, and who is chosen.

The interpreter and the assembler have seen them without one (tests/test_kernels_gpu_*.py). What
remains is what neither shows: bfloat16 on tensor cores, shared memory, many programs at once. It
takes a GPU of compute capability 8.0 or later.
"""

from __future__ import annotations

import warnings
from importlib import import_module

import pytest
import torch
from gpu_contestants import (
    NotHere,
    Setting,
    eight_bits,
    microscaled,
    module_of,
    quantizer,
    rotation,
    weight,
)
from gpu_tuning import with_tiles

import qlib
from qlib.kernels import SlowKernelWarning, explain, matmul
from qlib.kernels.gpu import integer, product, tuning
from qlib.linear import QLinear
from qlib.qtensor import QTensor

DEVICE = "cuda"
SIZE = 4096
HALF, BRAIN = torch.float16, torch.bfloat16
# Format, the file of its kernels, and the byte of its first part that holds the first codes.
FORMATS = {
    "int4-g128": ("integer", 0),
    "int3-g32-asym": ("integer", 0),
    "int8-row": ("integer", 0),
    "nf4": ("codebook", 0),
    "mxfp4": ("minifloat", 0),
    "nvfp4": ("minifloat", 0),
    "fp8_e4m3": ("minifloat", 0),
    "q4_k": ("ggml", 16),
    "q6_k": ("ggml", 0),
    "ternary": ("ternary", 0),
}
# Compute capability times ten from which on both sides may be of a format.
NEEDS = {"int8-row": 80, "fp8_e4m3": 89, "mxfp4": 80, "mxfp8_e4m3": 89, "nvfp4": 100}
# Rows of activations, outputs, inputs; 256 inputs of ggml's superblocks cannot be ragged.
REAL, RAGGED = (SIZE, SIZE), (1000, 1131)
CASES = [(1, REAL, HALF), (1, RAGGED, BRAIN), (5, RAGGED, HALF), (100, REAL, BRAIN)]


def setting(dtype: torch.dtype = BRAIN) -> Setting:
    major, minor = torch.cuda.get_device_capability()
    return Setting(DEVICE, dtype, 10 * major + minor)


def activations(rows: int, inputs: int, dtype: torch.dtype) -> torch.Tensor:
    """What is changed in a weight, its first codes, has to matter."""
    x = setting(dtype).randn(64, inputs).repeat(2, 1)[:rows]
    x[:, 0] = 8
    return x


def problem(name: str, rows: int, shape: tuple[int, int], dtype: torch.dtype):
    outputs, inputs = shape
    inputs -= inputs % 256 if name.startswith("q") else 0
    return activations(rows, inputs, dtype), weight(name, outputs, inputs, DEVICE)


def kernel(x: torch.Tensor, q: QTensor) -> torch.Tensor:
    module = import_module(f"qlib.kernels.gpu.{module_of(q)}")
    rung = "gemv" if len(x) == 1 else "gemm"
    if hasattr(module, rung):
        return getattr(module, rung)(x, q)
    return getattr(product, rung)(x, module.packed(q))


def share(y: torch.Tensor, x: torch.Tensor, q: QTensor) -> float:
    """The largest error over twice torch's own."""
    values = q.to("cpu").dequantize().to(DEVICE)
    exact = x.double() @ values.double().T
    own = (x @ values.to(x.dtype).T - exact).abs().max()
    return ((y - exact).abs().max() / (2 * own)).item()


def changed(q: QTensor, byte: int) -> QTensor:
    """`q` with other codes in one byte: 242 - b is the byte of the opposite trits."""
    name = next(iter(q.parts))
    part = q.parts[name].clone()
    part[0, byte] = 242 - part[0, byte] if q.format == qlib.format("ternary") else ~part[0, byte]
    return QTensor(q.format, q.shape, q.parts | {name: part})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "shape", "dtype"), CASES, ids=str)
def test_products(name, rows, shape, dtype):
    x, q = problem(name, rows, shape, dtype)
    assert module_of(q) == FORMATS[name][0]
    y = kernel(x, q)
    assert y.dtype == dtype
    assert share(y, x, q) <= 1
    assert share(kernel(x, changed(q, FORMATS[name][1])), x, q) > 1
    assert torch.equal(kernel(x, q), y)


@pytest.mark.parametrize("rows", [1, 16])
def test_partial_sums_are_added_in_the_same_order(rows):
    x, q = problem("int4-g128", rows, REAL, HALF)
    rung = "gemv" if rows == 1 else "gemm"
    tiles = tuning.rule(rung, rows, *REAL) | {"SPLIT": 4}
    results = [with_tiles(rung, x, tiles, integer.packed(q)) for _ in range(5)]
    assert all(torch.equal(results[0], y) for y in results[1:])
    assert share(results[0], x, q) <= 1


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 16])
def test_the_gpu_kernel_is_chosen(name, rows):
    x, q = problem(name, rows, (256, 512), HALF)
    rung = "gemv" if rows == 1 else "gemm"
    assert explain(x, q).startswith(f"gpu.{FORMATS[name][0]}.{rung}, ")
    with warnings.catch_warnings():
        warnings.simplefilter("error", SlowKernelWarning)
        assert torch.equal(matmul(x, q), kernel(x, q))


def test_what_no_kernel_takes_is_dequantized():
    x, q = activations(1, 256, HALF), weight("int4-g128", 64, 256, DEVICE)
    assert explain(x.float(), q).startswith("dequantize.gemm, ")
    assert share(matmul(x.float(), q), x.float(), q) <= 1


def test_tiles_of_this_card():
    """Each entry of tuned.json for it, or what the rule says, gives the right product."""
    known = tuning.tuned().get(torch.cuda.get_device_name(), {})
    rules = {f"{rung} 1 x 512 x 1024": tuning.rule(rung, 1, 512, 1024) for rung in tuning.NAMES}
    for name, tiles in (known or rules).items():
        rung, rows, _, outputs, _, inputs = name.split()
        x, q = problem("int4-g128", int(rows), (int(outputs), int(inputs)), BRAIN)
        y = with_tiles(rung, x, tiles, integer.packed(q))
        assert share(y[-64:], x[-64:], q) <= 1, name


@pytest.mark.parametrize("rows", [1, 5])
def test_compiled_layer(rows):
    """One graph with the kernel in it, no way back to Python."""
    x, q = problem("int4-g128", rows, (256, 512), BRAIN)
    layer = QLinear(q)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
        assert not torch.equal(compiled(-x), layer(x))


def test_captured_product():
    """A CUDA graph replays it with the activations that lie there then."""
    x, q = problem("int4-g128", 1, REAL, HALF)
    once = matmul(x, q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul(x, q)
    x.mul_(-1)
    graph.replay()
    assert torch.equal(y, -once)


@pytest.mark.parametrize("name", ["int8-row", "fp8_e4m3"])
@pytest.mark.parametrize("rows", [1, 33, 200])
def test_eight_bits(name, rows):
    within(eight_bits, name, *REAL, rows)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3", "nvfp4"])
def test_microscaled(name):
    within(microscaled, name, *REAL, 70)


def within(make, name: str, outputs: int, inputs: int, rows: int) -> None:
    """The product is within its budget and its negative is not, or the card lacks what it needs."""
    if setting().capability < NEEDS[name]:
        with pytest.raises(NotHere):
            make(setting(), name, outputs, inputs, rows)
        return
    contestant = make(setting(), name, outputs, inputs, rows)
    y = contestant.call(contestant.operands[0])
    assert contestant.error(y) <= 1
    assert contestant.error(-y) > 1


@pytest.mark.parametrize("dtype", [HALF, BRAIN, torch.float32], ids=str)
@pytest.mark.parametrize(
    "name", ["int8-row", "int4-g128", "int4-g32-asym", "fp8_e4m3", "mxfp4", "nvfp4"]
)
def test_encoded_as_on_the_cpu(name, dtype):
    contestant = quantizer(setting(dtype), name, 37, 1056)
    x = contestant.operands[0]
    assert contestant.error(contestant.call(x)) == 0
    x[0, 0] = 9
    assert contestant.error(contestant.call(x)) > 1


@pytest.mark.parametrize("dtype", [HALF, BRAIN, torch.float32], ids=str)
@pytest.mark.parametrize("size", [64, 4096, 8192])
def test_hadamard(size, dtype):
    contestant = rotation(setting(dtype), 33, size)
    y = contestant.call(contestant.operands[0])
    assert contestant.error(y) <= 1
    assert contestant.error(-y) > 1
