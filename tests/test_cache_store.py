"""Stores of keys and values against formula K of KIVI in numpy, and against being fed otherwise."""

from __future__ import annotations

import hashlib
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qlib import format as named_format
from qlib.cache.buffer import Buffer
from qlib.cache.format import KVFormat
from qlib.cache.names import kv_format
from qlib.cache.packed import Packed
from qlib.cache.store import Store
from qlib.hadamard import hadamard

BATCH, HEADS, DIM = 2, 3, 64
INT4 = kv_format("int4").keys


def heads(tokens: int, seed: int = 0, dim: int = DIM) -> torch.Tensor:
    """Random keys with an offset in every channel, as those of real models have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(BATCH, HEADS, tokens, dim, generator=generator)
    return x + 4 * torch.randn(1, HEADS, 1, dim, generator=generator)


def key_store(name: str, dtype=torch.float16) -> Store:
    form = kv_format(name)
    return Store(form.keys, form.key_axis, form.window, form.sinks, dtype, "layer 3: keys")


def value_store(name: str, dtype=torch.float16) -> Store:
    form = kv_format(name)
    return Store(form.values, form.value_axis, form.window, form.sinks, dtype, "layer 3: values")


def fed(store: Store, x: torch.Tensor, step: int) -> Store:
    for part in x.split(step, dim=2):
        extended(store, part)
    return store


def extended(store: Store, x: torch.Tensor) -> torch.Tensor:
    return store.extend(store.rounded(x))


def contents(store: Store) -> dict[str, bytes]:
    """Every stored tensor as bytes."""
    parts = {"sinks": store.sinks.view, "recent": store.recent.view}
    parts |= store.packed.parts if store.packed else {}
    flat = {name: part.contiguous().view(-1) for name, part in parts.items()}
    return {name: part.view(torch.uint8).numpy().tobytes() for name, part in flat.items()}


# Names, and tokens that leave no part of them empty.
TOKEN_STORES = ["int4", "int3-g24", "int2-w8", "int8-w5-s3", "fp8", "fp8-token", "q8_0", "f16"]
CHANNEL_STORES = ["kivi2-w32", "kivi4-w64-s4", "kivi3-g16-w0", "kivi2-g8-w16-s5"]


@pytest.mark.parametrize("name", TOKEN_STORES + CHANNEL_STORES)
@pytest.mark.parametrize("step", [7, 32, 149])
def test_stored_bytes_do_not_depend_on_how_tokens_arrive(name, step):
    x = heads(149)
    one, other = fed(key_store(name), x, 1), fed(key_store(name), x, step)
    assert contents(one) == contents(other)
    assert len(one) == 149
    assert torch.equal(one.read(), other.read())


@pytest.mark.parametrize("name", TOKEN_STORES + CHANNEL_STORES)
def test_one_changed_number_is_noticed(name):
    x = heads(149)
    changed = x.clone()
    changed[1, 2, 40, 17] += 2.0
    assert contents(fed(key_store(name), x, 7)) != contents(fed(key_store(name), changed, 7))


def kivi_numpy(rows: np.ndarray, bits: int, group: int):
    """KIVI section 2.1 for float32 rows [n, width]: codes, scales and minima, kept as float16."""
    codes, scales, minima = [], [], []
    for row in rows:
        for start in range(0, len(row), group):
            block = row[start : start + group]
            low, high = block.min(), block.max()
            scale = np.float32(np.float16((high - low) / np.float32(2**bits - 1)))
            if high > low and scale == 0:
                scale = np.float32(2.0**-24)
            low = np.float32(np.float16(low))
            steps = (block - low) / scale if scale else np.zeros_like(block)
            codes.append(np.clip(np.rint(steps), 0, 2**bits - 1).astype(np.uint8))
            scales.append(scale)
            minima.append(low)
    return np.concatenate(codes), np.array(scales), np.array(minima)


def unpacked(packed: np.ndarray, bits: int, width: int) -> np.ndarray:
    """Codes of rows of bytes, one little-endian bit stream per row, by numpy alone."""
    stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : width * bits]
    weights = 1 << np.arange(bits)
    return (stream.reshape(len(packed), width, bits) * weights).sum(-1).astype(np.uint8)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_keys_by_channel_equal_the_formula(bits):
    x = heads(96)
    x[0, 1, 32:64, 5] = 3.0
    x[1, 0, :, 9] *= 500
    store = fed(key_store(f"kivi{bits}-w32"), x, 5)
    rows = x.half().float().view(BATCH, HEADS, 3, 32, DIM).transpose(3, 4).reshape(-1, 32).numpy()
    codes, scale, low = kivi_numpy(rows, bits, 32)
    tensor = store.packed.tensor()
    assert tensor.shape == (BATCH * HEADS * 3 * DIM, 32)
    stored = unpacked(tensor.parts["codes"].numpy(), bits, 32).reshape(-1)
    assert np.array_equal(stored, codes)
    assert np.array_equal(tensor.parts["scale"].float().numpy().reshape(-1), scale)
    assert np.array_equal(tensor.parts["offset"].float().numpy().reshape(-1), low)
    values = codes.reshape(-1, 32) * scale[:, None] + low[:, None]
    values = values.reshape(BATCH, HEADS, 3, DIM, 32)
    expected = values.swapaxes(3, 4).reshape(BATCH, HEADS, 96, DIM)
    np.testing.assert_allclose(store.read().numpy(), expected, rtol=1e-6, atol=1e-6)
    # A constant group, for which the published code divides 0 by 0.
    assert (store.read()[0, 1, 32:64, 5] == 3.0).all()


@pytest.mark.parametrize(("bits", "group"), [(2, 32), (4, 32), (3, 24), (4, 17)])
def test_values_by_token_equal_the_formula(bits, group):
    x = heads(11, seed=1)
    x[0, 0, 3], x[1, 2, 4] = 0.0, -2.5
    store = fed(value_store(f"int{bits}-g{group}"), x, 4)
    codes, scale, low = kivi_numpy(x.half().float().view(-1, DIM).numpy(), bits, group)
    parts = store.packed.tensor().parts
    stored = unpacked(parts["codes"].numpy(), bits, DIM).reshape(-1)
    assert np.array_equal(stored, codes)
    assert np.array_equal(parts["scale"].float().numpy().reshape(-1), scale)
    assert np.array_equal(parts["offset"].float().numpy().reshape(-1), low)


def test_keys_by_token_do_not_equal_the_formula_by_channel():
    """The axis matters: the same numbers, cut the other way, have other codes."""
    x = heads(32)
    rows = x.half().float().transpose(2, 3).reshape(-1, 32).numpy()
    codes = kivi_numpy(rows, 2, 32)[0]
    stored = fed(key_store("int2-g32"), x, 32).packed.tensor().parts["codes"].numpy()
    assert not np.array_equal(unpacked(stored, 2, DIM).reshape(-1), codes)


@pytest.mark.parametrize(
    ("name", "numpy_type"), [("fp8", ml_dtypes.float8_e4m3fn), ("fp8-e5m2", ml_dtypes.float8_e5m2)]
)
def test_static_fp8_equals_ml_dtypes(name, numpy_type):
    x = heads(9) * 3
    store = fed(key_store(name), x, 4)
    codes = x.half().numpy().astype(numpy_type)
    stored = store.packed.parts["codes"].numpy()
    assert np.array_equal(stored, codes.view(np.uint8))
    assert np.array_equal(store.read().numpy(), codes.astype(np.float32))
    assert not np.array_equal(stored ^ 1, codes.view(np.uint8))


def test_static_fp8_saturates():
    x = torch.full((1, 1, 1, 64), 1000.0)
    assert (fed(key_store("fp8"), x, 1).read() == 448).all()


@pytest.mark.parametrize("name", ["kivi2-w32-s4", "int4-w5-s4", "int4"])
def test_packed_tokens_are_never_touched_again(name):
    x, store = heads(200), key_store(name)
    seen: dict[tuple[str, int], str] = {}
    for part in x.split(3, dim=2):
        extended(store, part)
        for key, part in store.packed.parts.items():
            for unit in range(part.shape[2]):
                found = hashlib.sha1(part[:, :, unit].contiguous().numpy().tobytes()).hexdigest()
                assert seen.setdefault((key, unit), found) == found
    assert len(seen) >= 3 * 6
    store.packed.parts["codes"][0, 0, 2] ^= 1
    tampered = store.packed.parts["codes"][:, :, 2].contiguous().numpy().tobytes()
    assert seen["codes", 2] != hashlib.sha1(tampered).hexdigest()


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 300])
def test_kivi_keys_empty_their_window_and_values_slide(tokens):
    keys, values = (fed(store("kivi4"), heads(tokens), 1) for store in (key_store, value_store))
    assert len(keys.packed) == tokens // 128 * 128
    assert len(keys.recent) == tokens % 128
    assert len(values.recent) == min(tokens, 128)
    assert len(values.packed) == max(0, tokens - 128)


def test_sinks_and_window_are_exact_and_the_rest_is_not():
    x = heads(50)
    store = fed(key_store("int2-w6-s3"), x, 8)
    exact = (store.read() == x.half()).all(-1).all(0).all(0)
    assert exact.nonzero().flatten().tolist() == [0, 1, 2, 44, 45, 46, 47, 48, 49]


def test_a_group_is_read_in_full_precision_by_those_who_complete_it():
    x, store = heads(32), key_store("kivi2-w32")
    assert torch.equal(extended(store, x[:, :, :31]), x[:, :, :31].half())
    assert torch.equal(extended(store, x[:, :, 31:]), x.half())
    assert not torch.equal(store.read(), x.half())
    assert len(store.packed) == 32


@pytest.mark.parametrize(
    ("name", "bits", "full"),
    [
        ("kivi2-w64", 3, 130 % 64), ("kivi4", 5, 2), ("int4", 5, 0), ("int4-g16-w10", 6, 10),
        ("int8-g64-s4", 8.5, 4), ("fp8", 8, 0), ("fp8-token", 8.5, 0), ("q8_0", 8.5, 0),
        ("f16", 16, 0), ("turbo4", 4.25, 0), ("polar", 3.875, 0),
    ],
)  # fmt: skip
def test_bytes_equal_the_formula_and_the_parts(name, bits, full):
    store = fed(key_store(name), heads(130), 9)
    values = BATCH * HEADS * DIM
    assert store.nbytes == values * ((130 - full) * bits + full * 16) / 8
    assert store.nbytes == sum(map(len, contents(store).values()))
    assert kv_format(name).bits(DIM)[0] == bits
    extended(store, heads(1))
    assert store.nbytes != values * ((130 - full) * bits + full * 16) / 8


class Writes(TorchDispatchMode):
    """Counts the elements that torch operations write into tensors that exist or are made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("copy_", "cat", "clone", "_to_copy"):
            self.elements += result.numel()
        return result


