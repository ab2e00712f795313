"""The widget "decode a label": its script, run by Node, must find what `qlib.label` finds."""

from __future__ import annotations

import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from node import run
from test_label import NOT_NAMES, ROWS

from qlib import label
from qlib.families import Family
from qlib.widgets.label import COLUMNS, EXAMPLES, Label, grammar, portable

STATE = Label().get_state()
DECODE = """({ grammar, texts }) => {
    const families = compile(grammar);
    return texts.map(text => {
        const { matches, labels } = decode(grammar, families, text);
        const hints = labels.length ? [] : near(families, text);
        return { spans: matches.map(m => [m.start, m.end]), labels, near: hints };
    });
}"""
MORE = """
Q4_0_4_4 and Q4_0 / NVFP4 with fp8 KV cache / BF16 with fp8 KV cache / 4bit-int8-Q2_K / AWQ-BF16
mlx-community/x-4bit-AWQ / Q4_K_M Q5_K_M / NVFP4-FP8-KV / W4A16_ASYM / HQQ-4bit-asym / 4bitnogs_hqq
int5 / AQLM / 1bpw / int4-g32-asym / 2.25bpw-exl3 / W4A17 / model-NVPF4 / Llama-3-8B-Q4KM.gguf
exl2.4.0bpw / 0bpw / model-0.0bpw-h6
mlx-community/gpt-oss-20b-MXFP4-Q8 / 模型-Q4_K_M / Ünïcode_awq.gguf / 😀 GPTQ 😀 AWQ / modèle-Q4KM
"""
# What names are made of, to be joined at random.
PIECES = """
Q4_K_M q4_k UD-Q5_K_XL IQ2_XXS UD TQ1_0 MXFP4_MOE GPTQ gptq-int4 AWQ 4bit 8-bit int3 INT8 128g g32
gs64 asym sym nogs hqq autoround mlx MLX-8bit Q8 dwq W4A16 w8a8 kv8 KV cache fp8 FP8-dynamic e4m3fn
nvfp4 nvfp4a16 mxfp4 mxfp6 e3m2 bnb nf4 llm.int8() exl2 3.5bpw h6 aqlm 2Bit 1x16 quip# qtip bitnet
b1.58 1.58bit ternary BF16 f32 Llama 8B -ctk kv_cache_dtype= 7 x ( ) M XL v2 int4_t é K
"""


def joined(count: int) -> list[str]:
    draw, pieces = random.Random(0), PIECES.split()
    parts = ([draw.choice(pieces) for _ in range(draw.randint(1, 5))] for _ in range(count))
    return ["".join(part + draw.choice(["-", "_", "/", " ", ""]) for part in p) for p in parts]


def split(lines: str) -> list[str]:
    return [text for line in lines.split("\n") for text in line.split(" / ") if text]


NAMES = [row[0] for row in ROWS] + split(NOT_NAMES)
FAMILIES = [one.name for one in label.EVERY]
TEXTS = [*NAMES, *split(MORE), "", " ", *EXAMPLES, *FAMILIES]
TEXTS += [text for name in FAMILIES for text in (name.lower(), name.upper(), f"{name}x")]
TEXTS += joined(600)


def hints(text: str) -> list[str]:
    """The nearest labels that `qlib.label.parse` names."""
    with pytest.raises(ValueError, match="no quantization label") as caught:
        label.parse(text)
    near = re.search(r"; did you mean (.*)\?$", str(caught.value))
    return near[1].split(", ") if near else []


