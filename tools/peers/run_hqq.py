"""HQQ by hqq: every linear layer on its own, with the defaults of its BaseQuantizeConfig."""

from __future__ import annotations

import torch
from hqq.core.quantize import Quantizer
from task import TASK, Clock, finish, hf_model, matrix

STORES = "float16 scale, float16 zero point"


def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, dict]:
    # Axis 1 groups input channels, as everyone here does; a rounded zero point at 4 bits only is
    # hqq's default.
    shape = {"nbits": TASK["bits"], "group_size": TASK["group"], "axis": 1}
    return Quantizer.quantize(
        weight, **shape, round_zero=TASK["bits"] == 4, device="cpu", **TASK["options"]
    )


def dequantize(codes: torch.Tensor, meta: dict) -> torch.Tensor:
    """In float32, from scale and zero point in hqq's default type."""
    kept = {name: meta[name].half().float() for name in ("scale", "zero")}
    return Quantizer.dequantize(codes, meta | kept | {"compute_dtype": torch.float32})


@torch.no_grad()
def main() -> None:
    if (weight := matrix()) is not None:
        with Clock() as clock:
            quantize(weight)
        return finish({}, clock, STORES, "hqq")
    model = hf_model()
    linears = {n: m for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
    with Clock() as clock:
        packed = {name: quantize(linear.weight) for name, linear in linears.items()}
    for name, parts in packed.items():
        linears[name].weight.copy_(dequantize(*parts))
    finish(model.state_dict(), clock, STORES, "hqq", "transformers")


if __name__ == "__main__":
    main()
