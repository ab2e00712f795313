"""HQQ: the numbers of its authors' code, its equations written out, and never worse than rtn."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor

import qlib
from qlib import fit, grid
from qlib.columns import Columns
from qlib.methods.hqq import hqq
from qlib.methods.rtn import rtn
from qlib.qtensor import QTensor
from qlib.scheme import Scheme


def exact(bits: int, block: int | str = 64) -> Scheme:
    """The format of the authors' code: scale and offset stay float32."""
    return Scheme(grid.GRIDS[f"uint{bits}"], block, fit.minmax, torch.float32, torch.float32)


def parts(q: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [rows, cols], scale and zero [rows, blocks]; in Columns, rows are input channels."""
    scheme, shape = q.format, q.shape
    if isinstance(scheme, Columns):
        scheme, shape = scheme.scheme, shape[::-1]
    scale, offset = scheme.read(q.parts, shape)
    return scheme.unpack(q.parts["codes"], shape), scale, -offset / scale.masked_fill(scale == 0, 1)


def random(shape, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mean_error(q: QTensor, w: Tensor, power: float = 1.0) -> float:
    return (q.dequantize() - w).double().abs().pow(power).mean().item()


# -- the authors' code --------------------------------------------------------------------------


def congruential() -> Tensor:
    """128 x 64 sums of four uniforms, the same on every machine, and one outlier."""
    state, values = 1, []
    for _ in range(4 * 128 * 64):
        state = (1664525 * state + 1013904223) % 2**32
        values.append(state >> 9)
    uniform = torch.tensor(values, dtype=torch.float64).view(4, 128, 64) / 2**23
    w = ((uniform.sum(0) - 2) * 1.5).float()
    w[5, 7] = 6.0
    return w


# hqq 0.2.8.post1, Quantizer.quantize(congruential(), nbits, group_size=64, axis, device="cpu") with
# optimize_weights_proximal_v2 (lp_norm 0.7, beta 10, kappa 1.01, iters 20, early_stop), or with its
# default, which leaves out kappa: the zeros of the first eight groups, the codes of the sixth in
# hexadecimal, the mean |error| of the whole weight.
AUTHORS = [
    (4, 1, {}, [8.6634, 7.1283, 6.6545, 7.3909, 6.3088, 3.2495, 7.8548, 6.5763],
     "4210552f44025417536563132303433303324552423754470654023225145343", 0.060886),
    (4, 0, {}, [8.1882, 9.9211, 6.2342, 7.2841, 7.9242, 8.1643, 7.8533, 7.3188],
     "858b5a74dd59ad97757b95a85777cba9827c9b9997bca5c70545adafad684a67", 0.059531),
    (3, 1, {}, [4.1012, 3.1450, 2.8242, 3.5231, 2.8505, 1.4087, 3.5731, 3.0679],
     "2100221722012203213231011101221101112221211322230322011112122121", 0.129435),
    (3, 0, {}, [4.1100, 4.6109, 2.8798, 3.4067, 3.9221, 3.5511, 3.7337, 3.5355],
     "3235253266244643323542442333554431364544435542530222464746232533", 0.124170),
    (2, 1, {}, [1.9028, 1.4259, 1.0914, 1.4959, 1.2751, 0.6831, 1.6369, 1.0650],
     "1000111311001101111111010101111101101110101111110111001001011111", 0.304267),
    (2, 0, {}, [1.8188, 2.0818, 1.1273, 1.3096, 1.5957, 1.6046, 1.4430, 1.5687],
     "2122121133122321111221221111222220122222212221210111232323121211", 0.296016),
    (4, 1, {"growth": 1.0}, [8.6634, 7.1283, 6.6545, 7.3909, 6.3088, 3.2543, 7.8548, 6.5763],
     "4210552f44025417536563132303433303324552423754470654023225145343", 0.061016),
    (2, 0, {"growth": 1.0}, [1.8361, 2.0824, 1.1260, 1.2970, 1.5969, 1.5755, 1.4282, 1.5614],
     "1112121123122321111221221111222220122222212221210111232323111211", 0.295305),
]  # fmt: skip


def taken_by_reshape(rows: int, group: int = 64) -> Tensor:
    """The order of rows in which neighbors are what hqq's axis 0, reshape(group, -1), groups.

    It groups the rows r, r + rows/group, r + 2 rows/group, ... of a column.
    """
    return torch.arange(rows).view(group, -1).T.reshape(-1)


def in_their_order(bits: int, axis: int, settings) -> tuple[Tensor, Tensor, float]:
    """Our zeros [groups], codes [groups, 64] and mean |error|; groups in the order of hqq's."""
    w = congruential()
    ordered = w if axis == 1 else w[taken_by_reshape(128)]
    q = hqq(ordered, exact(bits), axis=axis, **settings)
    codes, _, zero = parts(q)
    if axis == 0:
        # Ours go column by column; theirs take all columns of one set of rows, then the next.
        codes, zero = codes.view(64, 2, 64).transpose(0, 1), zero.view(64, 2).T
    return zero.reshape(-1), codes.reshape(-1, 64), mean_error(q, ordered)


def agrees(expected, found: tuple[Tensor, Tensor, float]) -> bool:
    zeros, codes, error = expected
    same = (found[0][:8] - torch.tensor(zeros)).abs().max() < 1e-3
    text = "".join(f"{code:x}" for code in found[1][5].tolist())
    return bool(same) and text == codes and abs(found[2] - error) < 2e-6


@pytest.mark.parametrize(("bits", "axis", "settings", "zeros", "codes", "error"), AUTHORS)
def test_equals_the_authors_code(bits, axis, settings, zeros, codes, error):
    expected = (zeros, codes, error)
    assert agrees(expected, in_their_order(bits, axis, settings))
    for change in ({"beta": 5.0}, {"norm": 0.9}, {"iterations": 0}, {"iterations": 5}):
        assert not agrees(expected, in_their_order(bits, axis, settings | change)), change


def test_order_of_their_axis_0():
    """A permutation of rows turns their groups into ours: neighbors in a column."""
    w = random((256, 6))
    theirs = w.reshape(64, -1)
    ours = w[taken_by_reshape(256)].view(4, 64, 6).transpose(0, 1).reshape(64, -1)
    assert torch.equal(theirs, ours)
    assert not torch.equal(theirs, w.view(4, 64, 6).transpose(0, 1).reshape(64, -1))
    scale = parts(hqq(w[taken_by_reshape(256)], exact(4), axis=0))[1]
    span = (theirs.amax(0) - theirs.amin(0)).view(4, 6).T / 15
    torch.testing.assert_close(scale, span, rtol=1e-6, atol=0)


# -- the equations ------------------------------------------------------------------------------


def equations(w, scale, zero, top, size, iterations=20, norm=0.7, beta=10.0, growth=1.01):
    """The half-quadratic solver in float64, block by block, as the paper writes it."""
    least, kept = math.inf, zero
    for _ in range(iterations + 1):
        total, moved = 0.0, zero.copy()
        for row, block in np.ndindex(scale.shape):
            x = w[row, block * size : (block + 1) * size]
            s, z = scale[row, block], zero[row, block]
            code = np.clip(np.rint(x / s + z), 0, top)
            error = x - (code - z) * s
            with np.errstate(divide="ignore"):
                shrunk = np.maximum(np.abs(error) - np.abs(error) ** (norm - 1) / beta, 0)
            outlier = np.sign(error) * shrunk
            moved[row, block] = np.mean(code - (x - outlier) / s)
            total += np.abs(error).sum()
        if total >= least:
            break
        least, kept, zero, beta = total, zero, moved, beta * growth
    return kept


@pytest.mark.parametrize("settings", [{}, {"norm": 1.0, "beta": 3.0}, {"norm": 0.4, "growth": 1.1}])
@pytest.mark.parametrize(
    ("bits", "block", "shape", "spread"),
    [(4, 64, (8, 128), 1.0), (3, 32, (5, 100), 1.0), (2, 7, (3, 50), 2.0), (1, 16, (4, 33), 1.0),
     (8, "row", (4, 77), 30.0), (4, 64, (8, 128), 0.02), (3, "tensor", (6, 30), 1.0)],
)  # fmt: skip
def test_equals_the_equations(bits, block, shape, spread, settings):
    w, format = random(shape, bits) * spread, exact(bits, block)
    found = parts(hqq(w, format, **settings))[2]
    _, scale, zero = (x.double().numpy() for x in parts(rtn(w, format)))
    rows = format.rows(w).double().numpy()
    size = block if isinstance(block, int) else rows.shape[1]

    def distance(**changed):
        expected = equations(rows, scale, zero, 2**bits - 1, size, **(settings | changed))
        return np.abs(expected - found.numpy()).max()

    assert distance() < 1e-3
    assert distance(iterations=1) > 1e-3


def test_small_errors_move_the_offset_by_their_mean():
    """Below beta^(1 / (norm - 2)) nothing is an outlier: norm and beta make no difference."""
    w = random((64, 256)) * 0.02
    q = hqq(w, "int4-g64-offset")
    assert mean_error(q, w) < mean_error(rtn(w, "int4-g64-offset"), w)
    for settings in ({"norm": 0.3}, {"norm": 1.0}, {"beta": 1.0}, {"growth": 1.1}):
        assert hqq(w, "int4-g64-offset", **settings).tobytes() == q.tobytes()
    assert hqq(w, "int4-g64-offset", beta=1e4).tobytes() != q.tobytes()
    assert hqq(w * 50, "int4-g64-offset", norm=0.3).tobytes() != hqq(w * 50, q.format).tobytes()


# -- never worse than round-to-nearest ----------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    model, _ = qlib.load("smollm2-135m")
    student = np.random.default_rng(0).standard_t(3, (128, 256))
    found = {"gaussian": random((128, 256)), "student": torch.from_numpy(student).float()}
    for layer in ("0.self_attn.q_proj", "15.mlp.down_proj", "29.mlp.gate_proj"):
        found[layer] = model.get_parameter(f"model.layers.{layer}.weight").detach()[:128, :256]
    return found


LAYERS = ["gaussian", "student", "0.self_attn.q_proj", "15.mlp.down_proj", "29.mlp.gate_proj"]


@pytest.mark.parametrize("axis", [1, 0])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("layer", LAYERS)
def test_error_is_below_that_of_nearest(weights, layer, bits, axis):
    w, name = weights[layer], f"int{bits}-g64-offset"
    nearest = hqq(w, name, axis=axis, iterations=0)
    solved = hqq(w, name, axis=axis)
    for power in (0.7, 1.0, 2.0):
        assert mean_error(solved, w, power) < 0.99 * mean_error(nearest, w, power)
    # A step too far: the same comparison notices an offset that is off by half a grid step.
    far = QTensor(solved.format, solved.shape, dict(solved.parts))
    far.parts["offset"] = (nearest.parts["offset"] + nearest.parts["scale"] / 2).half()
    assert mean_error(far, w) > mean_error(nearest, w)


@pytest.mark.parametrize("name", ["int4-g64-asym", "int2-g32-asym", "int3-row-asym"])
@pytest.mark.parametrize("layer", LAYERS)
def test_integer_zero_points_gain_nothing(weights, layer, name):
    w = weights[layer]
    assert hqq(w, name).tobytes() == rtn(w, name).tobytes()
    offset = name.replace("asym", "offset")
    assert hqq(w, offset).tobytes() != rtn(w, offset).tobytes()


# -- every format and every block ---------------------------------------------------------------


def awkward() -> dict[str, Tensor]:
    w = random((6, 100))
    outlier, tiny = w * 0.01, w * 1e-6
    outlier[2, 3] = 50.0
    zeros, constant = w.clone(), w.clone()
    zeros[:, :64], constant[:, 10:90] = 0, 0.37
    found = {"outlier": outlier, "tiny": tiny, "zeros": zeros, "constant": constant}
    found |= {"one sign": w.abs() + 3, "all zeros": w * 0}
    found |= {"one weight": w[:1, :1], "one row": w[:1], "one column": w[:, :1]}
    return found | {"bfloat16": w.bfloat16(), "float64": w.double()}


NAMES = [f"int{bits}-g32-offset" for bits in range(1, 9)]
NAMES += ["int4-row-offset", "int3-tensor-offset", "int4-g7-offset-mse", "int4-g32-asym"]


@pytest.mark.parametrize("case", awkward())
@pytest.mark.parametrize("name", NAMES)
def test_awkward_weights(name, case, tmp_path):
    w = awkward()[case]
    before = w.clone()
    for axis in (1, 0):
        q = hqq(w, name, axis=axis)
        nearest = hqq(w, name, axis=axis, iterations=0)
        assert torch.equal(w, before)
        assert q.dequantize().isfinite().all()
        assert torch.equal(q.parts["scale"], nearest.parts["scale"])
        assert mean_error(q, w) <= mean_error(nearest, w)
        assert q.nbytes == q.format.nbytes(w.shape)
        q.save(tmp_path / "w.safetensors")
        loaded = QTensor.load(tmp_path / "w.safetensors")
        assert loaded.format == q.format
        assert torch.equal(loaded.dequantize(), q.dequantize())
    if case == "all zeros":
        assert not q.dequantize().any()


def test_no_iterations_is_nearest():
    w = random((33, 130))
    for name in NAMES:
        assert hqq(w, name, iterations=0).tobytes() == rtn(w, name).tobytes()
        assert rtn(w, Columns(qlib.format(name))).tobytes() == hqq(w, name, 0, 0).tobytes()
    assert hqq(w, "int4-g32-offset").tobytes() != rtn(w, "int4-g32-offset").tobytes()


@pytest.mark.parametrize("name", ["int4-g32-offset", "int3-row-offset", "int5-g32-asym"])
def test_codes_are_nearest_under_the_stored_offset(name):
    w = random((9, 100), 3)
    q = hqq(w, name)
    error = (q.dequantize() - w).abs()
    codes = q.format.unpack(q.parts["codes"], q.shape)
    for step in (-1, 1):
        other = (codes.int() + step).clamp(0, len(q.format.grid.points) - 1).to(torch.uint8)
        moved = QTensor(q.format, q.shape, q.parts | {"codes": q.format.pack(other, q.shape)})
        assert ((moved.dequantize() - w).abs() >= error - 1e-6).all()


def test_other_grids_and_storages():
    w, double = random((16, 128)), exact(8)
    formats = [
        Scheme(grid.GRIDS["int4"], 32, fit.minmax, torch.bfloat16, torch.bfloat16),
        Scheme(grid.NF4, 64, fit.minmax, torch.float16, torch.float16),
        Scheme(grid.GRIDS["uint4"], 32, fit.minmax, double, torch.float16),
        Scheme(grid.GRIDS["uint3"], 32, fit.minmax, torch.float16, TENSOR),
    ]
    for format in formats:
        assert mean_error(hqq(w, format), w) < mean_error(rtn(w, format), w)


# Offsets in 8 bits, with one scale for all of them.
TENSOR = Scheme(grid.GRIDS["int8"], "tensor", fit.absmax, torch.float32)


def test_rows_taken_a_few_at_a_time_make_no_difference(monkeypatch):
    w = random((40, 100))
    whole = hqq(w, "int3-g32-offset")
    monkeypatch.setattr(importlib.import_module("qlib.methods.hqq"), "CHUNK_WEIGHTS", 300)
    assert hqq(w, "int3-g32-offset").tobytes() == whole.tobytes()


def test_columns_as_a_format_or_as_an_axis():
    w = random((64, 10))
    q = hqq(w, Columns(qlib.format("int4-g32-offset")))
    assert q.tobytes() == hqq(w, "int4-g32-offset", axis=0).tobytes()
    assert q.tobytes() == hqq(w, Columns(qlib.format("int4-g32-offset")), axis=0).tobytes()
    assert torch.equal(q.dequantize(), hqq(w.T.contiguous(), "int4-g32-offset").dequantize().T)
    x = random((3, 10), 1)
    assert torch.equal(qlib.kernels.matmul(x, q), x @ q.dequantize().T)


# -- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda w: hqq(w, "int4-g64"),
            "int4, block 64, absmax, scale float16 has no offset to move; hqq needs one, as in "
            "'int4-g64-offset'",
        ),
        (
            lambda w: hqq(w, "nf4", axis=0),
            "nf4, block 64, absmax, scale float32 has no offset to move; hqq needs one, as in "
            "'int4-g64-offset'",
        ),
        (
            lambda w: hqq(w, "int4-g64-offset", axis=2),
            "axis is 2; use 1 for blocks along the input, 0 down the columns",
        ),
        (
            lambda w: hqq(w, "int4-g64-offset", norm=1.5),
            "need iterations >= 0, 0 < norm <= 1, beta > 0, growth >= 1: (20, 1.5, 10.0, 1.01)",
        ),
        (
            lambda w: hqq(w, "int4-g64-offset", iterations=-1),
            "need iterations >= 0, 0 < norm <= 1, beta > 0, growth >= 1: (-1, 0.7, 10.0, 1.01)",
        ),
        (
            lambda w: hqq(w, "int4-g64-offset", beta=0, growth=1),
            "need iterations >= 0, 0 < norm <= 1, beta > 0, growth >= 1: (20, 0.7, 0, 1)",
        ),
        (
            lambda w: hqq(w, "int4-g64-offset", growth=0.9),
            "need iterations >= 0, 0 < norm <= 1, beta > 0, growth >= 1: (20, 0.7, 10.0, 0.9)",
        ),
        (
            lambda w: hqq(w[0], "int4-g64-offset", axis=0),
            "a weight [64] has no columns; Columns needs [out, in]",
        ),
        (
            lambda w: hqq(w.masked_fill(w > 1, math.nan), "int4-g64-offset"),
            "weight [2, 64] holds 20 NaN or infinite values; repair them first",
        ),
        (
            lambda w: hqq(w.masked_fill(w > 1, math.inf), "int4-g64-offset", axis=0),
            "weight [2, 64] holds 20 NaN or infinite values; repair them first",
        ),
        (
            lambda w: hqq(w.int(), "int4-g64-offset"),
            "weight [2, 64] has dtype torch.int32; quantize takes floating point",
        ),
        (
            lambda w: hqq(w[:, :0], "int4-g64-offset"),
            "weight [2, 0] is empty: there is nothing to quantize",
        ),
        (
            lambda w: hqq(w * 1e6, "int4-g64-offset"),
            "a scale of 3.68e+05 overflows float16; store it as torch.float32",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        call(random((2, 64)))
    assert str(caught.value) == message


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
def test_offset_names(bits):
    format = qlib.format(f"int{bits}-g32-offset")
    assert format == Scheme(grid.GRIDS[f"uint{bits}"], 32, fit.minmax, torch.float16, torch.float16)
    assert 8 * format.nbytes((10, 640)) == 6400 * (bits + 32 / 32)
    assert qlib.format(f"int{bits}-g32-offset-mse").fit is fit.minmax_mse
    w = random((5, 70), bits)
    q = qlib.quantize(w, format)
    codes = format.unpack(q.parts["codes"], q.shape).numpy().astype(np.float32)
    scale, offset = (q.parts[k].float().numpy().repeat(32, 1)[:, :70] for k in ("scale", "offset"))
    values = codes * scale + offset
    np.testing.assert_array_equal(q.dequantize().numpy(), values)
    step = np.maximum(scale, 1e-6)
    expected = np.clip(np.rint((w.numpy() - offset) / step), 0, 2**bits - 1)
    np.testing.assert_array_equal(codes, expected)
    q.parts["offset"][0, 0] += 1
    assert not np.array_equal(q.dequantize().numpy(), values)


def test_names_that_are_not():
    with pytest.raises(ValueError, match=r"^unknown format 'int4-g64-offset-asym'"):
        qlib.format("int4-g64-offset-asym")
    with pytest.raises(
        ValueError, match=r"^unknown format 'int4-g64-ofset': did you mean int4-g64-"
    ):
        qlib.format("int4-g64-ofset")