def library(text: str) -> dict:
    """The label that qlib finds, first, and those of all other spans within no other one."""
    found = [(m, family) for family in label.EVERY for m in family.matches(text)]
    spans = sorted(label.outermost({m.span() for m, _ in found}))
    own = [[pair for pair in found if pair[0].span() == span] for span in spans]
    most = [max(pairs, key=lambda pair: (pair[1].rank, bool(pair[1].needs))) for pairs in own]
    labels = [family.label(m[0]) for m, family in most]
    best = label.find(text)
    if best:
        # Spans in UTF-16, as JavaScript counts.
        ends = [[len(text[:at].encode("utf-16-le")) // 2 for at in span] for span in spans]
        at = max(i for i, one in enumerate(labels) if one == best)
        labels = [labels.pop(at), *labels]
    else:
        ends = []
    told = {"spans": ends, "labels": [asdict(one) for one in labels]}
    return json.loads(json.dumps(told | {"near": [] if best else hints(text)}))


@pytest.fixture(scope="module")
def expected():
    return [library(text) for text in TEXTS]


def wrong(rules: dict, expected: list[dict], texts: list[str] = TEXTS) -> dict[str, tuple]:
    """The texts in which the page finds something else, and both answers."""
    page = run(STATE["_esm"], DECODE, {"grammar": rules, "texts": texts})
    return {t: (one, two) for t, one, two in zip(texts, page, expected) if one != two}


def test_the_page_finds_what_the_library_finds(expected):
    assert len(NAMES) >= 140
    assert sum(len(one["labels"]) > 1 for one in expected) >= 100
    assert sum(not one["labels"] and len(one["near"]) > 1 for one in expected) >= 20
    assert wrong(STATE["grammar"], expected) == {}


def changed(name: str, **facts) -> dict:
    """The grammar with other facts about the families of one name."""
    every = [replace(one, **facts) if one.name == name else one for one in label.EVERY]
    return grammar(every)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (changed("UD-Q5_K_XL", pattern="UD-Q5_K_XXL"), "Llama-3.1-8B-Instruct-UD-Q5_K_XL.gguf"),
        (changed("GPTQ-Int4", extra=15), "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"),
        (changed("NVFP4", rank=0), "NVFP4 with fp8 KV cache"),
        (changed("mlx-4bit-g64", needs="mlx-community"), "lmstudio-community/Qwen3-8B-MLX-8bit"),
        (changed("AQLM-2Bit-1x16", expected_bpw=(2.07, 2.3)), "AQLM"),
        (STATE["grammar"] | {"frame": "(?:@)"}, "hawq"),
        (STATE["grammar"] | {"bits": "(9)"}, "Qwen/Qwen2.5-7B-Instruct-GPTQ-Int8"),
        (STATE["grammar"] | {"group": "(9)"}, "Llama-2-7b-GPTQ-Int3-gs64"),
        (STATE["grammar"] | {"shared": "w4a16"}, "gptq_model-4bit-128g.safetensors"),
        (grammar([one for one in label.EVERY if one.name != "NVFP4"]), "model-NVPF4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_grammar_is_noticed(rules, text):
    assert text in TEXTS
    assert set(wrong(rules, [library(text)], [text])) == {text}


SIZES = """
Llama-3.1-8B 8|Qwen3-0.6B-GGUF 0.6|gemma-3-270m-it 0.27|Qwen3-30B-A3B-4bit 30|gemma-2-27b-it 27
Mixtral-8x7B-v0.1 56|microsoft/bitnet-b1.58-2B-4T 2|Llama-2-7b_4bitgs64 7|llama3:8b-instruct 8
model.7B.gguf 7|Qwen3-235B-A22B 235|2bit None|DeepSeek-R1 None|gemma-3n-E4B None|1bitLLM None
0B None|Q4_K_M None|16-bit music None|8Bx None|1.5.7B None
"""


def test_the_size_that_a_name_tells():
    cells = [cell.rsplit(" ", 1) for line in SIZES.strip().split("\n") for cell in line.split("|")]
    sizes = "all => all.map(text => told(text)?.billions ?? null)"
    found = run(STATE["_esm"], sizes, [text for text, _ in cells])
    wanted = [None if size == "None" else float(size) for _, size in cells]
    assert dict(zip([text for text, _ in cells], found)) == dict(
        zip([text for text, _ in cells], wanted)
    )


def test_every_family_is_there_with_its_own_pattern():
    rules = STATE["grammar"]
    rows = [dict(zip(rules["columns"], row)) for row in rules["families"]]
    assert [row["name"] for row in rows] == FAMILIES
    assert set(rules["columns"]) == set(COLUMNS) == set(Family.__dataclass_fields__)
    for row, family in zip(rows, label.EVERY):
        whole = rules["frame"].replace("@", row["pattern"].replace("~", rules["shared"]))
        assert family.matches(family.name)[0].re.pattern == whole
        same = {name: row[name] for name in COLUMNS if name != "pattern"}
        assert same == {name: json.loads(json.dumps(getattr(family, name))) for name in same}


@pytest.mark.parametrize(
    ("pattern", "part"),
    [
        ("(?P<bits>4)bit", "(?P<bits>"),
        ("(?i)q4", "(?i"),
        ("(?>a+)b", "(?"),
        ("(a)?(?(1)b|c)", "(?"),
        (r"q4\Z", r"\Z"),
        (r"\bq4", r"\b"),
        (r"\w+4", r"\w"),
        ("a++b", "++"),
        ("a{,3}b", "{,"),
        ("é4", "é"),
    ],
)
def test_patterns_that_javascript_reads_in_another_way_are_refused(pattern, part):
    message = (
        f"new: JavaScript does not read {part!r} in the pattern as Python does; "
        r"write it with (?:...), \d and ASCII"
    )
    new = Family("new", 4, "integers", None, None, (), "A note.", pattern=pattern)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        portable(new)


def test_patterns_that_both_read_alike_are_taken():
    pattern = r"(?<![a-z])(?:a|b{1,2})?(?=\d)(?!4)(?<=\.)x+?\(\)"
    new = Family("new", 4, "integers", None, None, (), "A note.", pattern=pattern)
    assert portable(new) == pattern


def test_the_first_view():
    widget = Label("Q4_K_M", billions=70)
    assert (widget.text, widget.billions, len(widget.examples)) == ("Q4_K_M", 70.0, 6)
    assert (STATE["text"], STATE["billions"]) == (EXAMPLES[0], None)
    assert all(label.find(text) for text in EXAMPLES)
    assert repr(widget) == "<Label: interactive figure>"


@pytest.mark.parametrize("billions", [0, -1.0, float("nan"), float("inf")])
def test_impossible_sizes_are_refused(billions):
    message = f"billions of weights is a positive number, got {billions}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Label("Q4_K_M", billions)


def test_the_data_is_small_plain_json():
    text = json.dumps(STATE["grammar"], allow_nan=False)
    assert json.loads(text) == STATE["grammar"]
    assert len(text) < 50_000


def test_the_script_is_small_and_asks_no_other_host():
    script = (Path(label.__file__).parent / "widgets/label.js").read_text(encoding="utf-8")
    assert len(script.encode()) < 12_000
    assert not re.search(r"https?:|//[a-z]+\.|import\s|fetch\(|innerHTML", script)
    assert script.rstrip().endswith("export default { render };")
