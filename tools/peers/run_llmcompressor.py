"""GPTQ and AWQ by llm-compressor, with its defaults but for tokens, bits and group."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import fake_quantize
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from task import TASK, Clock, finish, hf_model, windows
from transformers import AutoTokenizer

WEIGHTS = {
    "num_bits": TASK["bits"],
    "type": "int",
    "symmetric": False,
    "strategy": "group",
    "group_size": TASK["group"],
}


def recipe() -> list:
    groups = {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}
    where = {"config_groups": groups, "ignore": ["lm_head"]}
    if TASK["method"] == "gptq":
        return [GPTQModifier(**where, **TASK["options"])]
    # Without an accelerator there is no memory to pin, and the attempt raises.
    IntermediatesCache.pin_memory = lambda self, batch_index: None
    return [AWQModifier(**TASK["options"]), QuantizationModifier(**where)]


@torch.no_grad()
def dequantize(linear: torch.nn.Linear) -> None:
    """Put the value that the stored codes, scale and zero point mean in place of the weight."""
    scheme = linear.quantization_scheme.weights
    scale, zero = linear.weight_scale, linear.weight_zero_point
    linear.weight.copy_(fake_quantize(linear.weight, scale, zero, scheme))


def main() -> None:
    model, tokens = hf_model(), windows()
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    with Clock() as clock:
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(TASK["model"]),
            dataset=Dataset.from_dict(rows),
            recipe=recipe(),
            num_calibration_samples=len(tokens),
            max_seq_length=tokens.shape[1],
        )
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            dequantize(module)
    finish(
        model.state_dict(),
        clock,
        "float32 scale (the model's type), integer zero point",
        "llmcompressor",
    )


if __name__ == "__main__":
    main()
