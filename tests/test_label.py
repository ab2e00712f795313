"""The grammar of labels against names that people use, published sizes, and qlib's own formats."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import gguf
import pytest

import qlib
from qlib import ggml, label

BOTH = "weights and activations"
ALL = "weights, activations and KV cache"
# Name, label in it, bits, group, what is quantized.
NAMES = """
Llama-3.1-8B-Instruct-UD-Q5_K_XL.gguf                        | UD-Q5_K_XL | 5 | 256 | weights
bartowski/Meta-Llama-3.1-8B-Instruct-Q4_K_M.gguf             | Q4_K_M | 4 | 256 | weights
mistral-7b-instruct-v0.1.Q4_K_S.gguf                         | Q4_K_S | 4 | 256 | weights
TheBloke/llama-2-7b.ggmlv3.q4_0.bin                          | q4_0 | 4 | 32 | weights
llama3:8b-instruct-q4_K_M                                    | q4_K_M | 4 | 256 | weights
Meta-Llama-3.1-8B-Instruct-Q4_0_4_4.gguf                     | Q4_0_4_4 | 4 | 32 | weights
Qwen2.5-32B-Instruct-Q6_K_L.gguf                             | Q6_K_L | 6 | 256 | weights
Qwen2.5-72B-Instruct-Q3_K_XL.gguf                            | Q3_K_XL | 3 | 256 | weights
gemma-2-27b-it-Q6_K.gguf                                     | Q6_K | 6 | 256 | weights
Qwen2.5-Coder-32B-Instruct.i1-Q5_K_M.gguf                    | Q5_K_M | 5 | 256 | weights
Qwen2.5-72B-Instruct.i1-IQ1_S.gguf                           | IQ1_S | 1 | 256 | weights
Meta-Llama-3.1-70B-Instruct-IQ1_M.gguf                       | IQ1_M | 1 | 256 | weights
Llama-3.3-70B-Instruct-IQ2_XXS.gguf                          | IQ2_XXS | 2 | 256 | weights
GritLM-8x7B.i1-IQ3_M.gguf                                    | IQ3_M | 3 | 256 | weights
Yi-34B-Chat-16K.IQ4_XS.gguf                                  | IQ4_XS | 4 | 256 | weights
Qwen3.5-9B-IQ4_NL.gguf                                       | IQ4_NL | 4 | 32 | weights
DeepSeek-R1-UD-IQ1_S-00001-of-00003.gguf                     | UD-IQ1_S | 1 | 256 | weights
hf.co/unsloth/Qwen3-1.7B-GGUF:UD-Q8_K_XL                     | UD-Q8_K_XL | 8 | 32 | weights
unsloth/DeepSeek-R1-0528-GGUF/UD-TQ1_0                       | UD-TQ1_0 | 1.58 | 256 | weights
TriLM_3.9B-TQ2_0.gguf                                        | TQ2_0 | 1.58 | 256 | weights
gpt-oss-20b-MXFP4_MOE.gguf                                   | MXFP4_MOE | 4 | 32 | weights
ggml-model-Q4_K_M-v2.gguf                                    | Q4_K_M | 4 | 256 | weights
my_model_Q8_0_final.gguf                                     | Q8_0 | 8 | 32 | weights
Llama-Sentient-3.2-3B-Instruct.F16.gguf                      | F16 | 16 | - | weights
Qwen3.5-2B-BF16.gguf                                         | BF16 | 16 | - | weights
gemma-7b-f32.gguf                                            | f32 | 32 | - | weights
Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4                           | GPTQ-Int4 | 4 | 128 | weights
Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8                           | GPTQ-Int8 | 8 | 128 | weights
Llama-2-7b-GPTQ-Int3-gs64                                    | GPTQ-Int3-gs64 | 3 | 64 | weights
TheBloke/Llama-2-7B-GPTQ                                     | GPTQ | 4 | 128 | weights
TheBloke/Llama-2-7B-GPTQ:gptq-4bit-32g-actorder_True         | gptq-4bit-32g | 4 | 32 | weights
gptq_model-4bit-128g.safetensors         | gptq_model-4bit-128g | 4 | 128 | weights
Llama-3-8B-4bit-gs32-gptq                                    | 4bit-gs32-gptq | 4 | 32 | weights
hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4           | AWQ-INT4 | 4 | 128 | weights
casperhansen/llama-3-8b-instruct-awq                         | awq | 4 | 128 | weights
Qwen/Qwen3-8B-AWQ                                            | AWQ | 4 | 128 | weights
the model in AWQ (4-bit g128), by its authors                | AWQ (4-bit g128) | 4 | 128 | weights
Intel/Qwen3-8B-int4-AutoRound                                | int4-AutoRound | 4 | 128 | weights
llama-7b-w4a16-awq                                           | w4a16-awq | 4 | 128 | weights
neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w4a16       | w4a16 | 4 | 128 | weights
neuralmagic/Meta-Llama-3.1-8B-Instruct-quantized.w8a16       | w8a16 | 8 | - | weights
RedHatAI/Llama-3.1-8B-Instruct-quantized.w8a8                | w8a8 | 8 | - | BOTH
some/Llama-W8A8-FP8                                          | W8A8-FP8 | 8 | - | BOTH
some/Llama-W8A8-INT8                                         | W8A8-INT8 | 8 | - | BOTH
some/Llama-W4A8-FP8                                          | W4A8-FP8 | 4 | 128 | BOTH
tencent/DeepSeek-V3.1-W4AFP8                                 | W4AFP8 | 4 | 128 | BOTH
QuaRot-Llama-2-7b-W4A4                                       | W4A4 | 4 | - | BOTH
mit-han-lab/Llama-3-8B-QServe-W4A8KV4                        | W4A8KV4 | 4 | 128 | ALL
RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic              | FP8-dynamic | 8 | - | BOTH
Qwen/Qwen3-8B-FP8                                            | FP8 | 8 | - | BOTH
amd/Llama-3.1-8B-Instruct-FP8-KV                             | FP8-KV | 8 | - | ALL
flux1-dev-fp8-e4m3fn.safetensors                             | fp8-e4m3fn | 8 | - | weights
t5xxl_fp8_e5m2.safetensors                                   | fp8_e5m2 | 8 | - | weights
nvidia/DeepSeek-R1-NVFP4                                     | NVFP4 | 4 | 16 | BOTH
RedHatAI/Qwen3-8B-NVFP4A16                                   | NVFP4A16 | 4 | 16 | weights
nvidia/DeepSeek-R1-0528-FP4                                  | FP4 | 4 | - | weights
mlx-community/gpt-oss-20b-MXFP4-Q8                           | MXFP4 | 4 | 32 | weights
amd/Llama-3.1-405B-Instruct-MXFP4                            | MXFP4 | 4 | 32 | weights
model-mxfp6_e3m2                                             | mxfp6_e3m2 | 6 | 32 | weights
model-MXFP8                                                  | MXFP8 | 8 | 32 | weights
unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit               | bnb-4bit | 4 | 64 | weights
hugging-quants/Meta-Llama-3.1-8B-Instruct-BNB-NF4            | BNB-NF4 | 4 | 64 | weights
meta/Llama-2-7b-nf4                                          | nf4 | 4 | 64 | weights
some/Llama-2-7b-bnb-int8                                     | bnb-int8 | 8 | - | BOTH
loaded with LLM.int8(), without calibration                  | LLM.int8() | 8 | - | BOTH
LoneStriker/Mixtral-8x7B-v0.1-4.0bpw-h6-exl2                 | 4.0bpw-h6-exl2 | 4 | - | weights
turboderp/Llama-3-8B-exl3-3.0bpw                             | exl3-3.0bpw | 3 | - | weights
turboderp/Qwen3-8B-exl3-2.25bpw-h8                           | exl3-2.25bpw-h8 | 2.25 | - | weights
turboderp/Llama-3.1-8B-Instruct-exl2                         | exl2 | - | - | weights
mlx-community/Mistral-7B-4bit-g64                            | 4bit-g64 | 4 | 64 | weights
mlx-community/Qwen3-8B-6bit                                  | 6bit | 6 | 64 | weights
lmstudio-community/Qwen3-8B-MLX-8bit                         | MLX-8bit | 8 | 64 | weights
mlx-community/Qwen3-4B-4bit-DWQ                              | 4bit-DWQ | 4 | 64 | weights
mlx-community/Llama-3.2-3B-Instruct-3bit-g32                 | 3bit-g32 | 3 | 32 | weights
mobiuslabsgmbh/Llama-3.1-8b-instruct_4bitgs64_hqq_calib      | 4bitgs64_hqq | 4 | 64 | weights
mobiuslabsgmbh/Llama-2-7b-chat-hf_4bitnogs_hqq               | 4bitnogs_hqq | 4 | - | weights
PrunaAI/Llama-2-7b-HQQ-2bit-smashed                          | HQQ-2bit | 2 | 64 | weights
ISTA-DASLab/Llama-2-7b-AQLM-2Bit-1x16-hf                     | AQLM-2Bit-1x16 | 2 | 8 | weights
ISTA-DASLab/Llama-2-7b-AQLM-PV-2Bit-2x8-hf                   | AQLM-PV-2Bit-2x8 | 2 | 8 | weights
ISTA-DASLab/Llama-2-7b-AQLM-PV-1Bit-1x16-hf                  | AQLM-PV-1Bit-1x16 | 1 | 16 | weights
relaxml/Llama-2-70b-E8P-2Bit                                 | E8P-2Bit | 2 | - | weights
relaxml/Llama-2-70b-E8PRVQ-4Bit                              | E8PRVQ-4Bit | 4 | - | weights
Llama-2-7b in QuIP#                                          | QuIP# | 2 | - | weights
relaxml/Llama-2-7b-QTIP-3Bit                                 | QTIP-3Bit | 3 | - | weights
1bitLLM/bitnet_b1_58-3B                                      | bitnet_b1_58 | 1.58 | - | weights
microsoft/bitnet-b1.58-2B-4T                                 | bitnet-b1.58 | 1.58 | - | weights
a ternary model                                              | ternary | 1.58 | - | weights
DeepSeek R1 in 1.58bit                                       | 1.58bit | 1.58 | - | weights
fp8 KV                                                       | fp8 KV | 8 | - | KV cache
kv_cache_dtype=fp8_e5m2                  | kv_cache_dtype=fp8_e5m2 | 8 | - | KV cache
llama-server -m model.gguf -ctk q8_0                         | -ctk q8_0 | 8 | 32 | KV cache
a q4_0 KV cache                                              | q4_0 KV cache | 4 | 32 | KV cache
some/Llama-3-8B-int4                                         | int4 | 4 | - | weights
some/Llama-3-8B-8bit                                         | 8bit | 8 | - | weights
"""
ROWS = [[cell.strip() for cell in line.split("|")] for line in NAMES.strip().splitlines()]
NOT_NAMES = """
Q-learning / A100 / v2.4 / 8B / int8ptr / int8_t / uint8 / Q4 report / IQ test / fp8_e9m9
4 bits of advice / openai/gpt-oss-20b / Llama-3-70B-Instruct-GGUF / Mixtral-8x7B / awkward AWQs
Q4_K_Z / Q4_K_MX / xQ4_K_M / Q9_K / Q4_2 / IQ5_XS / TQ3_0 / W4 / A16 / W9A16 / W44A16 / NF5
hawq / gptqs / 2.4bit / 1.4bpwx / F17 / 16-bit music / H100-80G / 128g / gs32 / exl4 / quip / E4M4
Qwen2.5-7B / MXFP5 / E8 / bitnets / mlx-community/whisper-tiny / kv / GPT-4 / Q8_K / fp8x
INT9 / QTIPs / 4bitter
"""


@pytest.mark.parametrize(("name", "found", "bits", "group", "what"), ROWS)
def test_real_names(name, found, bits, group, what):
    said = label.parse(name)
    assert said.name == found
    assert said.bits == (None if bits == "-" else float(bits))
    assert said.group == (None if group == "-" else int(group))
    assert said.quantizes == {"BOTH": BOTH, "ALL": ALL}.get(what, what)
    assert said.note.endswith(".")
    assert ". " not in said.note
    assert said == label.parse(found) or "mlx" in name


def test_there_are_enough_names():
    assert len({row[0] for row in ROWS}) >= 60
    assert len(NOT_NAMES.split(" / ")) >= 20


@pytest.mark.parametrize(
    "text", [t for line in NOT_NAMES.split("\n") for t in line.split(" / ") if t]
)
def test_no_label(text):
    assert label.find(text) is None


@pytest.mark.parametrize("family", label.EVERY, ids=lambda family: family.name)
def test_every_family(family):
    """Its own name is its own label in either case, and no part of a word."""
    said = label.parse(family.name)
    assert (said.format, said.note, said.method) == (family.format, family.note, family.method)
    for same in (family.name.lower(), family.name.upper()):
        assert replace(label.parse(same), name=said.name) == said
    for text in (f"x{family.name}", f"7{family.name}", f"{family.name}x", f"{family.name}7"):
        other = label.find(text)
        assert other is None or other.name != family.name


def expected(text):
    low_high = label.parse(text).expected_bpw
    return low_high if isinstance(low_high, tuple) else (low_high, low_high)


def blocks(sizes):
    """Labels that name a block of ggml whose bits are not those of `sizes`."""
    wrong = []
    for kind, (block, size) in sizes.items():
        said = label.find(kind.name) if kind.name in label.FILES else None
        if said and (said.expected_bpw != 8 * size / block or said.group != block):
            wrong.append(kind.name)
    return wrong


def test_blocks_have_the_bits_of_gguf():
    sizes = {k: v for k, v in gguf.GGML_QUANT_SIZES.items() if k.name in label.FILES}
    assert len(sizes) >= 20
    assert blocks(sizes) == []
    for kind, (block, size) in sizes.items():
        assert blocks(sizes | {kind: (block, size + 1)}) == [kind.name]
        assert label.parse(kind.name).bpw_of == "quantized weights"
        assert ggml.TYPES[kind.name].size == size


# Bits per weight of whole files: Llama-3-8B as published with its divergences, Llama-3.1-8B and
# Llama-2-7B, 13B, 70B by llama.cpp, Llama-3.1-70B (70.55e9 weights) by its publisher's file sizes.
PUBLISHED = """
Q8_0 8.50 Q6_K 6.56 Q5_K_M 5.70 Q4_K_M 4.89 IQ4_XS 4.46 Q3_K_M 4.0 Q2_K 3.16 IQ2_XXS 2.38
IQ1_S 2.0042 IQ1_M 2.1460 IQ2_XXS 2.3824 IQ2_XS 2.5882 IQ2_S 2.7403 IQ2_M 2.9294 IQ3_XXS 3.2548
IQ3_XS 3.4977 IQ3_S 3.6606 IQ3_M 3.7628 IQ4_XS 4.4597 IQ4_NL 4.6818 Q2_K_S 2.9697 Q2_K 3.1593
Q3_K_S 3.6429 Q3_K_L 4.2979 Q4_K_S 4.6672 Q4_K_M 4.8944 Q5_K_S 5.5704 Q5_K_M 5.7036 Q6_K 6.5633
Q8_0 8.5008 Q2_K 3.35 Q3_K_S 3.50 Q3_K_M 3.91 Q3_K_L 4.27 Q4_K_S 4.58 Q4_K_M 4.84 Q5_K_S 5.52
Q5_K_M 5.68 Q6_K 6.56 Q2_K 3.40 Q3_K_S 3.47 Q3_K_M 3.85 Q3_K_L 4.19 Q4_K_S 4.53 Q4_K_M 4.80
Q5_K_S 5.50 Q5_K_M 5.65
"""
GIGABYTES = """
Q8_0 74.98 Q6_K_L 58.40 Q6_K 57.89 Q5_K_L 50.60 Q5_K_M 49.95 Q5_K_S 48.66 Q4_K_L 43.30 Q4_K_M 42.52
Q4_K_S 40.35 Q3_K_XL 38.06 IQ4_XS 37.90 Q3_K_L 37.14 Q3_K_M 34.27 IQ3_M 31.94 Q3_K_S 30.91
IQ3_XS 29.31 Q2_K_L 27.40 Q2_K 26.38 IQ2_M 24.12 IQ2_S 22.24 IQ2_XS 21.14 IQ2_XXS 19.10 IQ1_M 16.75
"""


def published():
    for text, per in ((PUBLISHED, 1), (GIGABYTES, 8 / 70.55)):
        cells = text.split()
        yield from ((name, float(x) * per) for name, x in zip(cells[::2], cells[1::2]))


@pytest.mark.parametrize(("name", "bpw"), list(published()))
def test_whole_files_as_published(name, bpw):
    low, high = label.FILES[name]
    assert low - 0.005 <= bpw <= high + 0.005
    assert high - low <= 0.8
    said = label.parse(name)
    if said.bpw_of == "whole file":
        assert said.expected_bpw == (low, high)
    else:
        assert f"{low:g} to {high:g} bits" in said.note
        assert said.expected_bpw <= high
    # A file with one bit more is no such file.
    assert not low - 0.005 <= bpw + 1 <= high + 0.005


def test_dynamic_mixes_as_published():
    """DeepSeek-R1-UD-IQ1_S has 140231438464 bytes, Qwen3.6-27B-UD-Q8_K_XL 35.3 GB."""
    for name, bpw in (("UD-IQ1_S", 8 * 140231438464 / 671e9), ("UD-Q8_K_XL", 8 * 35.3 / 27)):
        low, high = expected(name)
        assert low <= bpw <= high
        assert label.parse(name).bpw_of == "whole file"


@pytest.mark.parametrize("name", [row[0] for row in ROWS] + [f.name for f in label.EVERY])
def test_bits_are_those_of_the_format_in_qlib(name):
    """What a label expects is what the format of that name really takes for a matrix."""
    said = label.parse(name)
    if said.qlib is None:
        return
    bpw = 8 * qlib.format(said.qlib).nbytes((4096, 4096)) / 4096**2
    low, high = expected(name)
    assert low - 1e-4 <= bpw <= high + 1e-4


@pytest.mark.parametrize(
    ("name", "bpw", "same"),
    [
        ("GPTQ-Int4", 4.15625, "int4-g128-asym"),
        ("GPTQ-Int3-gs64", 3 + 19 / 64, "int3-g64-asym"),
        ("AWQ", 4.15625, "int4-g128-asym"),
        ("W4A16", 4.125, "int4-g128"),
        ("W4A16_ASYM", 4.15625, "int4-g128-asym"),
        ("HQQ-4bit-asym", 4.5, "int4-g64-offset"),
        ("mlx 4bit", 4.5, "int4-g64-offset"),
        ("mlx 8bit-g32", 9.0, "int8-g32-offset"),
        ("HQQ", 4.5, "int4-g64-offset"),
        ("4bitnogs_hqq", (4, 4.02), "int4-offset"),
        ("NVFP4", 4.5, "nvfp4"),
        ("MXFP4", 4.25, "mxfp4"),
        ("MXFP6", 6.25, "mxfp6_e2m3"),
        ("MXFP8", 8.25, "mxfp8_e4m3"),
        ("bnb-4bit", (4.127, 4.5), "nf4"),
        ("FP8-dynamic", (8, 8.02), "fp8_e4m3"),
        ("E5M2", (8, 8.02), "fp8_e5m2"),
        ("INT8", (8, 8.02), "int8"),
        ("int5", (5, 5.6), None),
        ("int4-g32-asym", 4.625, "int4-g32-asym"),
        ("exl2", (2, 8), None),
        ("2.25bpw-exl3", (2.25, 2.27), None),
        ("BF16", 16.0, None),
    ],
)
def test_bits_by_hand(name, bpw, same):
    said = label.parse(name)
    assert (said.expected_bpw, said.qlib) == (bpw, same)


def test_codebooks_of_aqlm():
    """65536 vectors of 8 float16 for each matrix of 122M (70B) or 29M weights (7B)."""
    for weights, bpw in zip((122e6, 29e6), expected("AQLM-2Bit-1x16")):
        assert bpw == pytest.approx(2 + 65536 * 8 * 16 / weights, abs=0.005)
    for weights, bpw in zip((122e6, 29e6), expected("AQLM-1Bit-1x16")):
        assert bpw == pytest.approx(1 + 65536 * 16 * 16 / weights, abs=0.005)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Q4_0_4_4 and Q4_0", "Q4_0_4_4"),
        ("UD-Q4_K_XL", "UD-Q4_K_XL"),
        ("BF16-AWQ", "AWQ"),
        ("AWQ-BF16", "AWQ"),
        ("NVFP4 with fp8 KV cache", "NVFP4"),
        ("BF16 with fp8 KV cache", "fp8 KV cache"),
        ("q8_0 KV", "q8_0 KV"),
        ("4bit-int8-Q2_K", "Q2_K"),
        ("mlx-community/x-4bit-AWQ", "4bit-AWQ"),
        ("Q4_K_M Q5_K_M", "Q5_K_M"),
        ("NVFP4-FP8-KV", "NVFP4"),
    ],
)
def test_most_specific_label_wins_in_any_order(text, found, monkeypatch):
    assert label.find(text).name == found
    shuffled = label.EVERY.copy()
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        monkeypatch.setattr(label, "EVERY", shuffled)
        assert label.find(text).name == found


def test_order_of_families_does_not_matter(monkeypatch):
    texts = [row[0] for row in ROWS] + [family.name for family in label.EVERY]
    before = [label.find(text) for text in texts]
    monkeypatch.setattr(label, "EVERY", label.EVERY[::-1])
    assert [label.find(text) for text in texts] == before


def test_mlx_is_said_elsewhere_in_the_name():
    assert label.parse("mlx-community/Mistral-7B-4bit").containers == ("MLX",)
    assert label.parse("someone/Mistral-7B-4bit").containers == ()
    assert label.parse("mlx-community/Qwen3-8B-4bit-AWQ").containers == ("MLX",)
    assert label.parse("someone/Qwen3-8B-4bit-AWQ").containers == ("safetensors",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Q4_K_Z", "no quantization label in 'Q4_K_Z'; did you mean Q4_K_"),
        ("Llama-3-8B-Q4KM.gguf", "did you mean Q4_K_M"),
        ("model-NVPF4", "did you mean NVFP4"),
        ("W4A17", "did you mean W4A16"),
        ("openai/gpt-oss-20b", "labels look like Q4_K_M or FP8"),
        ("", "no quantization label in ''; labels look like"),
    ],
)
def test_no_label_is_an_error_with_near_ones(text, message):
    with pytest.raises(ValueError, match="no quantization label") as caught:
        label.parse(text)
    assert message in str(caught.value)


def test_cached_formats():
    said = label.parse("--cache-type-k q8_0")
    assert (said.quantizes, said.bpw_of, said.expected_bpw) == ("KV cache", "cached values", 8.5)
    assert label.parse("q8_0").quantizes == "weights"


@pytest.mark.parametrize(
    "piece", ["4bit-", "128g", "Q4_K_", "1.", "a", "kv_", "int4-g32-", "(", "fp8 "]
)
def test_long_texts_take_no_quadratic_time(piece):
    start = time.process_time()
    label.find(piece * (40_000 // len(piece)))
    assert time.process_time() - start < 30


def test_numbers_of_bits_that_make_no_sense():
    assert label.find("exl2.4.0bpw").bits == 4
    assert label.find("0bpw") is label.find("model-0.0bpw") is None
