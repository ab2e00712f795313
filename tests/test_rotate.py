"""A rotated model computes the same function with other weights, on every architecture or not."""

from __future__ import annotations

import copy
import importlib
import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_models import CALIBRATED, MODELS, huggingface, raises, tiny_decoder, tokens
from torch import nn

import qlib
from qlib.cache import through_cache
from qlib.calibrate import Calibration
from qlib.linear import DenseLinear, QLinear
from qlib.methods.rotate import rotate
from qlib.model import Config, Decoder
from qlib.recipe import quantize_model
from qlib.rules import Recipe
from qlib.transform import Hadamard

# The package has a function of this name.
rotating = importlib.import_module("qlib.methods.rotate")

# Mistral's heads are wider than its stream divided by their number; Llama has all its biases here.
ROTATED = {
    "own-tied": tiny_decoder,
    "own-untied": lambda: tiny_decoder(tied=False),
    "own-qwen2": lambda: own(model_type="qwen2"),
    "llama": lambda: huggingface("Llama", tie_word_embeddings=False),
    "llama-tied": lambda: huggingface("Llama", tie_word_embeddings=True),
    "llama-biases": lambda: huggingface("Llama", attention_bias=True, mlp_bias=True),
    "mistral": lambda: huggingface("Mistral", head_dim=16),
    "qwen2": MODELS["qwen2"],
    "qwen3": CALIBRATED["qwen3"],
    "gemma": CALIBRATED["gemma"],
}
PARTS = [
    {"residual": True, "values": False, "down": False},
    {"residual": False, "values": True, "down": False},
    {"residual": False, "values": False, "down": True},
    {},
]


def own(**options) -> Decoder:
    config = Config(61, 32, 48, 2, 4, 2, 8, max_position_embeddings=64, **options)
    return Decoder(config).normal_init(0.3, torch.Generator().manual_seed(0)).requires_grad_(False)


