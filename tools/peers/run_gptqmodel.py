"""GPTQ by gptqmodel, with its defaults but for tokens, bits and group."""

from __future__ import annotations

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from task import TASK, Clock, finish, windows


@torch.no_grad()
def dequantized(module: torch.nn.Module) -> torch.Tensor:
    """[out, in] in float32: the product of code and scale would else be rounded to float16."""
    module.scales = module.scales.float()
    return module.dequantize_weight().float().T


def main() -> None:
    shape = {"bits": TASK["bits"], "group_size": TASK["group"], "sym": False}
    # Version 2 of the layout stores zero points as they are, version 1 one less. Everything fits in
    # memory here, and what is written to disk would only be read back.
    config = QuantizeConfig(**shape, format="gptq_v2", offload_to_disk=False, **TASK["options"])
    model = GPTQModel.load(TASK["model"], config, device="cpu", dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows().tolist()]
    with Clock() as clock:
        model.quantize(rows)
    tensors = dict(model.model.state_dict())
    for name, module in model.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            tensors[f"{name}.weight"] = dequantized(module)
            tensors[f"{name}.g_idx"] = module.g_idx
    finish(tensors, clock, "float16 scale, integer zero point", "gptqmodel", "transformers")


if __name__ == "__main__":
    main()
