"""The product that all weight-only GPU kernels share: its rungs, its tiles, its code.

Formats have tests of their own; here the weights are 4-bit integers. The interpreter multiplies the
bits of bfloat16 as if they were integers, so bfloat16 is only compiled.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from triton_child import CAPABILITIES, compiled, interpreted
from weight_kernels import both_rungs, layer_facts, weight

from qlib.kernels.gpu import integer, product, tuning
from qlib.qtensor import QTensor

RUNGS = ["gemv", "gemm"]
NAME, LAYER = "int4-g32-asym", "int4-g128"
SHAPES = [(33, 192, 3), (70, 100, 17), (40, 77, 2), (1, 130, 1), (3, 1100, 1), (130, 33, 66)]
CPU = torch.device("cpu")


def randn(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def problem(out: int, columns: int) -> tuple[torch.Tensor, QTensor]:
    """64 rows of activations and a weight."""
    return randn(64, columns, seed=1).half(), weight(NAME, out, columns)


def error(y, x, q: QTensor) -> float:
    return (y.double() - x.double() @ q.dequantize().double().T).abs().max().item()


def budget(x, q: QTensor) -> float:
    """Twice torch's own error."""
    return 2 * error(product.reference(x, q), x, q)


def run(rung: str, x, q: QTensor, **tiles: int) -> torch.Tensor:
    launch, partial = product.launch(rung, x, integer.packed(q), **tiles)
    launch.run()
    return partial.sum(0).to(x.dtype)


def products() -> dict[str, list]:
    return both_rungs(integer, [(NAME, *shape) for shape in SHAPES], {})


def candidates() -> list:
    """For every candidate of three products (rung, tiles, error / budget)."""
    found = []
    for rung, rows in (("gemv", 1), ("gemm", 5), ("gemm", 70)):
        x, q = problem(40, 1100)
        limit, x = budget(x, q), x.repeat(2, 1)[:rows]
        for tiles in tuning.candidates(rung, rows, 40, 1100):
            found.append((rung, tiles, error(run(rung, x, q, **tiles), x, q) / limit))
    return found


def accepted_tiles() -> int:
    """Any tiles that `launch` takes give the right product, whatever a file says; how many did."""
    x, q = problem(9, 290)
    limit, ran = budget(x, q), [0]
    power = st.sampled_from([4, 16, 32, 64, 128, 256])
    sizes = st.tuples(power, power, power, st.integers(1, 5), st.integers(1, 4))

    @settings(max_examples=20, deadline=None, database=None, derandomize=True)
    @given(st.sampled_from(RUNGS), sizes)
    @example("gemm", (16, 16, 64, 4, 3))  # 5 tiles for 4 programs: the last has nothing to do
    def right(rung, sizes):
        tiles = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT", "GROUP"), sizes))
        if rung == "gemv":
            del tiles["BLOCK_M"]
            tiles["UNROLL"] = tiles.pop("GROUP")
        rows = x[:17] if rung == "gemm" else x[:1]
        try:
            y = run(rung, rows, q, **tiles)
        except ValueError:
            return
        ran[0] += 1
        assert error(y, rows, q) <= limit

    right()
    return ran[0]


def layouts() -> dict[str, list[float]]:
    """error / budget for activations that lie in memory in other ways, of both rungs."""
    x, q = problem(20, 64)
    shifted = torch.empty(64 * 64 + 1).half()[1:].view(64, 64).copy_(x)
    kinds = {
        "transposed": x.T.contiguous().T,
        "every other row": x.repeat_interleave(2, 0)[::2],
        "2 bytes off": shifted,
    }
    limit = budget(x, q)
    return {
        name: [error(run(rung, kind[:3], q), x[:3], q) / limit for rung in RUNGS]
        for name, kind in kinds.items()
    }


def tuned_entry() -> list:
    """What a product does with an entry of tuned.json for this "card": right, then wrong ones."""
    x, q = problem(20, 300)
    good = tuning.rule("gemv", 1, 20, 300) | {"SPLIT": 2}
    results = []
    for entry in (good, good | {"SPLIT": 3}, {"BLOCK_N": 16, "BLOCK_K": 64}):
        tuning._tiling.cache_clear()
        tuning.tuned = lambda entry=entry: {"": {"gemv 1 x 20 x 300": entry}}
        try:
            y = product.gemv(x[:1], integer.packed(q))
            results.append(error(y, x[:1], q) <= budget(x, q))
        except ValueError as wrong:
            results.append(str(wrong))
    return results


# (format, rung, rows of activations, dtype, capability).
GEMV = [(LAYER, "gemv", 1, "bfloat16" if cc > 90 else "float16", cc) for cc in CAPABILITIES]
MMA = "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32"
TENSOR_CORES = {
    (LAYER, "gemm", 16, "float16", 80): MMA.format("f16"),
    (LAYER, "gemm", 16, "bfloat16", 89): MMA.format("bf16"),
    (LAYER, "gemm", 16, "float16", 90): "wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16",
    (LAYER, "gemm", 16, "bfloat16", 100): "tcgen05.mma.cta_group::1.kind::f16",
    (LAYER, "gemm", 16, "float16", 120): MMA.format("f16"),
    (LAYER, "gemm", 4096, "bfloat16", 90): "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16",
    (LAYER, "gemm", 4096, "float16", 100): "tcgen05.mma.cta_group::1.kind::f16",
}
TURING = (LAYER, "gemm", 16, "float16", 75)


def assembled() -> dict[str, dict]:
    return layer_facts(integer, [*GEMV, *TENSOR_CORES, TURING], {}, barriers=r"bar\.sync")