def prepared(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model in `dtype`, with gains and biases far from 1 and 0 and norms that keep float64."""
    model = copy.deepcopy(model).to(dtype)
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.uniform_(0.3, 1.7, generator=generator)
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """Norms compute in float32 whatever they are given; these do not."""

    def exact(norm: nn.Module, offset: int):
        eps = getattr(norm, "eps", None) or norm.variance_epsilon

        def forward(x):
            return (norm.weight + offset) * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()

        return forward

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = exact(module, type(module).__name__.startswith("Gemma"))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens(34).view(2, 17))
    return getattr(found, "logits", found)


def change(after: nn.Module, before: nn.Module) -> float:
    """The largest difference of logits, relative to the largest logit."""
    old = logits(before)
    return ((logits(after) - old).abs().max() / old.abs().max()).item()


def rotated(model: nn.Module, **options) -> nn.Module:
    return rotate(copy.deepcopy(model), **options)


@pytest.mark.parametrize("parts", PARTS, ids=["R1", "R2", "R4", "all"])
@pytest.mark.parametrize("name", ROTATED)
def test_the_function_does_not_change(name, parts):
    narrow = prepared(ROTATED[name]())
    assert change(rotated(narrow, **parts), narrow) < 1e-4
    wide = in_float64(prepared(ROTATED[name](), torch.float64))
    # Deep copies of the patched norms would call the originals.
    after = in_float64(rotated(prepared(ROTATED[name](), torch.float64), **parts))
    assert change(after, wide) < 1e-9


def test_weights_are_products_with_the_matrices():
    """Computed again in numpy, from the definition."""
    model = prepared(own(model_type="qwen2"), torch.float64)
    after = rotated(model, seed=5, down=True)
    r1 = Hadamard.random(32, 5).input(torch.eye(32, dtype=torch.float64)).numpy()
    np.testing.assert_allclose(r1 @ r1.T, np.eye(32), atol=1e-12)
    old = {name: p.numpy() for name, p in model.named_parameters()}
    new = {name: p.numpy() for name, p in after.named_parameters()}
    expected = {name: np.ones(32) for name in old if name.endswith("norm.weight")}
    expected["model.embed_tokens.weight"] = old["model.embed_tokens.weight"] @ r1
    final = old["model.norm.weight"]
    expected["lm_head.weight"] = (old["model.embed_tokens.weight"] * final) @ r1
    h48 = Hadamard(48).input(torch.eye(48, dtype=torch.float64)).numpy()
    for i in range(2):
        r2 = Hadamard.random(8, 6 + i).input(torch.eye(8, dtype=torch.float64)).numpy()
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        before = old[f"model.layers.{i}.input_layernorm.weight"]
        between = old[f"model.layers.{i}.post_attention_layernorm.weight"]
        expected |= {
            f"{part}.weight": (old[f"{part}.weight"] * gain) @ r1
            for part, gain in [
                (f"{attention}.q_proj", before), (f"{attention}.k_proj", before),
                (f"{mlp}.gate_proj", between), (f"{mlp}.up_proj", between),
            ]
        }  # fmt: skip
        for part in ("q_proj", "k_proj"):
            expected[f"{attention}.{part}.bias"] = old[f"{attention}.{part}.bias"]
        values, output = f"{attention}.v_proj", f"{attention}.o_proj"
        two, four = np.kron(np.eye(2), r2), np.kron(np.eye(4), r2)
        expected[f"{values}.weight"] = two.T @ (old[f"{values}.weight"] * before) @ r1
        expected[f"{values}.bias"] = old[f"{values}.bias"] @ two
        expected[f"{output}.weight"] = r1.T @ old[f"{output}.weight"] @ four
        expected[f"{mlp}.down_proj.weight"] = r1.T @ old[f"{mlp}.down_proj.weight"] @ h48
    assert expected.keys() == new.keys()
    for name in new:
        np.testing.assert_allclose(new[name], expected[name], atol=1e-12, err_msg=name)
        assert name.endswith(("q_proj.bias", "k_proj.bias")) or not np.allclose(
            new[name], old.get(name, 0), atol=1e-3
        )


def test_given_matrices_are_taken():
    model = prepared(tiny_decoder(), torch.float64)
    generator = torch.Generator().manual_seed(1)
    stream = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    heads = torch.linalg.qr(torch.randn(2, 8, 8, generator=generator, dtype=torch.float64)).Q
    after = rotated(model, residual_matrix=stream, value_matrices=heads, down=False)
    before = model.model.embed_tokens.weight
    torch.testing.assert_close(after.model.embed_tokens.weight, before @ stream)
    gain = model.model.layers[1].input_layernorm.weight
    values = (model.model.layers[1].self_attn.v_proj.weight * gain) @ stream
    values = torch.cat([heads[1].T @ values[:8], heads[1].T @ values[8:]])
    torch.testing.assert_close(after.model.layers[1].self_attn.v_proj.weight, values)


def skip_output_heads(monkeypatch):
    change = rotating._change
    monkeypatch.setattr(
        rotating, "_change",
        lambda parameter, how, axis=-1: None if how.__name__ == "by_heads" and axis == -1
        and parameter.ndim == 2 else change(parameter, how, axis),
    )  # fmt: skip


def forget_one_norm(monkeypatch):
    readers = rotating.READERS | {"post_attention_layernorm": ("mlp.gate_proj",)}
    monkeypatch.setattr(rotating, "READERS", readers)
    monkeypatch.setattr(rotating, "OPTIONAL", (*rotating.OPTIONAL, "mlp.up_proj"))


def forget_the_input(monkeypatch):
    monkeypatch.setattr(Hadamard, "_input", lambda self, x: x)


@pytest.mark.parametrize("broken", [skip_output_heads, forget_one_norm, forget_the_input])
def test_a_missing_rotation_is_noticed(broken, monkeypatch):
    model = prepared(tiny_decoder())
    with monkeypatch.context() as patched:
        broken(patched)
        after = rotated(model)
        assert change(after, model) > 0.01


def test_tied_weights_are_untied_once():
    for model in (prepared(tiny_decoder()), prepared(ROTATED["llama-tied"]())):
        assert model.config.tie_word_embeddings
        count = sum(p.numel() for p in model.parameters())
        values_only = rotated(model, residual=False)
        assert values_only.config.tie_word_embeddings
        assert sum(p.numel() for p in values_only.parameters()) == count
        after = rotated(model)
        assert not after.config.tie_word_embeddings
        assert sum(p.numel() for p in after.parameters()) == count + 61 * 32
        assert change(after, model) < 1e-4


def test_dtypes_and_the_given_model_come_back():
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        model = prepared(tiny_decoder(), dtype)
        assert rotate(model) is model
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert change(model.float(), prepared(tiny_decoder(), dtype).float()) < 0.05


def test_new_tensors_are_bound():
    """Whoever kept the old tensors can put them back."""
    model = prepared(tiny_decoder(tied=False))
    kept = {name: p.data for name, p in model.named_parameters()}
    copies = {name: p.clone() for name, p in kept.items()}
    rotate(model)
    assert all(torch.equal(kept[name], copies[name]) for name in kept)


def test_seed_decides():
    first, again, other = (rotated(tiny_decoder(), seed=seed) for seed in (0, 0, 1))
    weights = [m.model.layers[1].self_attn.v_proj.weight for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-2)
    assert not torch.allclose(
        first.model.embed_tokens.weight, other.model.embed_tokens.weight, atol=1e-2
    )


def test_rotation_removes_an_outlier():
    """What the layers of a block read has no channel that towers above the others."""
    model = prepared(tiny_decoder())
    model.model.embed_tokens.weight[:, 5] += 40.0

    def ratio(model):
        seen = []
        layer = model.model.layers[0].self_attn.q_proj
        handle = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        logits(model)
        handle.remove()
        return (seen[0].abs().amax(-1) / seen[0].square().mean(-1).sqrt()).mean()

    assert ratio(model) > 4.0
    assert ratio(rotated(model)) < 2.0


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("name", ["own-tied", "llama", "qwen2"])
def test_rotated_models_can_be_quantized(name, method):
    model = prepared(ROTATED[name]())
    after = rotated(model)
    data = Calibration.of(tokens(512), context=32)
    quantize_model(after, "int8-row", method, data)
    layers = [m for m in after.modules() if isinstance(m, QLinear)]
    assert len(layers) == 14
    assert sum(isinstance(layer.transform, Hadamard) for layer in layers) == 2
    assert 1e-5 < change(after, model) < 0.1
    for layer in layers:
        layer.transform = None
    assert change(after, model) > 0.1


@pytest.mark.parametrize("container", [None, "hf"])
def test_stream_and_values_leave_an_ordinary_checkpoint(tmp_path, container):
    model, tokenizer = qlib.load("bpw-small")
    after = rotated(model, down=False)
    assert not any(isinstance(m, DenseLinear) and m.transform for m in after.modules())
    qlib.save(after, tmp_path, tokenizer, container=container)
    loaded, _ = qlib.load(tmp_path)
    assert torch.equal(logits(loaded), logits(after))
    assert change(loaded, model) < 1e-4
    if container == "hf":
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert change(theirs, model) < 1e-4


def test_save_pretrained(tmp_path):
    model = prepared(ROTATED["llama-tied"]())
    rotated(model, down=False).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert change(loaded, model) < 1e-4


def refused(message: str, model: nn.Module, **options) -> None:
    """`rotate` says exactly this and has touched nothing."""
    before = {name: p.clone() for name, p in model.named_parameters()}
    with raises(message):
        rotate(model, **options)
    now = dict(model.named_parameters())
    assert before.keys() == now.keys()
    assert all(torch.equal(now[name], before[name]) for name in now)


def test_other_architectures_are_refused():
    refused(
        "GPTNeoXForCausalLM has no gpt_neox.embed_tokens: rotations need blocks of Llama",
        MODELS["gpt-neox"](),
    )
    for family in ("gemma2", "gemma3"):
        refused(
            "model.layers.0.pre_feedforward_layernorm: "
            "rotations do not know what this part does to the stream",
            CALIBRATED[family](),
        )
    refused(
        "CohereForCausalLM has no model.layers.0.post_attention_layernorm: "
        "rotations need blocks of Llama",
        huggingface("Cohere", pad_token_id=0, bos_token_id=0, eos_token_id=1),
    )
    model = huggingface("Llama")
    norm = nn.LayerNorm(32)
    model.model.layers[1].post_attention_layernorm = norm.requires_grad_(False)
    refused(
        "model.layers.1.post_attention_layernorm is a LayerNorm, not x / rms(x) times a gain, "
        "so the stream cannot be rotated before it: give residual=False",
        model,
    )
    model = prepared(model)
    assert change(rotated(model, residual=False), model) < 1e-4
    biased = own()
    biased.model.layers[0].mlp.extra = nn.Linear(32, 32)
    refused(
        "model.layers.0.mlp.extra: rotations do not know what this part does to the stream", biased
    )


def test_wrong_matrices_are_refused():
    skewed = torch.eye(32)
    skewed[0, 1] = 0.01
    refused(
        "matrix [32, 32] is not orthogonal: matrix @ matrix.T is off by 1.0e-02; "
        "take the Q of torch.linalg.qr(matrix)",
        tiny_decoder(), residual_matrix=skewed,
    )  # fmt: skip
    refused(
        "residual_matrix is [16, 16]; the model needs [32, 32]",
        tiny_decoder(), residual_matrix=torch.eye(16),
    )  # fmt: skip
    refused(
        "value_matrices[1] is [32, 32]; the model needs [8, 8]",
        tiny_decoder(), value_matrices=[torch.eye(8), torch.eye(32)],
    )  # fmt: skip
    refused(
        "1 value_matrices for 2 layers: give one each",
        tiny_decoder(), value_matrices=[torch.eye(8)],
    )  # fmt: skip
    nan = torch.eye(32)
    nan[3, 3] = torch.nan
    with pytest.raises(ValueError, match="is not orthogonal"):
        rotate(tiny_decoder(), residual_matrix=nan)


def test_a_matrix_that_is_not_orthogonal_would_change_the_function(monkeypatch):
    model = prepared(tiny_decoder())
    skewed = torch.eye(32)
    skewed[0, 1] = 0.1
    monkeypatch.setattr("qlib.transform.ORTHOGONAL", 1.0)
    assert change(rotated(model, residual_matrix=skewed), model) > 1e-3


def test_quantized_and_rotated_models_are_refused():
    model = tiny_decoder()
    quantize_model(model, "int8-row")
    with raises("Decoder is quantized already: rotate it before"):
        rotate(model)
    model = rotated(tiny_decoder())
    refused(
        "model.layers.0.mlp.down_proj reads transformed inputs already: load the model again",
        model,
    )
    model = tiny_decoder()
    rules = (("*.1.mlp.down_proj", "int8-row"),)
    quantize_model(model, Recipe(None, activation_rules=rules), progress=False)
    refused(
        "model.layers.1.mlp.down_proj rounds its inputs, which a rotation moves: rotate first",
        model,
    )
    quantize_model(rotated(tiny_decoder()), Recipe(None, activation_rules=rules), progress=False)
    twice = rotated(rotated(prepared(tiny_decoder()), down=False), seed=1)
    assert change(twice, prepared(tiny_decoder())) < 1e-4


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ((tiny_decoder(), object()), "pair (model, tokenizer): pass its first part"),
        ((1, 2), "tuple"),
        ("bpw-small", "str"),
    ],
)
def test_what_is_no_model_is_refused(given, got):
    protocol = qlib.Protocol("mine", torch.zeros(40, dtype=torch.long), context=20, stride=20)
    calls = [
        rotate,
        lambda given: qlib.methods.spinquant(given, "w4a4", tokens(20)[None]),
        lambda given: qlib.quantize_model(given, "int8"),
        lambda given: qlib.perplexity(given, protocol),
        lambda given: through_cache(given, "int4"),
    ]
    for call in calls:
        with pytest.raises(TypeError) as caught:
            call(given)
        assert str(caught.value) == f"need a model, got a {got}"


def test_sizes_without_a_hadamard_matrix():
    config = Config(61, 30, 42, 1, 3, 3, 10, max_position_embeddings=64)
    model = Decoder(config).normal_init(0.3, torch.Generator().manual_seed(0)).requires_grad_(False)
    with pytest.raises(
        ValueError, match="no construction of a Hadamard matrix of size 30 is known"
    ):
        rotate(model)
    config = Config(61, 30, 48, 1, 3, 3, 8, max_position_embeddings=64)
    other = Decoder(config).normal_init(0.3, torch.Generator().manual_seed(0)).requires_grad_(False)
    assert change(rotated(other, residual=False), other) < 1e-4
    matrices = {"residual_matrix": torch.eye(30).flip(0), "value_matrices": [torch.eye(10)]}
    assert change(rotated(model, down=False, **matrices), model) < 1e-4
