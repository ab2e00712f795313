"""One decoder for Llama and Qwen2, with the names of Hugging Face's checkpoints.

A token becomes a vector, every layer adds what attention and the MLP computed to it, and the last
vector is compared with the embedding of every token.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from qlib.cache import Cache, DenseCache, KVFormat, QuantizedCache, attention
from qlib.config import Config

Tokens = Int[Tensor, "batch time"]
Hidden = Float[Tensor, "batch time hidden"]
Heads = Float[Tensor, "batch heads time head_dim"]
Rotation = tuple[Float[Tensor, "time head_dim"], Float[Tensor, "time head_dim"]]


class RMSNorm(nn.Module):
    """Divide by the root mean square, in float32 at least (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Hidden) -> Hidden:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rotation(config: Config, start: int, stop: int, device: torch.device) -> Rotation:
    """Return the cosines and sines of the positions start .. stop-1."""
    frequency = _frequencies(config, device)
    if config.rope_scaling is not None:
        frequency = frequency / frequency_factors(config, device)
    angle = torch.outer(torch.arange(start, stop, device=device).float(), frequency)
    angle = torch.cat((angle, angle), dim=-1)
    return angle.cos(), angle.sin()


def frequency_factors(
    config: Config, device: torch.device | None = None
) -> Float[Tensor, " pairs"]:
    """Return the divisors of the rotary frequencies that ``config.rope_scaling`` stands for."""
    scaling = config.rope_scaling
    if isinstance(scaling, tuple):
        return torch.tensor(scaling, dtype=torch.float32, device=device)
    radians = scaling.original_max_position_embeddings * _frequencies(config, device)
    turns = radians / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / (kept + (1 - kept) / scaling.factor)


def _frequencies(config: Config, device: torch.device | None) -> Float[Tensor, " pairs"]:
    """Radians by which each pair of a head turns from one position to the next, unscaled."""
    even = torch.arange(0, config.head_dim, 2, device=device).float()
    return config.rope_theta ** (-even / config.head_dim)


def rotate(x: Heads, rope: Rotation) -> Heads:
    """Turn the pairs (i, i + head_dim/2) by their position's angle (RoFormer, Su et al. 2021)."""
    cos, sin = rope
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention in which a group of query heads shares one key and value head."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.head_dim, self.index = config.head_dim, index
        query = config.num_attention_heads * config.head_dim
        key = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, key, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, key, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def _heads(self, x: Tensor) -> Heads:
        # [batch, time, heads * head_dim] -> [batch, heads, time, head_dim]
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, x: Hidden, rope: Rotation, cache: Cache | None = None) -> Hidden:
        q = rotate(self._heads(self.q_proj(x)), rope)
        k = rotate(self._heads(self.k_proj(x)), rope)
        v = self._heads(self.v_proj(x))
        y = attention(q, k, v) if cache is None else cache.attend(q, k, v, self.index)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: one projection gates the other (Shazeer 2020)."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Hidden) -> Hidden:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then the MLP; each reads the normed residual stream and adds to it."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Hidden, rope: Rotation, cache: Cache | None = None) -> Hidden:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """A Llama or Qwen2 language model whose ``state_dict`` keys are the checkpoint's names."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def normal_init(self, std: float = 0.02, generator: torch.Generator | None = None) -> Decoder:
        """Draw every matrix from N(0, std^2), those that add to the residual stream smaller.

        Biases become zero.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith(("o_proj.weight", "down_proj.weight"))
                # The stream sums 2 L of these, so its variance stays that of one (GPT-2).
                shrink = (2 * self.config.num_hidden_layers) ** -0.5 if adds else 1.0
                nn.init.normal_(parameter, std=std * shrink, generator=generator)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        return self

    def hidden(self, tokens: Tokens, cache: Cache | None = None) -> Hidden:
        """Return the vectors after the final norm; a ``cache`` remembers the tokens, in place.

        Raises ValueError when the sequence outgrows max_position_embeddings.
        """
        past = 0 if cache is None else cache.length
        stop, limit = past + tokens.shape[1], self.config.max_position_embeddings
        if stop > limit:
            raise ValueError(f"{stop} tokens exceed the model's max_position_embeddings {limit}")
        x = self.model.embed_tokens(tokens)
        rope = rotation(self.config, past, stop, x.device)
        for layer in self.model.layers:
            x = layer(x, rope, cache)
        return self.model.norm(x)

    def head(self, hidden: Float[Tensor, "... hidden"]) -> Float[Tensor, "... vocab"]:
        """Return one logit per vocabulary entry."""
        if self.config.tie_word_embeddings:
            return F.linear(hidden, self.model.embed_tokens.weight)
        return self.lm_head(hidden)

    def forward(self, tokens: Tokens, cache: Cache | None = None) -> Float[Tensor, "... vocab"]:
        """Return the logits of the token that follows each position."""
        return self.head(self.hidden(tokens, cache))

    @torch.no_grad()
    def generate(
        self,
        tokens: Tokens,
        max_new_tokens: int,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        cache: Cache | KVFormat | str | None = None,
    ) -> Int[Tensor, "batch longer"]:
        """Append up to ``max_new_tokens`` tokens; stop when every row's newest is an end token.

        Temperature 0 takes the likeliest token; above 0 it samples softmax(logits / temperature).
        The tokens continue what a ``cache`` holds; a format, or its name, starts one that is empty.
        Without any, keys and values are kept in full.
        """
        if tokens.ndim != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens must be integers [batch, length], got {list(tokens.shape)}")
        ends = () if self.config.eos_token_id is None else self.config.eos_token_id
        ends = torch.tensor(ends, dtype=tokens.dtype, device=tokens.device).reshape(-1)
        cache, new = _cache(cache), tokens
        for _ in range(max_new_tokens):
            logits = self.head(self.hidden(new, cache)[:, -1])
            new = _choose(logits, temperature, generator)
            tokens = torch.cat((tokens, new), dim=1)
            if torch.isin(new, ends).all():
                break
        return tokens


def _cache(given: Cache | KVFormat | str | None) -> Cache:
    if isinstance(given, str | KVFormat):
        return QuantizedCache(given)
    # A class that was not called has a length, too, but not a number.
    if given is not None and not isinstance(getattr(given, "length", None), int):
        need = "a cache such as QuantizedCache('int4'), a KVFormat or a name of one"
        raise TypeError(f"cache must be {need}, got {type(given).__name__}")
    return DenseCache() if given is None else given


def _choose(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    probabilities = torch.softmax(logits.float() / temperature, dim=-1)
    return torch.multinomial(probabilities, 1, generator=generator)