def everything() -> dict:
    functions = (products, candidates, accepted_tiles, layouts, tuned_entry)
    return {function.__name__: function() for function in functions}


@pytest.fixture(scope="module")
def measured():
    return interpreted(everything)


@pytest.fixture(scope="module")
def code():
    return compiled(assembled)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_interpreted_kernels_equal_the_dequantized_product(measured, rung, shape):
    right, wrong, limit = measured["products"][f"{rung} {(NAME, *shape)}"]
    assert right <= limit
    assert min(wrong) > limit


def test_every_candidate_gives_the_right_product(measured):
    assert len(measured["candidates"]) > 30
    for rung, tiles, share in measured["candidates"]:
        assert share <= 1, (rung, tiles)


def test_accepted_tiles_give_the_right_product(measured):
    assert measured["accepted_tiles"] >= 5


@pytest.mark.parametrize("kind", ["transposed", "every other row", "2 bytes off"])
def test_activations_may_lie_anyhow(measured, kind):
    assert max(measured["layouts"][kind]) <= 1


def test_an_entry_of_tuned_json_is_used_and_checked(measured):
    right, split, names = measured["tuned_entry"]
    assert right is True
    assert split == "gemv: SPLIT is 3, but 300 inputs hold 2 tiles of 256"
    assert names.endswith("missing or unknown: SPLIT, UNROLL, num_stages, num_warps")


@pytest.mark.parametrize("target", GEMV, ids=str)
def test_gemv_loads_wide_and_waits_once(code, target):
    """Nothing else that it loads is as wide as the codes. Threads meet once, after the loop."""
    found = code[str(target)]
    assert found["wide"] > 0
    assert found["barriers"] == 1
    assert (found["tensor cores"], found["stack"]) == ([], 0)


@pytest.mark.parametrize("target", TENSOR_CORES, ids=str)
def test_gemm_uses_tensor_cores(code, target):
    found = code[str(target)]
    assert found["tensor cores"] == [TENSOR_CORES[target]]
    assert found["wide"] > 0
    assert found["stack"] == 0


def test_triton_has_no_tensor_core_product_for_turing(code):
    """The reason why several rows are left to torch there: it has to spill besides."""
    assert code[str(TURING)]["tensor cores"] == []
    assert code[str(TURING)]["stack"] > 0


def test_reference_is_torch():
    x, q = problem(5, 64)
    assert torch.equal(product.reference(x, q), x @ q.dequantize().half().T)


@pytest.mark.parametrize(
    ("rung", "tiles", "message"),
    [
        ("gemm", {"BLOCK_N": 48}, "gemm: BLOCK_N is 48, need a power of two"),
        ("gemm", {"BLOCK_M": 8}, "gemm: BLOCK_M is 8, need at least 16"),
        ("gemv", {"BLOCK_K": 8}, "gemv: BLOCK_K is 8, need at least 16"),
        ("gemv", {"SPLIT": 0}, "gemv: SPLIT is 0, need a positive integer"),
        ("gemv", {"UNROLL": 2.0}, "gemv: UNROLL is 2.0, need a positive integer"),
        ("gemv", {"num_warps": 3}, "gemv: num_warps is 3, need a power of two"),
        ("gemm", {"SPLIT": 4}, "gemm: SPLIT is 4, but 300 inputs hold 3 tiles of 128"),
        ("gemm", {"BLOCK_N": 8192}, None),
        ("gemm", {"UNROLL": 1}, "missing or unknown: UNROLL"),
    ],
)
def test_launch_rejects_impossible_tiles(rung, tiles, message):
    x, q = problem(20, 300)
    if message is None:
        blocks = {"BLOCK_M": 16, "BLOCK_N": 8192, "BLOCK_K": 256}
        message = f"gemm: a tile of {blocks} has more than 1048576 elements"
        tiles = tiles | {"BLOCK_K": 256}
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        product.launch(rung, x[:3], integer.packed(q), **tiles)


@given(st.sampled_from(RUNGS), st.integers(1, 9000), st.integers(1, 60000), st.integers(1, 60000))
def test_tiles_of_any_shape_are_possible(rung, rows, outputs, inputs):
    choices = tuning.candidates(rung, rows, outputs, inputs)
    assert choices[0] == tuning.rule(rung, rows, outputs, inputs)
    assert 4 <= len(choices) <= 16
    assert len({tuple(sorted(tiles.items())) for tiles in choices}) == len(choices)
    for tiles in choices:
        tuning.check(rung, tiles, inputs)
    if 1 < rows <= 64:
        assert tuning.rule("gemm", rows, outputs, inputs)["BLOCK_M"] >= rows


@pytest.mark.parametrize("rung", RUNGS)
def test_programs_are_enough_for_a_hundred_multiprocessors(rung):
    for outputs, inputs in [(4096, 4096), (14336, 4096), (4096, 14336), (1024, 4096)]:
        tiles = tuning.rule(rung, 1, outputs, inputs)
        assert math.ceil(outputs / tiles["BLOCK_N"]) * tiles["SPLIT"] >= 100


def test_tuned_json_holds_only_candidates():
    for products in tuning.tuned().values():
        for name, tiles in products.items():
            rung, *sizes = re.fullmatch(r"(\w+) (\d+) x (\d+) x (\d+)", name).groups()
            assert tiles in tuning.candidates(rung, *map(int, sizes))


def test_tiling_gives_a_copy():
    tuning.tiling("gemv", 1, 64, 64, CPU)["SPLIT"] = 99
    assert tuning.tiling("gemv", 1, 64, 64, CPU)["SPLIT"] == 1
