"""Logits of folders by transformers: for each one, of its tokens.st, in its logits.st.

The kernels are gptqmodel's plain ones. With those that it would choose by itself for 4 bits on a
processor, logits differ ten times as much.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AwqConfig, GPTQConfig


def kernels(folder: Path) -> GPTQConfig:
    """What transformers adds to the settings of the file: the kernel alone."""
    method = AutoConfig.from_pretrained(folder).quantization_config["quant_method"]
    if method == "awq":
        return AwqConfig(backend="torch_awq")
    return GPTQConfig(bits=4, backend="torch")


@torch.no_grad()
def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        tokens = load_file(folder / "tokens.st")["tokens"]
        try:
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, device_map="cpu", quantization_config=kernels(folder)
            )
            logits = model(tokens).logits.float()
        except Exception as error:
            # Whatever a loader objects to is its answer; the next folder is asked all the same.
            (folder / "error.txt").write_text(f"{type(error).__name__}: {error}"[:300])
            continue
        save_file({"logits": logits.contiguous()}, folder / "logits.st")


if __name__ == "__main__":
    main()