def written(append, tokens: int) -> int:
    with Writes() as writes:
        for _ in range(tokens):
            append()
    return writes.elements


def test_a_buffer_copies_less_than_three_times_what_it_gets():
    one = torch.ones(1, 2, 1, 8)
    buffer = Buffer(one)
    assert 4096 * 16 <= written(lambda: buffer.append(one), 4096) < 3 * 4096 * 16
    past = [one]
    naive = written(lambda: past.append(torch.cat((past.pop(), one), dim=2)), 512)
    assert naive > 100 * 512 * 16


def test_a_sliding_buffer_copies_less_than_three_times_what_it_gets():
    one = torch.ones(1, 2, 1, 8)
    buffer = Buffer(one)
    buffer.append(one.expand(1, 2, 100, 8))

    def slide():
        buffer.append(one)
        buffer.drop(1)

    assert written(slide, 4096) < 3 * 4096 * 16
    assert buffer.data.shape[2] <= 202


@pytest.mark.parametrize("name", ["int4", "kivi4-w32", "int4-w40-s4"])
def test_appending_costs_the_same_however_long_the_past(name):
    store, one = key_store(name), heads(1)
    store.append(store.rounded(one))
    start = written(lambda: store.append(store.rounded(one)), 255)
    later = [written(lambda: store.append(store.rounded(one)), 256) for _ in range(3)]
    # The buffers double twice: what is copied then is no more than what is stored.
    assert sum(later) < 3 * 1.6 * start


