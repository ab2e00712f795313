"""Other people's four-bit kernels for `bench_gpu`, where they are installed.

Each takes what `gpu_contestants` takes. An ImportError or any other exception means that the peer
cannot be had here: the benchmark names it and goes on.
"""

from __future__ import annotations

import torch
from gpu_contestants import Contestant, Setting, check, slab, traffic, weight
from torch import Tensor

from qlib.qtensor import QTensor

GROUP = 128


def tinygemm(setting: Setting, outputs: int, inputs: int, rows: int) -> Contestant:
    """torch's own: two codes to a byte, tiled for tensor cores; (code - 8) * scale + zero."""
    codes, scale = _unsigned(weight(f"int4-g{GROUP}", outputs, inputs, setting.device))
    scale = scale.to(torch.bfloat16)
    x = setting.randn(rows, inputs).to(torch.bfloat16)
    bytes = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(bytes, 8)
    pairs = torch.stack((scale.T, torch.zeros_like(scale.T)), dim=-1).contiguous()
    error = check(x, _decoded(codes, scale, outputs), x.dtype)
    size = traffic(packed.nbytes + pairs.nbytes, x, outputs)

    def call(operand: tuple[Tensor, Tensor]) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm(x, operand[0], GROUP, operand[1])

    operands = _copies((packed, pairs), setting)
    return Contestant(
        "torch tinygemm int4-g128", "_weight_int4pack_mm", call, operands, size, error
    )


def bitsandbytes(setting: Setting, outputs: int, inputs: int, rows: int) -> Contestant:
    """NF4 in blocks of 64."""
    import bitsandbytes as bnb

    x, values = setting.randn(rows, inputs), slab(outputs, inputs)
    full = values.to(setting.device, setting.dtype).repeat(outputs // len(values), 1)
    count = setting.copies(full.nbytes // 4)
    options = {"blocksize": 64, "quant_type": "nf4"}
    operands = [bnb.functional.quantize_4bit(full, **options) for _ in range(count)]
    codes, state = operands[0]
    decoded = bnb.functional.dequantize_4bit(codes, state)[: len(values)].float()
    size = traffic(codes.nbytes + state.absmax.nbytes, x, outputs)

    def call(operand) -> Tensor:
        return bnb.matmul_4bit(x, operand[0].t(), quant_state=operand[1])

    error = check(x, decoded, setting.dtype)
    return Contestant("bitsandbytes nf4", "matmul_4bit", call, operands, size, error)


def gemlite(setting: Setting, outputs: int, inputs: int, rows: int) -> Contestant:
    """Integers of 4 bits with the zero point 8, packed by the library itself."""
    from gemlite.core import DType, GemLiteLinear

    kind = {torch.bfloat16: DType.BF16, torch.float16: DType.FP16}[setting.dtype]
    codes, scale = _unsigned(weight(f"int4-g{GROUP}", outputs, inputs, setting.device))
    scale, x = scale.to(setting.dtype), setting.randn(rows, inputs)
    sizes = {"group_size": GROUP, "in_features": inputs, "out_features": outputs}
    operands = []
    for _ in range(setting.copies(codes.numel() // 2)):
        layer = GemLiteLinear(4, **sizes, input_dtype=kind, output_dtype=kind)
        zeros = torch.full_like(scale, 8).reshape(-1, 1)
        layer.pack(codes.to(torch.uint8), scale.reshape(-1, 1).clone(), zeros, None)
        operands.append(layer)
    size = traffic(codes.numel() // 2 + 2 * scale.nbytes, x, outputs)
    error = check(x, _decoded(codes, scale, outputs), setting.dtype)
    call = lambda layer: layer(x)  # noqa: E731
    return Contestant("gemlite int4-g128", "GemLiteLinear", call, operands, size, error)


PEERS = {"torch tinygemm": tinygemm, "bitsandbytes": bitsandbytes, "gemlite": gemlite}


def _unsigned(q: QTensor) -> tuple[Tensor, Tensor]:
    """(codes 0 to 15, scale): weights are (code - 8) * scale."""
    codes = q.format.unpack(q.parts["codes"], q.shape).to(torch.int32)
    return codes + int(q.format.grid.min) + 8, q.parts["scale"]


def _decoded(codes: Tensor, scale: Tensor, outputs: int) -> Tensor:
    count = len(slab(outputs, codes.shape[1]))
    numbers = (codes[:count] - 8).unflatten(1, (-1, GROUP)) * scale[:count].float()[..., None]
    return numbers.flatten(1)


def _copies(tensors: tuple[Tensor, ...], setting: Setting) -> list[tuple[Tensor, ...]]:
    count = setting.copies(sum(tensor.nbytes for tensor in tensors))
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]
