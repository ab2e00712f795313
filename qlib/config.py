"""The sizes of a decoder, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Config:
    """The sizes of a decoder, under the field names of Hugging Face's ``config.json``.

    >>> Config(1024, 256, 512, 3, 8, 4, 32).to_hf()["model_type"]
    'llama'
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type in ("int", "float"):
                kinds = (int,) if field.type == "int" else (int, float)
                _positive(field.name, getattr(self, field.name), *kinds)
        for name in ("bos_token_id", "eos_token_id"):
            _token_ids(name, getattr(self, name), self.vocab_size)
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise ValueError(
                f"config: num_attention_heads {heads} is not a multiple of "
                f"num_key_value_heads {groups}"
            )
        if self.head_dim % 2:
            raise ValueError(f"config: head_dim {self.head_dim} must be even for rotary positions")

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Config:
        """Read the dictionary of a ``config.json``.

        Raises ValueError for another model type, for a missing or impossible size, and for options
        that would change the function (biases, other activations, scaled rotary positions).
        """
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config: rope_scaling must be a dictionary, got {rope!r}")
        _refuse_unsupported(raw, rope)
        hidden = _positive("hidden_size", raw.get("hidden_size"), int)
        heads = _positive("num_attention_heads", raw.get("num_attention_heads"), int)
        values = {
            "num_key_value_heads": heads,
            "head_dim": hidden // heads,
            "rms_norm_eps": 1e-6,
            "rope_theta": rope.get("rope_theta", 10000.0),
            "tie_word_embeddings": False,
            "max_position_embeddings": 2048,
        }
        # In these files a null means the default, as a missing name does.
        values |= {name: value for name, value in raw.items() if value is not None}
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        return cls(**{name: values.get(name) for name in cls.__dataclass_fields__})

    def to_hf(self) -> dict[str, Any]:
        """Return the dictionary of a ``config.json`` that transformers' Llama reads."""
        fixed = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
        return fixed | asdict(self)


def _positive(name: str, value: Any, *kinds: type) -> Any:
    if type(value) not in kinds or not 0 < value < float("inf"):
        noun = "number" if float in kinds else "integer"
        raise ValueError(f"config: {name} must be a positive {noun}, got {value!r}")
    return value


def _token_ids(name: str, value: Any, vocab_size: int) -> None:
    for token in value if isinstance(value, tuple) else (value,):
        if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
            raise ValueError(f"config: {name} {value!r} is not in a vocabulary of {vocab_size}")


def _refuse_unsupported(raw: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    for name, value, need in (
        ("model_type", raw.get("model_type"), "llama"),
        ("hidden_act", raw.get("hidden_act", "silu"), "silu"),
        ("attention_bias", raw.get("attention_bias", False), False),
        ("mlp_bias", raw.get("mlp_bias", False), False),
        ("rope_type", rope.get("rope_type", rope.get("type", "default")), "default"),
    ):
        if value != need:
            raise ValueError(f"config: {name} {value!r} is not supported; need {need!r}")
