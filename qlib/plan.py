"""Sizes before anything is loaded: bytes of weights and KV cache, and the speed that they allow.

Everything follows from a model's published shape. Bytes are exact for dense storage; the speed is
an upper bound, because a decoding step must at least read these bytes once.
"""

from __future__ import annotations

from dataclasses import dataclass

from .presets import format as named_format
from .qtensor import Format
from .shapes import SHAPES, ModelShape  # noqa: F401  (SHAPES belongs to this page for its users)


@dataclass(frozen=True)
class Device:
    """A processor and its memory, from the vendor's data sheet.

    Args:
        memory: what the model may use, in GB (1e9 bytes); bandwidth: of that memory, in GB/s.
    """

    name: str
    memory: int
    bandwidth: float


def unique_experts(count: int, active: int, tokens: float) -> float:
    """Experts of one layer that a step with `tokens` tokens must read, in expectation.

    Each token draws `active` of `count` experts; an expert is idle if all tokens miss it. Tokens
    are taken as independent and experts as equally popular, which real routers only approach.

    >>> round(unique_experts(8, 2, 1), 3), round(unique_experts(8, 2, 8), 3)
    (2.0, 7.199)
    """
    return count * (1 - (1 - active / count) ** tokens)


def weights_bytes(
    shape: ModelShape, bpw: float | str | Format, embedding: float = 16, vectors: float = 16
) -> int:
    """Bytes of all weights.

    Args:
        bpw: bits per weight of the linear layers, or a format, whose bytes are then counted.
        embedding: bits per weight of embedding and head; vectors: of norms, biases and routers.

    >>> weights_bytes(SHAPES["Llama-3.1-8B"], 16)
    16060522496
    >>> weights_bytes(SHAPES["Llama-3.1-8B"], "int4-g128")
    5700591616
    """
    linear = sum(m.count * _matrix_bytes(m.shape, bpw) for m in shape.matrices.values())
    return round(linear + (shape.embedding * embedding + shape.vectors * vectors) / 8)


def _matrix_bytes(shape: tuple[int, int], bpw: float | str | Format) -> float:
    if isinstance(bpw, (int, float)):
        return shape[0] * shape[1] * bpw / 8
    return (named_format(bpw) if isinstance(bpw, str) else bpw).nbytes(shape)


def kv_bytes(shape: ModelShape, tokens: int, batch: int = 1, bits: float = 16) -> int:
    """Bytes of the keys and values of `batch` sequences of `tokens` tokens, `bits` per value.

    >>> kv_bytes(SHAPES["Llama-3.1-70B"], 128 * 1024) / 2**30
    40.0
    """
    return round(shape.layers * shape.attention.cached * tokens * batch * bits / 8)


def read_bytes(
    shape: ModelShape, bpw: float | str | Format, context: int = 0, batch: int = 1,
    embedding: float = 16, kv_bits: float = 16,
) -> int:  # fmt: skip
    """Bytes that one decoding step of `batch` sequences must read; arguments as above.

    Every linear layer once, of the experts those that are expected to be needed, the output head
    once, of the embedding one row per sequence, and the whole cache.
    """
    total = kv_bytes(shape, context, batch, kv_bits) + shape.vectors * 2
    total += (shape.vocab + batch) * shape.hidden * embedding / 8
    for m in shape.matrices.values():
        share = unique_experts(m.choices, m.active, batch) / m.choices
        total += share * m.count * _matrix_bytes(m.shape, bpw)
    return round(total)


def decode_bound(
    shape: ModelShape, bandwidth: float, bpw: float | str | Format = 16, context: int = 0,
    batch: int = 1, embedding: float = 16, kv_bits: float = 16,
) -> float:  # fmt: skip
    """Tokens per second, of all sequences together, that no decoder can exceed.

    Args:
        bandwidth: bytes per second that the memory delivers; the others as above.

    >>> round(decode_bound(SHAPES["Llama-3.1-8B"], 1.008e12, "int4-g128"))
    217
    """
    return batch * bandwidth / read_bytes(shape, bpw, context, batch, embedding, kv_bits)


# Read in November 2026 from nvidia.com (GeForce comparison, RTX 6000 Ada, H100 SXM, H200 SXM) and
# support.apple.com (Mac Studio 2025); macOS lends a GPU about three quarters of the memory, so the
# Macs of 128 and 512 GB count as 96 and 384.
DEVICES = (
    Device("RTX 4060", 8, 272),
    Device("RTX 4070", 12, 504),
    Device("RTX 4080", 16, 716.8),
    Device("RTX 4090", 24, 1008),
    Device("RTX 5090", 32, 1792),
    Device("RTX 6000 Ada", 48, 960),
    Device("H100", 80, 3350),
    Device("M4 Max, 128 GB", 96, 546),
    Device("H200", 141, 4800),
    Device("M3 Ultra, 512 GB", 384, 819),
)
