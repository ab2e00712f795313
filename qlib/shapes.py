"""Shapes of decoders: from a model's published sizes to every matrix that it holds."""

from __future__ import annotations

from dataclasses import dataclass

from .config import Config


@dataclass(frozen=True)
class GQA:
    """Grouped-query attention (arXiv 2305.13245): several query heads share a key and value head.

    Args:
        heads: query heads; groups: key and value heads; head_dim: width of each.
        bias: q, k and v have biases (Qwen2.5); norms: q and k have RMSNorms (Qwen3).
    """

    heads: int
    groups: int
    head_dim: int
    bias: bool = False
    norms: bool = False

    @property
    def cached(self) -> int:
        """Values that one token leaves in the cache of one layer: a key and a value per group."""
        return 2 * self.groups * self.head_dim

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        """(out, in) of the matrices of one layer."""
        query, key = self.heads * self.head_dim, self.groups * self.head_dim
        inputs = {"q_proj": (query, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden)}
        return inputs | {"o_proj": (hidden, query)}

    def vectors(self) -> int:
        """Parameters of one layer that belong to no matrix."""
        biases = (self.heads + 2 * self.groups) * self.head_dim
        return self.bias * biases + self.norms * 2 * self.head_dim


@dataclass(frozen=True)
class MLA:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Args:
        heads: query heads; head_dim: width of a head without its rotary part, and of its value.
        query_rank: width of the queries' latent; cache_rank: of the latent that is cached.
        rope: width of the rotary key that all heads share.
    """

    heads: int
    head_dim: int
    query_rank: int
    cache_rank: int
    rope: int

    @property
    def cached(self) -> int:
        """Values that one token leaves in the cache of one layer: a latent and a rotary key."""
        return self.cache_rank + self.rope

    def matrices(self, hidden: int) -> dict[str, tuple[int, int]]:
        """(out, in) of the matrices of one layer."""
        return {
            "q_a_proj": (self.query_rank, hidden),
            "q_b_proj": (self.heads * (self.head_dim + self.rope), self.query_rank),
            "kv_a_proj": (self.cached, hidden),
            "kv_b_proj": (2 * self.heads * self.head_dim, self.cache_rank),
            "o_proj": (hidden, self.heads * self.head_dim),
        }

    def vectors(self) -> int:
        """Parameters of one layer that belong to no matrix: the norms of both latents."""
        return self.query_rank + self.cache_rank


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: small MLPs, of which each token uses `active` and all `shared` ones.

    Args:
        count: routed experts of a layer; width: hidden width of one expert.
        dense: how many layers at the start have an ordinary MLP instead.
    """

    count: int
    active: int
    width: int
    shared: int = 0
    dense: int = 0


@dataclass(frozen=True)
class Matrices:
    """`count` equal matrices of shape (out, in); one token uses `active` of every `choices`."""

    count: int
    shape: tuple[int, int]
    choices: int = 1
    active: int = 1

    @property
    def numel(self) -> int:
        """Weights of all of them."""
        return self.count * self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder: hidden size, layers, vocabulary, width of the MLP, and the rest.

    >>> SHAPES["Llama-3.1-8B"].parameters, SHAPES["Mixtral-8x7B"].active
    (8030261248, 12879925248)
    """

    hidden: int
    layers: int
    vocab: int
    width: int
    attention: GQA | MLA
    experts: Experts | None = None
    tied: bool = False

    @classmethod
    def of(cls, config: Config) -> ModelShape:
        """The shape of a model that this library can run."""
        c = config
        attention = GQA(c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.qkv_bias)
        body = (c.hidden_size, c.num_hidden_layers, c.vocab_size, c.intermediate_size)
        return cls(*body, attention, tied=c.tie_word_embeddings)

    @property
    def matrices(self) -> dict[str, Matrices]:
        """The linear layers of all decoder blocks, by name; no embedding, head or router."""
        found = self.attention.matrices(self.hidden).items()
        found = {name: Matrices(self.layers, shape) for name, shape in found}
        e = self.experts or Experts(0, 0, 0, dense=self.layers)
        found |= self._mlp("", e.dense, self.width)
        found |= self._mlp("shared_", (self.layers - e.dense) * e.shared, e.width)
        routed = (self.layers - e.dense) * e.count
        return found | self._mlp("expert_", routed, e.width, e.count, e.active)

    def _mlp(self, prefix: str, count: int, width: int, choices: int = 1, active: int = 1):
        up, down = (width, self.hidden), (self.hidden, width)
        shapes = {"gate_proj": up, "up_proj": up, "down_proj": down} if count else {}
        return {prefix + n: Matrices(count, s, choices, active) for n, s in shapes.items()}

    @property
    def embedding(self) -> int:
        """Parameters of the embedding and, if it is not the same table, of the output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def vectors(self) -> int:
        """Parameters that are never quantized: norms, biases, and routers [experts, hidden]."""
        norms = (2 * self.layers + 1) * self.hidden + self.layers * self.attention.vectors()
        e = self.experts
        return norms + ((self.layers - e.dense) * e.count * self.hidden if e else 0)

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.embedding + self.vectors + sum(m.numel for m in self.matrices.values())

    @property
    def active(self) -> int:
        """Parameters that one token uses; both tables count, as in the published figures."""
        used = sum(m.numel * m.active // m.choices for m in self.matrices.values())
        return self.embedding + self.vectors + used


# The published configurations. Llama: arXiv 2407.21783, table 3. Qwen: 2412.15115 and 2505.09388.
# Mixtral: 2401.04088, table 1. DeepSeek-V3: 2412.19437, section 4.2, without its extra layer for
# multi-token prediction. SmolLM2: 2502.02737 and its config.json.
SHAPES: dict[str, ModelShape] = {
    "SmolLM2-135M": ModelShape(576, 30, 49152, 1536, GQA(9, 3, 64), tied=True),
    "Llama-3.1-8B": ModelShape(4096, 32, 128256, 14336, GQA(32, 8, 128)),
    "Llama-3.1-70B": ModelShape(8192, 80, 128256, 28672, GQA(64, 8, 128)),
    "Llama-3.1-405B": ModelShape(16384, 126, 128256, 53248, GQA(128, 8, 128)),
    "Qwen2.5-72B": ModelShape(8192, 80, 152064, 29568, GQA(64, 8, 128, bias=True)),
    "Qwen3-32B": ModelShape(5120, 64, 151936, 25600, GQA(64, 8, 128, norms=True)),
    "Qwen3-30B-A3B": ModelShape(
        2048, 48, 151936, 6144, GQA(32, 4, 128, norms=True), Experts(128, 8, 768)
    ),
    "Mixtral-8x7B": ModelShape(4096, 32, 32000, 14336, GQA(32, 8, 128), Experts(8, 2, 14336)),
    "DeepSeek-V3": ModelShape(
        7168, 61, 129280, 18432, MLA(128, 128, 1536, 512, 64), Experts(256, 8, 2048, 1, 3)
    ),
}
