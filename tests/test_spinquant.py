"""Steps stay orthogonal, the loss falls, and the merged model is the one that was learned on."""

from __future__ import annotations

import copy
import importlib

import numpy as np
import pytest
import torch
from test_rotate import change, in_float64, logits, prepared, raises
from tiny_models import MODELS, huggingface, tiny_decoder, tokens

from qlib.activations import inputs
from qlib.calibrate import Calibration
from qlib.methods.rotate import rotate
from qlib.methods.spinquant import cayley_step, spinquant, straight_through
from qlib.model import Config, Decoder
from qlib.recipe import quantize_model, quantized
from qlib.rules import Recipe
from qlib.transform import Hadamard

# The package has a function of this name.
spinning = importlib.import_module("qlib.methods.spinquant")

A4 = Recipe(None, activations="int4-row")


def orthogonal(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(*shape, generator=generator, dtype=dtype)).Q


def calibration(seed: int = 5) -> Calibration:
    return Calibration.of(tokens(512, seed), context=32)


def planted() -> Decoder:
    """Every token has the same large part along a direction that the first R1 makes one channel."""
    config = Config(61, 32, 48, 2, 4, 2, 8, max_position_embeddings=64)
    model = Decoder(config).normal_init(0.3, torch.Generator().manual_seed(0)).requires_grad_(False)
    direction = Hadamard.random(32, 0).input(torch.eye(32))[:, 3]
    model.model.embed_tokens.weight += 8 * direction
    return model


def step_in_numpy(matrix, gradient, angle):
    skew = (gradient @ matrix.T - matrix @ gradient.T) / 2
    skew *= np.tan(angle / 2) / np.abs(np.linalg.eigvals(skew)).max()
    identity = np.eye(len(skew))
    return np.linalg.inv(identity + skew) @ (identity - skew) @ matrix


@pytest.mark.parametrize("n", [2, 5, 36])
def test_step_is_the_cayley_transform(n):
    matrices, gradients = orthogonal(3, n, n), orthogonal(3, n, n, seed=1) * 7
    found = cayley_step(matrices, gradients, 0.3).numpy()
    for one, matrix, gradient in zip(found, matrices.numpy(), gradients.numpy()):
        np.testing.assert_allclose(one, step_in_numpy(matrix, gradient, 0.3), atol=1e-12)
        assert np.abs(one - step_in_numpy(matrix, gradient, 0.31)).max() > 1e-4


