"""A real llama.cpp, run as a program of its own: a request on stdin, its answers on stdout.

Never imported into a test's process: two builds of ggml in one process crash each other.
"""

from __future__ import annotations

import json
import sys
import urllib.request


def main() -> None:
    import xllamacpp

    request = json.load(sys.stdin)
    params = xllamacpp.CommonParams()
    params.model.path = request["path"]
    params.n_ctx, params.n_parallel = request["context"], 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    # Keys and values in float32, so that only the matrix products are less precise than ours.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    json.dump([answer(server, prompt, request) for prompt in request["prompts"]], sys.stdout)


def answer(server, prompt: str, request: dict) -> dict:
    """The ids of a prompt, the ids that follow it greedily, and every token's log-probability."""
    sampling = {"temperature": 0, "n_probs": request["vocabulary"], "cache_prompt": False}
    # A ban changes what is chosen, not the log-probabilities.
    sampling["logit_bias"] = [[token, False] for token in request["banned"]]
    length = {"prompt": prompt, "max_tokens": request["tokens"], "ignore_eos": False}
    found = server.handle_completions(length | sampling)["choices"][0]["logprobs"]["content"]
    logs = []
    for step in found:
        row = {entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}
        logs.append([row.get(i) for i in range(request["vocabulary"])])
    return {"prompt": tokenize(server, prompt), "ids": [step["id"] for step in found], "logs": logs}


def tokenize(server, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body)
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)["tokens"]


if __name__ == "__main__":
    main()
