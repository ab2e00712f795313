"""SmoothQuant by llm-compressor or LLM.int8() by bitsandbytes: what the model computes with them.

Quantized activations leave no weights that could be judged elsewhere, so this runner writes, to
states.safetensors, the hidden states before the head for every batch of the evaluation text.
"""

from __future__ import annotations

import json
import time
from importlib import metadata

import torch
from safetensors.torch import load_file, save_file
from task import PATH, TASK, hf_model, windows
from torch import nn


def smoothquant(model: nn.Module, strength: float, activations: dict) -> None:
    """Weights in int8 with a scale for a row; `activations` in the words of compressed-tensors."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from transformers import AutoTokenizer

    bits = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": bits | {"strategy": "channel"},
        "input_activations": bits | activations,
    }
    tokens = windows()
    rows = {"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()}
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(TASK["model"]),
        dataset=Dataset.from_dict(rows),
        recipe=[
            SmoothQuantModifier(smoothing_strength=strength),
            QuantizationModifier(config_groups={"group_0": group}, ignore=["lm_head"]),
        ],
        num_calibration_samples=len(tokens),
        max_seq_length=tokens.shape[1],
    )


def llm_int8(model: nn.Module, threshold: float) -> None:
    """Every linear layer but the head, as transformers does with load_in_8bit."""
    from bitsandbytes.nn import Linear8bitLt

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name, old in linears:
        if name == "lm_head":
            continue
        has_bias = old.bias is not None
        new = Linear8bitLt(
            old.in_features, old.out_features, has_bias, has_fp16_weights=False, threshold=threshold
        )
        new.load_state_dict(old.state_dict())
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new.to("cpu").eval())


METHODS = {"smoothquant": (smoothquant, "llmcompressor"), "llm.int8": (llm_int8, "bitsandbytes")}


def main() -> None:
    method, package = METHODS[TASK["method"]]
    model, start = hf_model(), time.perf_counter()
    method(model, **TASK["options"])
    seconds, decoder = time.perf_counter() - start, model.get_decoder()
    batches = load_file(TASK["evaluation.safetensors"])
    with torch.no_grad():
        states = {n: decoder(input_ids=ids).last_hidden_state for n, ids in batches.items()}
    save_file(states, PATH.with_name("states.safetensors"))
    versions = {name: metadata.version(name) for name in ("torch", "transformers", package)}
    PATH.with_name("result.json").write_text(json.dumps({"seconds": seconds, "versions": versions}))


if __name__ == "__main__":
    main()