@pytest.mark.parametrize("angle", [0.02, 1.5])
def test_step_turns_by_its_angle(angle):
    matrices = orthogonal(2, 36, 36)
    turned = cayley_step(matrices, orthogonal(2, 36, 36, seed=1), angle) @ matrices.mT
    angles = torch.linalg.eigvals(turned).angle().amax(-1)
    torch.testing.assert_close(angles, torch.full((2,), angle, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_two_hundred_steps_stay_orthogonal(dtype, bound):
    matrix, straight = (orthogonal(32, 32, dtype=dtype) for _ in range(2))
    target = orthogonal(32, 32, seed=1, dtype=dtype)
    start = (matrix - target).norm()
    for _ in range(200):
        matrix = cayley_step(matrix, matrix - target, 0.05)
        straight = straight - 0.05 * (straight - target)
    identity = torch.eye(32, dtype=dtype)
    assert (matrix.mT @ matrix - identity).abs().max() < bound
    # Descent that ignores the manifold leaves it on its way, here after one step.
    once = orthogonal(32, 32, dtype=dtype)
    once = once - 0.05 * (once - target)
    assert (once.mT @ once - identity).abs().max() > 100 * bound
    assert (matrix - target).norm() < start


def test_no_gradient_is_no_step():
    matrix = orthogonal(2, 4, 4)
    assert torch.equal(cayley_step(matrix, torch.zeros_like(matrix), 0.1).round(decimals=12),
                       matrix.round(decimals=12))  # fmt: skip


@pytest.mark.parametrize("name", ["int4-row", "int4-row-asym", "int8-row", "mxfp4", "int4-g16"])
def test_straight_through_has_the_values_of_the_inputs(name):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    x[0, 0], x[1, 1, 7] = 0.0, 50.0
    expected = inputs(name).rounded(x.view(-1, 32)).view(x.shape)
    torch.testing.assert_close(straight_through(x, inputs(name)), expected, atol=1e-6, rtol=1e-6)
    other = inputs("int3-row").rounded(x.view(-1, 32)).view(x.shape)
    assert (straight_through(x, inputs(name)) - other).abs().max() > 1e-2


def test_straight_through_moves_the_error_with_the_scale():
    x = torch.tensor([[0.3, -2.0, 1.1, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    (straight_through(x, inputs("int4-row")) * weights).sum().backward()
    error = (inputs("int4-row").rounded(x.detach()) - x.detach()).numpy()
    expected = weights.numpy().copy()
    # The largest |x| is -2.
    expected[0, 1] -= (error[0] * weights[0].numpy()).sum() / 2
    np.testing.assert_allclose(x.grad.numpy(), expected, rtol=1e-5)
    assert abs(expected[0, 1] - 2.0) > 0.01


@pytest.mark.parametrize("down", [True, False])
@pytest.mark.parametrize("name", ["own-tied", "llama", "qwen2"])
def test_what_is_learned_on_is_the_merged_model(name, down):
    model = prepared(MODELS[name](), torch.float64)
    rotate(model, values=False, down=False, residual_matrix=torch.eye(32))
    recipe = Recipe(None, activations="int8-row")
    stream, heads = orthogonal(32, 32), orthogonal(2, 8, 8, seed=1)
    merged = copy.deepcopy(model)
    rotate(merged, down=down, residual_matrix=stream, value_matrices=heads)
    quantize_model(merged, recipe)
    in_float64(merged), in_float64(model)
    places = spinning._places(model, recipe)
    full = logits(model)
    with spinning._rounding(model, places, stream, heads, down):
        found = logits(model)
    error = (full - found).abs().max()
    assert (logits(merged) - found).abs().max() < 1e-3 * error
    with spinning._rounding(model, places, stream, heads.flip(0), down):
        assert (logits(merged) - logits(model)).abs().max() > 0.1 * error
    assert torch.equal(logits(model), full)


def test_learned_beats_random_on_a_planted_outlier():
    original = planted()
    learned = copy.deepcopy(original)
    losses = spinquant(learned, A4, calibration(), steps=30)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert change(learned, original) < 1e-4
    fresh = tokens(34, seed=9).view(2, 17)
    expected, errors = original(fresh).log_softmax(-1), []
    for model in (learned, rotate(copy.deepcopy(original))):
        with quantized(model, A4):
            found = model(fresh).log_softmax(-1)
        errors.append((expected.exp() * (expected - found)).sum(-1).mean().item())
    assert errors[0] < 0.5 * errors[1]


def test_cross_entropy_falls():
    losses = spinquant(planted(), A4, calibration(), steps=16, batch=8, loss="cross-entropy")
    assert sum(losses[-4:]) < sum(losses[:4]) - 0.01


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
def test_hugging_face_models(family):
    model = prepared(huggingface(family, head_dim=8) if family == "Qwen3" else huggingface(family))
    before = copy.deepcopy(model)
    assert len(spinquant(model, "w4a4", calibration(), steps=3)) == 3
    assert change(model, before) < 1e-4
    quantize_model(model, "int8-row")
    assert change(model, before) < 0.5


def test_first_step_is_the_randomly_rotated_model():
    """The loss before anything is learned is that of what `rotate` makes with the same seed."""
    original = planted()
    data = calibration()
    (loss,) = spinquant(copy.deepcopy(original), A4, data, steps=1, seed=3)
    random = rotate(copy.deepcopy(original), seed=3)
    window = next(data.batches(2))
    with quantized(random, A4):
        found = random(window).log_softmax(-1)
    expected = original(window).log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
    assert loss == pytest.approx(kl, rel=0.02)
    (other,) = spinquant(copy.deepcopy(original), A4, data, steps=1, seed=4)
    assert other != pytest.approx(kl, rel=0.02)


def test_same_call_same_result():
    models = [tiny_decoder() for _ in range(2)]
    first, second = (spinquant(model, A4, calibration(), steps=3) for model in models)
    assert first == second
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_only_what_the_recipe_quantizes_is_rounded():
    recipe = Recipe(None, activation_rules=(("*.1.self_attn.o_proj", "int4-row"),))
    places = spinning._places(tiny_decoder(), recipe)
    assert [list(found) for found in places] == [[], ["self_attn.o_proj"]]
    assert len(spinquant(tiny_decoder(), recipe, calibration(), steps=2)) == 2


@pytest.mark.parametrize(
    ("hidden", "inner", "head", "size"), [(32, 188, 8, 188), (32, 48, 30, 30), (30, 48, 8, 30)]
)
def test_sizes_without_a_hadamard_matrix_leave_the_model_as_it_is(hidden, inner, head, size):
    config = Config(61, hidden, inner, 2, 2, 2, head, max_position_embeddings=64)
    model = prepared(Decoder(config).normal_init(0.3, torch.Generator().manual_seed(0)))
    before = copy.deepcopy(model.state_dict())
    message = f"^no construction of a Hadamard matrix of size {size} is known here: "
    with pytest.raises(ValueError, match=message):
        spinquant(model, A4, calibration(), steps=1, progress=False)
    assert model.config == config
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_down_projection_that_stays_may_have_any_size():
    config = Config(61, 32, 188, 2, 4, 2, 8, max_position_embeddings=64)
    model = prepared(Decoder(config).normal_init(0.3, torch.Generator().manual_seed(0)))
    found = copy.deepcopy(model)
    spinquant(found, A4, calibration(), steps=1, down=False, progress=False)
    assert change(found, model) < 1e-4


def test_refusals():
    data = calibration()
    with raises("no learned rotation reaches activations that the recipe quantizes"):
        spinquant(tiny_decoder(), "int4-g16", data)
    with raises("no learned rotation reaches activations that the recipe quantizes"):
        rules = (("*.down_proj", "int4-row"),)
        spinquant(tiny_decoder(), Recipe(None, activation_rules=rules), data)
    with raises(
        "activations int8, block tensor, absmax, scale float16, static: "
        "learn rotations with dynamic ones"
    ):
        spinquant(tiny_decoder(), Recipe(None, activations="int8-tensor-static"), data)
    with raises(
        "model.layers.0: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj read the same: "
        "give them the same activations"
    ):
        rules = (("*.v_proj", "int8-row"),)
        spinquant(tiny_decoder(), Recipe(None, (), "rtn", "int4-row", rules), data)
    for options in ({"steps": 0}, {"batch": 0}, {"loss": "mse"}):
        given = {"steps": 40, "batch": 2, "loss": "kl"} | options
        with raises(
            "need steps >= 1, batch >= 1 and a loss of kl, cross-entropy; "
            "got steps={steps}, batch={batch}, loss={loss!r}".format(**given)
        ):
            spinquant(tiny_decoder(), A4, data, **options)
    with raises("GPTNeoXForCausalLM has no gpt_neox.embed_tokens: rotations need blocks of Llama"):
        spinquant(MODELS["gpt-neox"](), A4, data)
