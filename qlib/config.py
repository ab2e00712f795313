"""The sizes of a decoder, read from and written to Hugging Face's ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}


@dataclass(frozen=True)
class Llama3Rope:
    """Rotary positions stretched to a longer context as in Llama 3.1, by the names of config.json.

    A pair that turns less than `low_freq_factor` times in the original length turns `factor` times
    more slowly, one that turns more than `high_freq_factor` times is left as it was, and those
    between are interpolated (transformers, modeling_rope_utils.py; `model.frequency_factors`).
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.factor < 1 or self.low_freq_factor >= self.high_freq_factor:
            raise ValueError(
                f"config: rope_scaling needs factor {self.factor} >= 1 and low_freq_factor "
                f"{self.low_freq_factor} < high_freq_factor {self.high_freq_factor}"
            )


@dataclass(frozen=True)
class Config:
    """The sizes of a decoder, under the field names of Hugging Face's ``config.json``.

    ``rope_scaling`` is None, or how a longer context slows the rotary positions: by a rule, or by
    one divisor for each of the head_dim / 2 frequencies, as GGUF files have them. Where
    ``model_type`` is "qwen2" instead of "llama", q, k and v have biases.

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
    rope_scaling: Llama3Rope | tuple[float, ...] | None = None
    model_type: str = "llama"

    def __post_init__(self) -> None:
        _check_numbers(self)
        _need("model_type", self.model_type, *ARCHITECTURES)
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
        if isinstance(self.rope_scaling, tuple):
            have, need = len(self.rope_scaling), self.head_dim // 2
            if have != need:
                raise ValueError(f"config: rope_scaling has {have} factors; need {need}")
            for factor in self.rope_scaling:
                _positive("rope_scaling", factor, int, float)

    @property
    def qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values add a bias."""
        return self.model_type == "qwen2"

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> Config:
        """Read the dictionary of a ``config.json``.

        Raises ValueError for another model type, for a missing or impossible size, and for options
        that would change the function (other biases, activations, rotary positions or windows).
        """
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"config: rope_scaling must be a dictionary, got {rope!r}")
        _refuse_unsupported(raw)
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
        values["rope_scaling"] = _rope_scaling(rope)
        return cls(**{name: values.get(name) for name in cls.__dataclass_fields__})

    def to_hf(self) -> dict[str, Any]:
        """Return the dictionary of a ``config.json`` that transformers' Llama or Qwen2 reads."""
        fixed = {"architectures": [ARCHITECTURES[self.model_type]], "hidden_act": "silu"}
        values = fixed | asdict(self)
        if isinstance(self.rope_scaling, Llama3Rope):
            values["rope_scaling"] |= {"rope_type": "llama3"}
        elif self.rope_scaling is not None:
            # Of the kinds that transformers has, LongRoPE lets the factors be any.
            values["rope_scaling"] = {
                "rope_type": "longrope",
                "short_factor": list(self.rope_scaling),
                "long_factor": list(self.rope_scaling),
                "attention_factor": 1.0,
                "factor": 1.0,
                "original_max_position_embeddings": self.max_position_embeddings,
            }
        return values


def _check_numbers(config: Config | Llama3Rope) -> None:
    for field in fields(config):
        if field.type in ("int", "float"):
            kinds = (int,) if field.type == "int" else (int, float)
            _positive(field.name, getattr(config, field.name), *kinds)


def _positive(name: str, value: Any, *kinds: type) -> Any:
    # Numbers of config.json may be of any size, but torch has integers of 64 bits.
    limit = 2**63 if type(value) is int else float("inf")
    if type(value) not in kinds or not 0 < value < limit:
        noun = "number" if float in kinds else "integer"
        raise ValueError(f"config: {name} must be a positive {noun}, got {value!r}")
    return value


def _token_ids(name: str, value: Any, vocab_size: int) -> None:
    for token in value if isinstance(value, tuple) else (value,):
        if token is not None and (type(token) is not int or not 0 <= token < vocab_size):
            raise ValueError(f"config: {name} {value!r} is not in a vocabulary of {vocab_size}")


def _need(name: str, value: Any, *needed: Any) -> None:
    if value not in needed:
        need = " or ".join(map(repr, needed))
        raise ValueError(f"config: {name} {value!r} is not supported; need {need}")


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    _need("model_type", raw.get("model_type"), *ARCHITECTURES)
    _need("hidden_act", raw.get("hidden_act", "silu"), "silu")
    for name in ("attention_bias", "mlp_bias", "use_sliding_window"):
        _need(name, raw.get(name, False), False)


def _rope_scaling(rope: Mapping[str, Any]) -> Llama3Rope | tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    _need("rope_type", kind, "default", "llama3", "longrope")
    if kind == "llama3":
        return Llama3Rope(*(rope.get(field.name) for field in fields(Llama3Rope)))
    if kind == "longrope":
        # Only as `to_hf` writes it: the same factors whatever the length.
        factors = rope.get("short_factor")
        _need("long_factor", rope.get("long_factor"), factors)
        _need("attention_factor", rope.get("attention_factor"), 1.0)
        if not isinstance(factors, list):
            raise ValueError(f"config: short_factor must be a list, got {factors!r}")
        return tuple(factors)
    return None
