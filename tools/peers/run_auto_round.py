"""AutoRound and AWQ by auto-round, with its defaults but for tokens, bits, group and steps."""

from __future__ import annotations

from auto_round import AutoRound
from auto_round.algorithms.quantization.sign_round.config import SignRoundConfig
from auto_round.algorithms.transforms.awq.config import AWQConfig
from task import TASK, Clock, finish, hf_model, windows
from transformers import AutoTokenizer

CONFIGS = {"autoround": SignRoundConfig, "awq": AWQConfig}


def main() -> None:
    model, tokens = hf_model(), windows()
    tuner = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(TASK["model"]),
        alg_configs=CONFIGS[TASK["method"]](**TASK["options"]),
        bits=TASK["bits"],
        group_size=TASK["group"],
        sym=False,
        dataset=list(tokens.split(8)),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        # In float32 as everyone else here; by default the forward passes run in bfloat16.
        amp=False,
        enable_torch_compile=False,
    )
    with Clock() as clock:
        model, _ = tuner.quantize()
    stores = "float16 scale, integer zero point"
    finish(model.state_dict(), clock, stores, "auto-round", "transformers")


if __name__ == "__main__":
    main()