def test_a_buffer_keeps_its_content_through_growth_and_compaction():
    generator = torch.Generator().manual_seed(0)
    buffer, expected, counter = Buffer(torch.zeros(1, 1, 1, 1)), [], 0
    for _ in range(400):
        n, gone = torch.randint(0, 9, (2,), generator=generator).tolist()
        new = list(range(counter, counter + n))
        buffer.append(torch.tensor(new, dtype=torch.float32).view(1, 1, -1, 1))
        expected, counter = expected + new, counter + n
        gone = min(gone, len(expected))
        buffer.drop(gone)
        expected = expected[gone:]
        assert buffer.view.flatten().tolist() == expected
        assert len(buffer) == len(expected)
        assert buffer.nbytes == 4 * len(expected)


def test_what_a_head_stores_is_contiguous():
    store = fed(key_store("kivi4-w32"), heads(70), 7)
    codes = store.packed.parts["codes"]
    assert codes.shape == (BATCH, HEADS, 2, DIM, 16)
    assert codes[1, 2].is_contiguous()
    values = fed(value_store("int4"), heads(70), 7).packed.parts["codes"]
    assert values.shape == (BATCH, HEADS, 70, DIM // 2)
    assert values[1, 2].is_contiguous()


def test_a_store_keeps_nothing_alive_and_no_graph():
    x = heads(10).requires_grad_()
    store = fed(key_store("f16", dtype=None), x, 5)
    assert not store.read().requires_grad
    assert store.recent.view.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_a_store_of_inference_mode_goes_on_outside_of_it():
    store, x = key_store("kivi2-w32"), heads(80)
    with torch.inference_mode():
        fed(store, x[:, :, :50], 5)
    fed(store, x[:, :, 50:], 5)
    assert contents(store) == contents(fed(key_store("kivi2-w32"), x, 1))


@pytest.mark.parametrize("name", ["kivi2-w32-s2", "int4-w3", "f16", "turbo2-qjl"])
def test_selected_sequences_go_on_by_themselves(name):
    x = heads(70)
    store = fed(key_store(name), x[:, :, :40], 8)
    store.select(torch.tensor([1, 1, 0]))
    fed(store, x[[1, 1, 0]][:, :, 40:], 8)
    assert contents(store) == contents(fed(key_store(name), x[[1, 1, 0]], 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_arriving_dtypes(dtype):
    x = heads(40).half().to(dtype)
    store = fed(key_store("int4", dtype=None), x, 8)
    reference = fed(key_store("int4", dtype=torch.float32), x, 8)
    assert contents(store)["codes"] == contents(reference)["codes"]


def refusal(message: str):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}$")


def test_values_that_cannot_be_stored_are_refused():
    x = heads(5)
    x[0, 1, 2, 3:5] = torch.tensor([float("nan"), float("inf")])
    with refusal("layer 3: keys [2, 3, 5, 64] hold 2 NaN or infinite values"):
        extended(key_store("int4"), x)
    with refusal("layer 3: values [2, 3, 5, 64] hold 2 NaN or infinite values"):
        extended(value_store("kivi2"), x)
    with refusal("layer 3: keys: a value of 7e+04 overflows float16; use dtype=torch.float32"):
        extended(key_store("f16"), torch.full((1, 1, 1, 8), 7e4))
    # Full precision keeps what it gets, and the logits show it.
    assert extended(key_store("f16", dtype=None), x).isnan().sum() == 1


def test_other_shapes_are_refused():
    store = fed(key_store("int4"), heads(5), 5)
    message = "layer 3: keys [2, 3, 1, 32] do not continue a cache of [2, 3, 'n', 64]"
    with refusal(message):
        extended(store, heads(1, dim=32))
    with pytest.raises(ValueError, match="do not continue"):
        extended(store, heads(1)[:1])
    assert len(store) == 5


def test_formats_whose_rows_share_a_scale_are_refused():
    nvfp4 = named_format("nvfp4")
    store = Store(nvfp4, "token", 0, 0, torch.float16, "layer 0: keys")
    message = f"layer 0: keys: {nvfp4}: all rows share 'scale.scale', so tokens cannot be added"
    with refusal(message):
        extended(store, heads(1))


def test_what_all_rows_share_is_kept_once():
    """A learned grid is stored with every tensor; a cache has it once."""
    from qlib import Scheme, fit
    from qlib.grid import Grid

    learned = Scheme(Grid("mine", torch.tensor([-1.0, -0.2, 0.3, 1.0])), "row", fit.absmax)
    packed = Packed(learned, "token", heads(1))
    packed.append(packed.rounded(heads(10)))
    packed.append(packed.rounded(heads(10, seed=1)))
    assert packed.nbytes == 20 * BATCH * HEADS * (DIM // 4 + 2) + 16
    expected = learned.quantize(heads(10, seed=1)).dequantize()
    assert torch.equal(packed.read()[:, :, 10:], expected)
    assert KVFormat(learned, learned).bits(DIM) == (2.25, 2.25)


def test_no_tokens_change_nothing():
    store = key_store("kivi2-w32-s2")
    assert extended(store, heads(0)).shape == (BATCH, HEADS, 0, DIM)
    fed(store, heads(40), 9)
    before = contents(store)
    extended(store, heads(0))
    assert contents(store) == before


def test_a_refusal_leaves_a_store_as_it_was():
    x = heads(5)
    bad = x.clone()
    bad[0, 0, 0, 0] = float("nan")
    store = key_store("int4-s2")
    for part in (x[:, :, :3], bad, x[:, :, 3:]):
        try:
            store.append(store.rounded(part))
        except ValueError:
            assert part is bad
    assert contents(store) == contents(fed(key_store("int4-s2"), x, 5))


def test_a_refused_rounding_takes_no_tokens():
    """Sinks and a window have been given what cannot be packed in the end."""
    x, store = heads(12), key_store("turbo4-w8-s2")
    extended(store, x[:, :, :10])
    before = contents(store)
    message = "layer 3: keys: a norm of 2.4e+05 overflows float16; store it as torch.float32"
    with refusal(message):
        store.rounded(torch.full((BATCH, HEADS, 9, DIM), 3e4))
    assert contents(store) == before
    assert [len(part) for part in (store.sinks, store.packed, store.recent)] == [2, 0, 8]
    extended(store, x[:, :, 10:])
    assert contents(store) == contents(fed(key_store("turbo4-w8-s2"), x, 5))


@pytest.mark.parametrize("name", ["kivi2-w32-s2", "int4-w3", "f16"])
def test_a_store_goes_on_where_a_selection_in_inference_mode_left_it(name):
    x, store, rows = heads(80), key_store(name), torch.tensor([1, 0])
    with torch.inference_mode():
        fed(store, x[:, :, :50], 5)
        store.select(rows)
    fed(store, x[rows][:, :, 50:], 5)
    assert contents(store) == contents(fed(key_store(name), x[rows], 5))


def test_a_selection_copies_what_is_in_use():
    buffer, x = Buffer(torch.zeros(2, 1, 1, 1)), torch.arange(2.0 * 65).view(2, 1, 65, 1)
    for part in x.split(1, dim=2):
        buffer.append(part)
    buffer.drop(5)
    assert buffer.data.shape[2] > 65
    buffer.select(torch.tensor([1, 1, 0]))
    assert buffer.data.shape == (3, 1, 60, 1)
    assert torch.equal(buffer.view, x[[1, 1, 0]][:, :, 5:])


@pytest.mark.parametrize("window", [1, 33, 100])
def test_a_window_reserves_at_most_twice_its_tokens(window):
    store = key_store(f"int8-w{window}")
    for part in heads(7 * window + 5).split(1, dim=2):
        store.append(store.rounded(part))
    assert len(store.recent) == window
    assert store.recent.data.shape[2] <= 2 * window
    codes = store.packed.buffers["codes"]
    assert len(codes) <= codes.data.shape[2] <= 2 * len(codes)


@pytest.mark.parametrize("name", ["f16", "int4-w8"])
def test_the_first_tokens_fix_the_dtype(name):
    x, store = heads(9), key_store(name, dtype=None)
    extended(store, x[:, :, :4].half())
    with refusal("layer 3: keys: a value of 1e+05 overflows float16; use dtype=torch.float32"):
        store.rounded(torch.full((BATCH, HEADS, 1, DIM), 1e5))
    extended(store, x[:, :, 4:])
    assert contents(store) == contents(fed(key_store(name), x, 9))


def rotated_store(dtype) -> Store:
    return Store(INT4, "token", 4, 0, dtype, "layer 3: keys", rotate=True)


@pytest.mark.parametrize("arriving", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, None])
def test_rotated_tokens_are_rounded_once(arriving, stored):
    x = heads(20).to(arriving)
    plain = Store(INT4, "token", 4, 0, stored or arriving, "layer 3: keys")
    found = contents(fed(rotated_store(stored), x, 3))
    assert found == contents(fed(plain, hadamard(x.float()), 3))
    once = contents(fed(key_store("int4-w4", stored or arriving), hadamard(x.float()), 20))
    twice = contents(fed(key_store("int4-w4", stored or arriving), hadamard(x), 20))
    assert found == once
    # Of two roundings to one dtype the second changes nothing.
    assert (once == twice) == (arriving in (torch.float32, stored or arriving))


@pytest.mark.parametrize(
    ("arriving", "worst"), [(torch.float16, "4.8e+05"), (torch.bfloat16, "4.79e+05")]
)
def test_a_rotation_that_overflows_does_not_blame_the_keys(arriving, worst):
    x = torch.full((1, 1, 1, DIM), 6e4, dtype=arriving)
    with refusal(f"layer 3: keys: a value of {worst} overflows float16; use dtype=torch.float32"):
        rotated_store(torch.float16).rounded(x)
    assert len(fed(rotated_store(torch.float32), x.float().div(20), 1)) == 1
