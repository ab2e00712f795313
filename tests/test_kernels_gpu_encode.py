"""Quantize-and-pack for the GPU, interpreted and compiled: bit for bit `qlib.quantize`."""

from __future__ import annotations

import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_child import CAPABILITIES, compiled, facts, interpreted

import qlib
from qlib import fit, grid
from qlib.kernels.gpu import encode
from qlib.scheme import Divisor, Scheme

NAMES = "int8-row fp8_e4m3 fp8_e5m2 int4-g32 int4-g48 int4-row int8-g32 int4-g32-asym int8-g16-asym"
NAMES = [*NAMES.split(), *"int4-row-asym mxfp4 mxfp8_e4m3 mxfp8_e5m2 nvfp4".split()]
FORMATS = {name: qlib.format(name) for name in NAMES}
FORMATS["e2m1, float32"] = Scheme(grid.E2M1, 16, fit.absmax, scale=torch.float32)
FORMATS["uint8, float32"] = dataclasses.replace(FORMATS["int8-g16-asym"], scale=torch.float32)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def ties(format: Scheme) -> torch.Tensor:
    """The middles between neighbors of the grid, under scales that are stored exactly."""
    points = format.grid.points[format.grid.points.isfinite()].unique()
    points = points[points >= -format.grid.max]
    ends, middles = points[[0, -1]], (points[1:] + points[:-1]) / 2
    size = format.block if type(format.block) is int else len(middles) + 2
    blocks = -(-len(middles) // (size - 2))
    middles = middles.repeat(2)[: blocks * (size - 2)].view(blocks, -1)
    x = torch.cat([ends.expand(blocks, 2), middles], 1).view(1, -1)
    if format.offset is not None:
        return x - 4
    # NVFP4's block scale is 448 units of the tensor's here.
    return x * (448 if isinstance(format.scale, Scheme) else 2**-3)


def with_zeros() -> torch.Tensor:
    x = gaussian(3, 96, 1)
    x[0] = 0
    x[1, :48] = -0.0
    x[2, 7] *= -0.0
    return x


def with_outlier() -> torch.Tensor:
    x = gaussian(2, 130, 2)
    x[1, 77] = -6e4
    return x


INPUTS = {
    "gaussian": lambda format: gaussian(3, 77),
    "more blocks than a program": lambda format: gaussian(1, 5000, 3),
    "one value": lambda format: gaussian(1, 1),
    "one column": lambda format: gaussian(3, 1, 4),
    "positive": lambda format: gaussian(1, 64, 5).abs(),
    "negative": lambda format: -gaussian(1, 64, 6).abs(),
    "huge": lambda format: gaussian(1, 100, 7) * 1e5,
    "tiny": lambda format: gaussian(2, 100, 8) * 1e-30,
    "subnormal": lambda format: gaussian(4, 100, 9) * torch.logspace(-38, -44, 4)[:, None],
    "ranges": lambda format: gaussian(1, 512, 10) * torch.logspace(-9, 4, 512),
    "ties": ties,
    # Products with the reciprocal of this scale, which float16 has, miss most of the ties.
    "ties of another scale": lambda format: ties(format) * (2021 / 1024),
    "zeros": lambda format: with_zeros(),
    "outlier": lambda format: with_outlier(),
    "float16": lambda format: gaussian(2, 100, 11).half(),
    "float16 from end to end": lambda format: (
        (gaussian(2, 96, 12) * 1e4).clamp(-65504, 65504).half()
    ),
    "float16 subnormal": lambda format: (gaussian(1, 96, 13) * 1e-6).half(),
    "bfloat16": lambda format: gaussian(2, 100, 14).bfloat16(),
}
CASES = [(name, kind) for name in FORMATS for kind in INPUTS]
# Without numbers below 2^-112, whose E4M3 scale of the tensor is no float32, all can be any size.
ANY = {"e2m1, float32", "uint8, float32", "fp8_e4m3", "fp8_e5m2", "mxfp4", "mxfp8_e4m3", "nvfp4"}


def everything() -> dict:
    """All that runs in the interpreter: bytes in hex by case, and what the functions below find."""
    with np.errstate(all="ignore"):
        found = {"shapes": every_shape(), "finite": not_finite()}
    for name in ORACLES:
        found[f"{name} oracle"] = run(gaussian(8, 256, 20), name)
    for name, kind in CASES:
        found[f"{name} {kind}"] = run(INPUTS[kind](FORMATS[name]), name)
    for name in ANY:
        found[f"{name} 1e30"] = run(gaussian(2, 96) * 1e30, name)
    return found


ORACLES = ("int8-row", "fp8_e4m3", "mxfp4", "mxfp8_e4m3", "nvfp4")


def run(x: torch.Tensor, name: str) -> str:
    return encode.encode(x, FORMATS[name]).tobytes().hex()


@pytest.fixture(scope="module")
def kernel():
    return interpreted(everything)


@pytest.mark.parametrize(("name", "kind"), CASES, ids=str)
def test_bytes(kernel, name, kind):
    q = qlib.quantize(INPUTS[kind](FORMATS[name]), FORMATS[name])
    found = bytearray.fromhex(kernel[f"{name} {kind}"])
    assert found == q.tobytes()
    for part in (0, -1):
        flipped = found.copy()
        flipped[part] ^= 1
        assert flipped != q.tobytes()


@pytest.mark.parametrize("name", sorted(ANY))
def test_bytes_of_1e30(kernel, name):
    assert (
        kernel[f"{name} 1e30"]
        == qlib.quantize(gaussian(2, 96) * 1e30, FORMATS[name]).tobytes().hex()
    )


def careless(x: torch.Tensor, format: Scheme, how: str) -> torch.Tensor:
    """The codes if one habit of `rounding` were given up."""
    w, q = x.float(), format.quantize(x)
    scale, offset = format.read(q.parts, x.shape)
    if how == "unrounded scale":
        scale = format.fit_blocks(w)[0]
    width = format.block if type(format.block) is int else x.shape[1]
    scale = scale.masked_fill(scale == 0, 1).repeat_interleave(width, 1)[:, : x.shape[1]]
    y = w * (1 / scale) if how == "reciprocal" else w / scale
    if how == "ties away from zero":
        y = y.nextafter(y.sign() * torch.inf)
    if offset is not None:
        y = y.round() + offset.repeat_interleave(width, 1)[:, : x.shape[1]]
    return format.pack(format.grid.round(y.nan_to_num()), x.shape)


EXACT = ("mxfp4", "mxfp8_e4m3", "mxfp8_e5m2")
HABITS = [("ties away from zero", name) for name in FORMATS]
HABITS += [("reciprocal", name) for name in FORMATS if name not in EXACT]
HABITS += [
    ("unrounded scale", n)
    for n in FORMATS
    if n not in EXACT and "float32" not in n and "fp8" not in n
]


@pytest.mark.parametrize(("how", "name"), HABITS, ids=str)
def test_the_inputs_notice_a_careless_kernel(how, name):
    format, noticed = FORMATS[name], False
    for make in INPUTS.values():
        x = make(format)
        noticed |= not torch.equal(careless(x, format, how), format.quantize(x).parts["codes"])
    assert noticed
    x = gaussian(5, 77)
    assert torch.equal(careless(x, format, "none"), format.quantize(x).parts["codes"])


# -- Independent of qlib ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def oracle(kernel):
    found = {name: bytes.fromhex(kernel[f"{name} oracle"]) for name in ORACLES}
    return {name: np.frombuffer(found[name], np.uint8) for name in ORACLES}


def test_int8_equals_numpy(oracle):
    x = gaussian(8, 256, 20).numpy()
    scale = (np.abs(x).max(1, keepdims=True) / np.float32(127)).astype(np.float16)
    codes = np.rint(x / scale.astype(np.float32)) + 128
    assert np.array_equal(oracle["int8-row"][:2048].reshape(8, 256), codes)
    assert np.array_equal(oracle["int8-row"][2048:].view(np.float16), scale[:, 0])
    assert not np.array_equal(oracle["int8-row"][:2048].reshape(8, 256), codes[::-1])


def test_fp8_equals_ml_dtypes(oracle):
    x = gaussian(8, 256, 20).numpy()
    scale = np.abs(x).max(1, keepdims=True) / np.float32(448)
    codes = (x / scale).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert np.array_equal(oracle["fp8_e4m3"][:2048].reshape(8, 256), codes)
    assert np.array_equal(oracle["fp8_e4m3"][2048:].view(np.float32), scale[:, 0])
    assert not np.array_equal(oracle["fp8_e4m3"][:2048].reshape(8, 256), codes ^ 1)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8_e4m3"])
def test_mx_equals_torchao(oracle, name):
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    element = torch.float4_e2m1fn_x2 if name == "mxfp4" else torch.float8_e4m3fn
    scale, codes = to_mx(gaussian(8, 256, 20), element, 32, ScaleCalculationMode.FLOOR)
    parts = [part.view(torch.uint8).numpy().reshape(-1) for part in (codes, scale)]
    assert np.array_equal(oracle[name], np.concatenate(parts))
    assert not np.array_equal(oracle[name], np.concatenate([parts[0], parts[1] ^ 1]))


def test_nvfp4_equals_torchao(oracle):
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    x = gaussian(8, 256, 20)
    scale, codes = nvfp4_quantize(x, 16, x.abs().max() / 2688)
    parts = [part.view(torch.uint8).numpy().reshape(-1) for part in (codes, scale)]
    assert np.array_equal(oracle["nvfp4"][:-4], np.concatenate(parts))
    assert not np.array_equal(oracle["nvfp4"][:-4], np.concatenate([parts[0] ^ 1, parts[1]]))


def every_shape() -> int:
    """In the interpreter: shapes and formats that nobody chose."""
    count = 0

    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(
        st.sampled_from([4, 8]), st.sampled_from(["", "-asym"]), st.integers(1, 20),
        st.integers(1, 4), st.integers(1, 90), st.integers(0, 99),
    )  # fmt: skip
    def check(bits, kind, half, rows, columns, seed):
        nonlocal count
        x = gaussian(rows, columns, seed)
        format = qlib.format(f"int{bits}-g{2 * half}{kind}")
        assert encode.encode(x, format).tobytes() == format.quantize(x).tobytes()
        count += 1

    check()
    return count


def test_every_shape(kernel):
    assert kernel["shapes"] >= 40


def not_finite() -> dict[str, list[bool]]:
    """In the interpreter: which rows of the result are finite, if one value of row 1 is not."""
    found = {}
    for name in ("int8-row", "fp8_e4m3", "int4-g32", "mxfp4", "nvfp4"):
        for value in (torch.nan, torch.inf, -torch.inf):
            x = gaussian(3, 64)
            x[1, 5] = value
            decoded = encode.encode(x, FORMATS[name]).dequantize()
            found[f"{name} {value}"] = decoded.isfinite().all(1).tolist()
    x = gaussian(3, 64)
    x[1, 5] = 1e8
    found["overflow"] = (
        encode.encode(x, FORMATS["int8-row"]).dequantize().isfinite().all(1).tolist()
    )
    return found


def test_what_is_not_finite_shows(kernel):
    for case, finite in kernel["finite"].items():
        # The scale of the tensor is everyone's.
        assert finite == ([False] * 3 if "nvfp4" in case else [True, False, True]), case


# -- Compiled --------------------------------------------------------------------------------------

# (format, capability, dtype, inputs).
BUILDS = [("int8-row", cc, "float16", 4096) for cc in CAPABILITIES]
MORE = ("int4-g32-asym", "nvfp4", "mxfp4")
BUILDS += [(name, cc, "float16", 4096) for name in MORE for cc in (75, 120)]
BUILDS += [(name, 90, "bfloat16", 4096) for name in ("nvfp4", "fp8_e4m3", "mxfp8_e4m3")]
BUILDS += [(name, 90, "float32", 4096) for name in ("int4-g32-asym", "int4-g32")]
BUILDS += [("int8-row", 90, "float16", 28672)]
PATTERNS = {"divisions": r"\bdiv\.\S*f32", "exact": r"\bdiv\.rn\.f32", "fused": "fma"}
PATTERNS |= {"careless": r"\.ftz|\.approx|rcp\.", "stores": r"st\.global\.v[24]\.b32"}


def assembled() -> dict:
    """In the compiler: what the last of each build's kernels, and two divisions, contain."""
    found = {}
    for build in BUILDS:
        name, cc, dtype, columns = build
        x = torch.empty(16, columns, dtype=getattr(torch, dtype))
        launched = encode.launches(x, FORMATS[name])[0][-1]
        found[str(build)] = facts(launched.compiled(cc), **PATTERNS)
    found["amax"] = facts(encode.launches(x, FORMATS["nvfp4"])[0][0].compiled(90))
    return found | {"approximate": divided(False), "exact": divided(True)}


@triton.jit
def divide_kernel(x, y, EXACT: tl.constexpr):
    a, b = tl.load(x), tl.load(y)
    tl.store(x, tl.div_rn(a, b) if EXACT else a / b)


def divided(exact: bool) -> dict:
    from qlib.kernels.gpu.launch import Launch

    x = torch.empty(1)
    code = Launch(divide_kernel, (1,), (x, x), {"EXACT": exact}).compiled(90)
    return facts(code, **PATTERNS, full=r"div\.full\.f32")


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


def is_exact(found: dict) -> bool:
    return found["divisions"] == found["exact"] > 0 == found["careless"]


@pytest.mark.parametrize("build", BUILDS, ids=str)
def test_machine_code(code, build):
    found = code[str(build)]
    assert is_exact(found)
    # Integers are rounded by additions alone; floats by a sum with a power of two times a number.
    assert (found["fused"] > 0) == FORMATS[build[0]].grid.name.startswith("e")
    assert found["wide"] > 0
    assert found["stores"] > 0
    assert found["stack"] == 0


def test_machine_code_of_the_largest_magnitude(code):
    assert code["amax"]["wide"] > 0
    assert code["amax"]["stack"] == 0


def test_a_plain_division_is_not_exact(code):
    assert is_exact(code["exact"])
    assert not is_exact(code["approximate"])
    assert code["approximate"]["full"] == 1


# -- What it does not take -------------------------------------------------------------------------

REASONS = [
    ("int8-row", {}, None),
    ("nf4", {}, "it does not round to the grid nf4"),
    ("int3", {}, "it does not round to the grid int3"),
    ("q4_k", {}, "BlockFormat is not a Scheme"),
    ("int8-tensor", {}, "all values share one scale"),
    ("int4-g33", {}, "blocks of 33 codes of 4 bits do not end at a byte"),
    ("int4-g33", {"columns": 33}, None),
    ("int8-g33", {}, None),
    ("int8", {"dtype": torch.float64}, "x is float64, it takes float16, bfloat16 or float32"),
    ("int8", {"rows": 0}, "x is [0, 64], it takes rows and columns"),
    ("int8", {"columns": 40000}, "a block of 40000 is more than 32768 values"),
    ("int8-mse", {}, "it does not find the scales of int8, block row, mse, scale float16"),
    (
        "int4-g64-offset", {},
        "it does not find the scales of uint4, block 64, minmax, scale float16, offset float16",
    ),
    (
        Scheme(grid.E4M3, "row", fit.absmax, Divisor(torch.float32)), {},
        "it does not find the scales of e4m3, block row, absmax, scale divisor float32",
    ),
    (
        Scheme(grid.GRIDS["int8"], "row", fit.absmax, torch.bfloat16), {},
        "it does not find the scales of int8, block row, absmax, scale bfloat16",
    ),
    (
        dataclasses.replace(qlib.format("int4-g32-asym"), offset=grid.GRIDS["int4"]), {},
        "it does not find the scales of uint4, block 32, minmax, scale float16, zero point int4",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("format", "x", "reason"), REASONS, ids=str)
def test_why_not(format, x, reason):
    x = {"rows": 2, "columns": 64, "dtype": torch.float16} | x
    format = qlib.format(format) if isinstance(format, str) else format
    tensor = torch.zeros(x["rows"], x["columns"], dtype=x["dtype"])
    assert encode.why_not(tensor, format) == reason
    if reason:
        with pytest.raises(ValueError, match=f"^encode: {re.escape(reason)}$"):
            encode.encode(tensor, format)


def test_candidates_change_the_launch():
    x = torch.empty(4, 4096)
    launches = [
        encode.launches(x, FORMATS["int4-g32"], **tiles)[0][0] for tiles in encode.candidates()
    ]
    assert len({(launch.grid, launch.options["num_warps"]) for launch in launches}) == 9
