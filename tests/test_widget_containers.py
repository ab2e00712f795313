"""The widget "one weight in six containers": positions by the formats' formulas, values by ours."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from node import run

from qlib.files import bnb
from qlib.qtensor import QTensor
from qlib.widgets import containers
from qlib.widgets.containers import INT4, KINDS, Containers, container, moved, starts, traced

SCRIPT = Path(containers.__file__).with_suffix(".js").read_text(encoding="utf-8")
N, K, G = 8, 64, 32
ROWS, COLUMNS = (x.ravel() for x in np.divmod(np.arange(N * K), K))
GROUP_ROWS, GROUPS = (x.ravel() for x in np.divmod(np.arange(N * K // G), K // G))
AWQ_PLACE = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])


def weight(seed: int = 0) -> torch.Tensor:
    """Gaussian, with a block of zeros, an outlier and exact ties."""
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed))
    w[0, :32], w[1, 3], w[2] = 0, 40.0, (w[2] * 2).round() / 2
    return w


def gptq(n, k, g):
    return 32 * (k // 8 * N + n) + 4 * (k % 8), 16 * (g[1] * N + g[0]), 32 * g[1] + 4 * g[0]


def awq(n, k, g):
    return 32 * k + 4 * AWQ_PLACE[n], 16 * (g[1] * N + g[0]), 32 * g[1] + 4 * AWQ_PLACE[g[0]]


def stream(n, k, g):
    return 4 * (n * K + k), 16 * (g[0] * K // G + g[1]), 16 * (g[0] * K // G + g[1])


def q4_0(n, k, g):
    block = 18 * 8 * (n * K // 32 + k // 32)
    return block + 16 + 8 * (k % 16) + 4 * (k % 32 // 16), 18 * 8 * (g[0] * K // 32 + g[1]), None


def nf4(n, k, g):
    i = n * K + k
    return 8 * (i // 2) + 4 * (1 - i % 2), 32 * np.arange(N), None


# Formula, and the tensors of code, scale and zero point.
FORMULAS = {
    "GPTQ": (gptq, ("qweight", "scales", "qzeros")),
    "AWQ": (awq, ("qweight", "scales", "qzeros")),
    "compressed-tensors": (stream, ("weight_packed", "weight_scale", None)),
    "MLX": (stream, ("weight", "scales", "biases")),
    "GGUF Q4_0": (q4_0, ("blocks", "blocks", None)),
    "bitsandbytes NF4": (nf4, ("weight", "weight.absmax", None)),
}


def expected(name: str, data: dict) -> list:
    """The positions of codes, scales and zero points by the formulas of the formats."""
    formula, tensors = FORMULAS[name]
    first = {field: 8 * start for field, _, start, _ in data["fields"]}
    found = formula(ROWS, COLUMNS, (GROUP_ROWS, GROUPS))
    return [
        None if tensor is None else (first[tensor] + places).tolist()
        for tensor, places in zip(tensors, found)
    ]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_positions_follow_the_formulas(name, seed):
    data = container(name, weight(seed))
    found = [data[key] for key in ("code", "scale", "zero")]
    assert found == expected(name, data)
    assert sorted(data["code"]) == sorted(set(data["code"]))
    # The twin: another order of the same nibbles.
    other = "compressed-tensors" if name == "AWQ" else "AWQ"
    assert data["code"] != expected(other, container(other, weight(seed)))[0]


def test_a_container_that_stores_another_order_is_traced_to_it():
    def store(q: QTensor) -> dict[str, torch.Tensor]:
        return {"weight": bnb.swapped(q.parts["codes"])}

    q = INT4.quantize(weight())
    places = starts(moved(store, q, "codes", 4), 4)
    assert places[:4] == [4, 0, 12, 8]
    assert places != container("MLX", weight())["code"]


def test_a_number_that_is_stored_twice_is_refused():
    def store(q: QTensor) -> dict[str, torch.Tensor]:
        return {"weight": q.parts["codes"], "again": q.parts["codes"]}

    follows = moved(store, INT4.quantize(weight()), "codes", 4)
    with pytest.raises(ValueError, match=r"^a number is stored in more than one run of 4 bits$"):
        starts(follows, 4)


def test_bits_that_follow_nothing():
    found = traced(lambda chosen: {"a": torch.tensor([7, *np.packbits(chosen)])}, 8)
    assert (found[:64] == -1).all()
    assert sorted(found[found >= 0]) == list(range(8))


def page(data: dict, script: str = SCRIPT) -> torch.Tensor:
    return torch.tensor(run(script, f"c => decode(c, {K})", data)).view(N, K)


def ours(name: str, seed: int = 0) -> torch.Tensor:
    return KINDS[name][0].quantize(weight(seed)).dequantize()


@pytest.mark.parametrize("name", KINDS)
def test_the_page_computes_the_values_of_the_library(name):
    data, values = container(name, weight()), ours(name)
    assert torch.equal(page(data), values)
    for key in ("code", "scale", "zero"):
        if data[key] is not None:
            at = data[key][-1] // 8
            raw = bytearray.fromhex(data["bytes"])
            raw[at] ^= 0x11
            assert not torch.equal(page(data | {"bytes": raw.hex()}), values)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("GPTQ", "raw + rule.less & 15", "raw & 15"),
        ("GPTQ", "32 * column", "32 * (column ^ 32)"),
        ("MLX", "code * scale + bias", "code * scale - bias"),
        ("GGUF Q4_0", "rule.known;", "7;"),
        ("AWQ", "bytes[bit >> 3] >> (bit & 7)", "bytes[bit >> 3] >> (bit & 7 ^ 4)"),
        ("bitsandbytes NF4", "Math.fround(entry * scale)", "entry * scale * (1 + 2 ** -22)"),
        ("bitsandbytes NF4", "[23, 127]", "[23, 126]"),
        ("compressed-tensors", "(exponent && one)", "one * !exponent"),
    ],
)
def test_a_script_with_one_mistake_is_found(name, right, wrong):
    assert SCRIPT.count(right) == 1
    assert not torch.equal(
        page(container(name, weight()), SCRIPT.replace(right, wrong)), ours(name)
    )


@pytest.mark.parametrize("width", [16, 32])
def test_floats_of_every_kind(width):
    kinds = {16: (np.uint16, "<f2", 0x7BFF), 32: (np.uint32, "<f4", 0x7F7FFFFF)}
    unsigned, floating, top = kinds[width]
    draw = np.random.default_rng(0).integers(0, top, 200).tolist()
    codes = np.array([0, 1, 2, top, *draw], unsigned)
    codes = np.concatenate([codes, codes | unsigned(1 << width - 1)])
    expression = "all => all.map(b => float(b, 0, WIDTH))".replace("WIDTH", str(width))
    found = run(SCRIPT, expression, [list(code.tobytes()) for code in codes])
    assert np.array_equal(np.array(found, float), codes.view(floating).astype(float))


def test_what_the_containers_hold():
    state = Containers(weight(), 2, 37).get_state()
    assert (state["shape"], state["at"], state["chosen"]) == ([8, 64], 2 * 64 + 37, 0)
    sizes = {c["name"]: len(c["bytes"]) // 2 for c in state["containers"]}
    assert sizes == {
        "GPTQ": 256 + 8 + 32 + 256,
        "AWQ": 256 + 8 + 32,
        "compressed-tensors": 256 + 32 + 16,
        "MLX": 256 + 32 + 32,
        "GGUF Q4_0": 16 * 18,
        "bitsandbytes NF4": 256 + 64 + 76 + 32,
    }
    assert repr(Containers(weight())) == "<Containers: interactive figure>"


def test_symmetric_zero_points_are_eight():
    """As GPTQ and AWQ store them, and as MLX multiplies them out."""
    values = {name: container(name, weight()) for name in ("GPTQ", "AWQ", "MLX")}
    raw = {name: bytes.fromhex(data["bytes"]) for name, data in values.items()}
    for name, nibble in (("GPTQ", 7), ("AWQ", 8)):
        assert {raw[name][at // 8] >> at % 8 & 15 for at in values[name]["zero"]} == {nibble}
    scale, bias = (
        np.array([np.frombuffer(raw["MLX"], "<f2", 1, at // 8)[0] for at in values["MLX"][key]])
        for key in ("scale", "zero")
    )
    assert np.array_equal(bias, -8 * scale)


@pytest.mark.parametrize("shape", [(8, 32), (16, 64), (512,)])
def test_other_shapes_are_refused(shape):
    message = f"the containers widget shows a weight [8, 64], got {list(shape)}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Containers(torch.zeros(shape))


@pytest.mark.parametrize(("row", "column"), [(8, 0), (0, 64), (-1, 0), (0, -1)])
def test_a_weight_that_is_not_there(row, column):
    message = f"no weight [{row}, {column}] in [8, 64], counted from 0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Containers(weight(), row, column)


def test_the_script_and_the_data_are_small_and_ask_no_other_host():
    state = Containers(weight()).get_state()
    assert len(json.dumps([state["shape"], state["containers"]])) < 50_000
    assert len(SCRIPT.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.|import\s|fetch\(|innerHTML", SCRIPT)
    assert SCRIPT.endswith("export default { render };\n")
