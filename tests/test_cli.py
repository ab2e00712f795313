"""The command line: answers, JSON, exit codes, refusals word for word, and files as inspected."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import gguf as peer
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import qlib
from qlib import cli, zoo
from qlib.cli.text import printable, to_json
from qlib.files import gguf, hf
from qlib.files.inspect import inspect_file
from qlib.model import Config, Decoder

ROOT = Path(__file__).resolve().parents[1]
CONFIG = Config(1024, 32, 64, 2, 4, 2, 8, max_position_embeddings=64)


def save_tiny(folder: Path, dtype: torch.dtype = torch.float32) -> str:
    model = Decoder(CONFIG).normal_init(0.2, torch.Generator().manual_seed(0)).to(dtype)
    tokenizer = zoo.load("bpw-small")[1]
    hf.save_checkpoint(folder, CONFIG, model.state_dict(), tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def run(capsys):
    """Run a command; its exit code, stdout and stderr."""

    def run(*arguments) -> tuple[int, str, str]:
        code = cli.main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def data(run):
    """Run a command with --json; its object, after a look at the exit code."""

    def data(*arguments) -> dict:
        code, out, err = run(*arguments, "--json")
        assert (code, out.count("\n")) == (0, 1), err
        return json.loads(out)

    return data


def decoded(name: str) -> dict[str, torch.Tensor]:
    """Every weight that a model computes with, float32."""
    model = zoo.load(name)[0]
    found = {n: p.float() for n, p in model.named_parameters()}
    packed = {n: m for n, m in model.named_modules() if isinstance(m, qlib.QLinear)}
    return found | {f"{n}.weight": m.weight.dequantize() for n, m in packed.items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x, other[n]) for n, x in one.items())


# plan


def test_plan_says_what_quantize_then_writes(data, tiny, tmp_path):
    options = ("--format", "int4-g16", "--rule", "*.down_proj=int8-row", "--rule", "*.0.*=none")
    planned = data("plan", tiny, *options)
    done = data("quantize", tiny, tmp_path / "out", *options)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    nbytes = sum(t.numel() * t.element_size() for t in stored.values())
    assert planned["bytes"] == done["bytes"] == sum(planned["bytes_by_kind"].values()) == nbytes
    codes = sum(t.numel() for n, t in stored.items() if n.endswith(".codes"))
    assert planned["bytes_by_kind"]["codes"] == codes
    kept = {row["layer"] for row in planned["layers"] if row["format"] is None}
    assert kept == {n for n in kept if ".0." in n and "down" not in n}
    assert len(kept) == 6
    # The twin: without the rules other bytes are planned.
    assert data("plan", tiny, "--format", "int4-g16")["bytes"] != nbytes


def test_plan_of_a_mix_says_what_the_file_then_holds(data, tmp_path):
    planned = data("plan", "bpw-small", "--mix", "Q8_0")
    file = tmp_path / "small.gguf"
    assert data("quantize", "bpw-small", file, "--mix", "Q8_0")["file"]["bytes"] == planned["bytes"]
    stored = {t.name: (t.tensor_type.name, t.n_bytes) for t in peer.GGUFReader(file).tensors}
    assert stored == {row["tensor"]: (row["type"], row["bytes"]) for row in planned["tensors"]}
    assert data("plan", "bpw-small", "--mix", "Q4_0")["bytes"] != planned["bytes"]


def test_plan_prints_a_table_and_what_falls_back(run, tiny):
    code, out, err = run("plan", tiny, "--format", "int4-g16", "--method", "gptq")
    assert (code, err) == (0, "")
    # 32 columns: 16 bytes of codes and 2 scales a row; the layers are two.
    row = "  self_attn.q_proj   [32, 32]  int4-g16       2    1,280            5.000"
    assert row in out.splitlines()
    # Hessians of float32: six layers of 32 inputs, one of 64; tokens go in and come out.
    peak = sum(p.numel() for p in Decoder(CONFIG).parameters()) + 6 * 32**2 + 64**2 + 2 * 8192 * 32
    assert f"peak:   about {4 * peak / 1e6:.1f} MB besides Python, for the model and " in out
    assert max(map(len, out.splitlines()[1:])) <= 100
    out = run("plan", tiny, "--mix", "Q4_K_M")[1]
    reason = "ncols 32 not divisible by 256 (required for type q4_K) -> q5_0"
    # All matrices but the embedding, which is Q8_0 at once; three have 64 columns or Q6_K.
    assert f"fallback: 11 tensor(s), {reason}" in out.splitlines()
    assert sum(int(n) for n in re.findall(r"fallback: (\d+) tensor", out)) == 14


def test_plan_on_paper(data, run):
    planned = data("plan", "Llama-3.1-8B", "--format", "int4-g128")
    assert (planned["weights"], planned["bytes"]) == (8030261248, 5700591616)
    out = run("plan", "Llama-3.1-8B", "--format", "int4-g128")[1].splitlines()
    start = (
        "Llama-3.1-8B, as published: 8,030,261,248 weights; 5.7 GB, 5.679 bits per weight in all"
    )
    assert out[0] == start
    assert out[-1] == "memory: 5.7 GB, and 1.1 GB for 8,192 tokens of 16-bit cache"
    rows = [int(line.split()[-2].replace(",", "")) for line in out[2:-1]]
    assert sum(rows) == planned["bytes"]


# quantize and convert


def test_quantize_with_a_method_that_looks_at_data(run, tiny, tmp_path):
    out = tmp_path / "out"
    options = ("--format", "int4-g16", "--method", "gptq", "--tokens", "512", "--resume")
    code, text, err = run("quantize", tiny, out, *options, tmp_path / "kept")
    assert code == 1, "windows of 256 tokens do not fit a context of 64"
    remedy = "use Calibration.of(tokens, context=64)"
    message = f"calibration windows have 256 tokens, the model reads 64: {remedy}"
    assert (text, err) == ("", f"qlib: {message}\n")
    code, text, err = run("quantize", tiny, out, *options[:-1], "--context", 64)
    assert code == 0, err
    assert "512 tokens in 8 windows of up to 64, all used" in text
    code, text, err = run("quantize", "bpw-small", out, *options, tmp_path / "kept")
    assert code == 0, err
    assert "  method           gptq\n  calibration      512 tokens in 3 windows" in text
    files = [path.stat().st_size for path in out.iterdir()]
    assert text.splitlines()[-1] == f"written to {out}: {sum(files):,} bytes in 3 files"
    assert len(list((tmp_path / "kept").glob("*.json"))) == 3
    expected, tokenizer = zoo.load("bpw-small")
    calibration = qlib.Calibration.text(tokenizer, "calibration", 512)
    qlib.quantize_model(expected, "int4-g16", "gptq", calibration, progress=False)
    assert not same(decoded("bpw-small"), decoded(out))
    state = zoo.load(out)[0].state_dict()
    assert all(torch.equal(t, state[n]) for n, t in expected.state_dict().items())


def test_activations_are_planned_quantized_written_and_inspected(run, data, tiny, tmp_path):
    kind = "int8, block row, absmax, scale float16, dynamic"
    code, text, _ = run("plan", tiny, "--format", "w8a8")
    assert code == 0
    assert f"\ninputs: {kind} (14 layers)\n" in text
    assert re.search(r"q_proj +\[32, 32\] +int8-row", text)
    layers = data("plan", tiny, "--format", "int4-g32", "--activations", "int8-row")["layers"]
    assert {(step["format"], step["inputs"]) for step in layers} == {("int4-g32", kind)}
    layers = data("plan", tiny, "--format", "w8a8", "--activations", "none")["layers"]
    assert {step["inputs"] for step in layers} == {None}
    out, more = str(tmp_path / "out"), ("--tokens", "128", "--context", "64", "--quiet")
    assert run("quantize", tiny, out, "--format", "w8a8-static", *more)[0] == 0
    found = data("inspect", out)["inputs"]
    assert len(found) == 1
    assert json.loads(found[0])["static"]["block"] == "tensor"
    assert '\ninputs: {"static": {"grid": "int8"' in run("inspect", out)[1]
    model = zoo.load(out)[0]
    layer = model.model.layers[1].mlp.down_proj
    assert layer.inputs.low < 0 < layer.inputs.high


def test_activations_are_refused_before_the_work(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "quantize_model", None)
    line = ("quantize", tiny, str(tmp_path / "o"), "--format", "fp8", "--activations", "int8-row",
            "--container", "compressed-tensors")  # fmt: skip
    code, _, error = run(*line)
    assert code == 1
    assert error.startswith(
        "qlib: model.layers.0.self_attn.q_proj [32, 32]: compressed-tensors cannot hold inputs as "
        "int8, block row, absmax, scale float16, dynamic: vLLM has "
    )
    assert not (tmp_path / "o").exists()


def test_convert_keeps_packed_bytes_and_all_values(data, tiny, tmp_path):
    data("quantize", tiny, tmp_path / "q4", "--format", "q4_0")
    done = data("convert", tmp_path / "q4", tmp_path / "q4.gguf")
    assert (done["packed"], done["dense"], done["dtype"]) == (14, 6, "float32")
    assert done["file"]["types"]["Q4_0"]["tensors"] == 14
    stored = load_file(tmp_path / "q4/model.safetensors")
    blocks = gguf.read(tmp_path / "q4.gguf").raw("blk.1.ffn_down.weight")
    ours = stored["model.layers.1.mlp.down_proj.weight.blocks"].flatten()
    assert torch.equal(torch.from_numpy(blocks.copy()), ours)
    assert same(decoded(tmp_path / "q4"), decoded(tmp_path / "q4.gguf"))
    # The twin: one bit of one block.
    stored["model.layers.1.mlp.down_proj.weight.blocks"][0, 5] ^= 1
    with safe_open(tmp_path / "q4/model.safetensors", "pt") as file:
        metadata = file.metadata()
    save_file(stored, tmp_path / "q4/model.safetensors", metadata)
    assert not same(decoded(tmp_path / "q4"), decoded(tmp_path / "q4.gguf"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_convert_takes_the_narrowest_dtype_that_is_exact(data, tmp_path, dtype):
    model, name = save_tiny(tmp_path / "in", dtype), str(dtype).removeprefix("torch.")
    kind = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[name]
    done = data("convert", model, tmp_path / "out.gguf")
    assert done["dtype"] == name
    assert done["file"]["mix"] == kind
    assert data("convert", model, tmp_path / "out")["dtype"] == name
    assert same(decoded(model), decoded(tmp_path / "out.gguf"))
    assert same(decoded(model), decoded(tmp_path / "out"))


def test_convert_refuses_what_the_container_cannot_hold(run, data, tiny, tmp_path):
    data("quantize", tiny, tmp_path / "q", "--format", "int4-g16")
    code, out, err = run("convert", tmp_path / "q", tmp_path / "q.gguf")
    assert (code, out) == (1, "")
    start = "qlib: model.layers.0.self_attn.q_proj: a GGUF file cannot hold its format (int4, "
    assert err.startswith(start)
    assert err.count("\n") == 1
    assert not (tmp_path / "q.gguf").exists()


def test_convert_refuses_float64(run, tiny, tmp_path):
    tensors = load_file(f"{tiny}/model.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes(Path(tiny, name).read_bytes())
    tensors["model.norm.weight"] = tensors["model.norm.weight"].double()
    save_file(tensors, tmp_path / "model.safetensors")
    message = "model.norm.weight: is float64, which no container here keeps exactly"
    assert run("convert", tmp_path, tmp_path / "x.gguf") == (1, "", f"qlib: {message}\n")


def test_quiet_writes_the_file_and_says_nothing(run, tiny, tmp_path):
    quantize = ("quantize", tiny, tmp_path / "q.gguf", "--mix", "Q4_0", "--quiet")
    assert run(*quantize) == (0, "", "")
    assert run("convert", tmp_path / "q.gguf", tmp_path / "folder", "-q") == (0, "", "")
    assert (tmp_path / "folder/model.safetensors").is_file()


# inspect


def test_inspect_gguf_equals_another_reader(data, run, tmp_path):
    file = tmp_path / "x.gguf"
    data("quantize", "bpw-small", file, "--mix", "Q4_0")
    found, theirs = data("inspect", file), peer.GGUFReader(file)
    rows = [[t.name, t.tensor_type.name, [*map(int, t.shape[::-1])], t.n_bytes]
            for t in theirs.tensors]  # fmt: skip
    assert [list(row.values()) for row in found["tensors"]] == rows
    assert found["container"] == "gguf"
    nbytes, weights = (sum(map(int, x)) for x in zip(*((r[3], math.prod(r[2])) for r in rows)))
    assert found["bits_per_weight"] == 8 * nbytes / weights
    assert found["metadata"]["llama.block_count"] == 3
    assert found["metadata"]["tokenizer.ggml.tokens"] == "1024 values (--all)"
    tokens = data("inspect", file, "--all")["metadata"]["tokenizer.ggml.tokens"]
    assert tokens == theirs.fields["tokenizer.ggml.tokens"].contents()
    out = run("inspect", file)[1].splitlines()
    assert (
        out[0]
        == f"{file}: gguf, 29 tensors, {nbytes:,} bytes, {8 * nbytes / weights:.3f} bits per weight"
    )
    assert out[-1] == "  ... and 9 more (--all)"
    assert max(map(len, out[1:])) <= 100
    assert len(run("inspect", file, "--all")[1].splitlines()) > len(out)


def test_inspect_safetensors_equals_another_reader(data, tmp_path):
    tensors = {
        "a": torch.zeros(4, 3, dtype=torch.float8_e4m3fn), "b": torch.zeros(3, dtype=torch.bool),
        "c": torch.zeros(2, dtype=torch.int64), "d": torch.zeros((), dtype=torch.bfloat16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors", {"note": "two\x1b[2J\nlines"})
    found = data("inspect", tmp_path / "x.safetensors")
    raw = (tmp_path / "x.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
    assert found["metadata"] == header.pop("__metadata__")
    rows = {t["name"]: (t["type"], t["shape"], t["bytes"]) for t in found["tensors"]}
    assert rows == {
        n: (h["dtype"], h["shape"], h["data_offsets"][1] - h["data_offsets"][0])
        for n, h in header.items()
    }
    assert found["weights"] is None


def test_inspect_a_quantized_folder_counts_the_weights_of_its_model(data, tiny, tmp_path):
    data("quantize", tiny, tmp_path / "q", "--format", "int4-g16")
    found = data("inspect", tmp_path / "q")
    assert found["container"] == "qlib"
    assert found["metadata"]["quantization_config"] == {"quant_method": "qlib"}
    weights = sum(p.numel() for p in Decoder(CONFIG).parameters())
    assert (found["weights"], data("inspect", tiny)["weights"]) == (weights, weights)
    assert data("inspect", tiny)["bits_per_weight"] == 32
    # Without a config that can be read nobody knows what the bytes stand for.
    config = json.loads((tmp_path / "q/config.json").read_text())
    (tmp_path / "q/config.json").write_text(json.dumps(config | {"model_type": "other"}))
    assert data("inspect", tmp_path / "q")["weights"] is None


def test_inspect_loads_no_weight(tmp_path):
    """A file of 2^41 bytes, all hole, is inspected as fast as a small one."""
    path = tmp_path / "huge.safetensors"
    size = 1 << 41
    entry = {"dtype": "F32", "shape": [1 << 20, 1 << 19], "data_offsets": [0, size]}
    header = json.dumps({"w": entry}).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    assert inspect_file(path).nbytes == size


def test_inspect_names_and_labels(data, run):
    small = data("inspect", "bpw-small")
    assert small["path"] == str(zoo.SMALL_FOLDER)
    assert small["types"] == {"BF16": {"tensors": 29, "values": 2033408, "bytes": 4066816}}
    assert data("inspect", "X-Q4_K_M.gguf")["label"]["expected_bpw"] == [4.8, 4.9]
    out = run("inspect", "X-Q4_K_M.gguf")[1].splitlines()
    assert out[0] == "Q4_K_M: no such file, but a label of quantization"
    assert "  bpw          4.8 to 4.9" in out


# eval


def test_eval_is_what_the_library_measures(data, run, tiny, tmp_path):
    data("quantize", tiny, tmp_path / "q", "--format", "int3-g16")
    options = ("--tokens", "300", "--context", "64")
    found = data("eval", tmp_path / "q", "--reference", tiny, *options)
    model, tokenizer = zoo.load(tmp_path / "q")
    protocol = qlib.Protocol.of(tokenizer, tokens=300, context=64)
    expected = qlib.divergence(zoo.load(tiny)[0], model, protocol)
    assert (found["kl"], found["kl_error"]) == (expected.kl, expected.standard_error)
    assert (found["top1"], found["perplexity"]) == (expected.top1, expected.perplexity.value)
    assert found["protocol"] == str(protocol)
    assert str(protocol).startswith("evaluation, 299 tokens, context 64, stride 64")
    alone = data("eval", tmp_path / "q", *options)
    assert alone["perplexity"] == expected.perplexity.value
    assert "kl" not in alone
    # The twin: a model is not far from itself.
    assert data("eval", tiny, "--reference", tiny, *options)["kl"] < 1e-6 < found["kl"]
    out = run("eval", tmp_path / "q", "--reference", tiny, *options)[1].splitlines()
    assert out[0] == str(expected.perplexity)
    assert str(expected) == f"{out[1]} ({protocol})"


def test_a_number_that_is_not_finite_is_null_in_json(data, tiny):
    # One block of 64 tokens has no standard error.
    assert data("eval", tiny, "--tokens", "64", "--context", "64")["perplexity_error"] is None
    assert to_json({"a": [math.inf, 1.5], "b": Path("x")}) == '{"a": [null, 1.5], "b": "x"}'


def test_reference_with_another_tokenizer(run, tiny, tmp_path):
    other = save_tiny(tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:1]
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = run("eval", tiny, "--reference", other, "--tokens", "64", "--context", "64")
    assert (code, err) == (1, f"qlib: {tiny} and {other} cut the text into other tokens\n")


# Refusals, word for word

KNOWN = "known are 'smollm2-135m', 'bpw-small', folders, and .gguf files"
REFUSED = {
    "plan bpw-smal --format int4": f"unknown model 'bpw-smal': did you mean 'bpw-small'? {KNOWN}",
    "plan bpw-small --format int4-128": "unknown format 'int4-128': did you mean int4-g128, int8, "
    "nf4-g128-dq? qlib.formats() lists the names, qlib.recipes() those for models",
    "plan bpw-small --format int4 --activations int8-row-static": "int8, block row, absmax, scale "
    "float16 has scales for parts of the tensor; static inputs have one, as int8-tensor does",
    "plan bpw-small --format int4 --method gtpq": "unknown method 'gtpq': did you mean 'gptq'?",
    "plan bpw-small --format int4 --rule *.dwon=nf4": "rule '*.dwon' matches no layer; names look "
    "like model.layers.0.self_attn.q_proj (embeddings and the output head stay as they are)",
    "plan Llama-3.1-8B --mix Q4_K_M": "Llama-3.1-8B is only a published shape: give --format, "
    "without rules",
    "quantize bpw-small out --format int4 --container ggfu": "unknown container 'ggfu': did you "
    f"mean 'gguf'? known are {', '.join(zoo.CONTAINERS)}",
    "quantize bpw-small no/x.gguf --mix Q4_0": "no such folder: {here}/no",
    "quantize bpw-small file --format int4": "file: this is a file; give a folder",
    "convert bpw-small folder.gguf": "folder.gguf: this is a folder; give the path of a .gguf file",
    "convert file.gguf ./file.gguf": "file.gguf: this is the model itself; choose another place "
    "for the result",
    "inspect nothing.bin": "no such file or folder: nothing.bin",
    "inspect file": "file: is neither a .gguf nor a .safetensors file",
    "inspect folder.gguf": "folder.gguf: no .safetensors file in this folder; inspect "
    "'folder.gguf/a.gguf'",
    "eval bpw-small --text evalution": "unknown text 'evalution': did you mean 'evaluation'? known "
    "are 'calibration' and 'evaluation', or the path of a file",
    "eval bpw-small --context 300 --tokens 400": "300 tokens exceed the model's "
    "max_position_embeddings 256",
}


@pytest.mark.parametrize("line", REFUSED)
def test_refusals(run, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "file.gguf"):
        Path(name).write_text("nothing")
    Path("folder.gguf").mkdir()
    Path("folder.gguf/a.gguf").touch()
    message = REFUSED[line].replace("{here}", str(tmp_path))
    assert run(*line.split()) == (1, "", f"qlib: {message}\n")


NEED = "--method, --rule and --activations need --format"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("plan bpw-small", "one of the arguments --format --mix is required"),
        ("plan m --format int4 --rule x", "argument --rule: 'x' is not PATTERN=FORMAT"),
        ("plan m --mix Q4_0 --rule *=nf4", NEED),
        ("quantize m out", "give --format"),
        ("quantize m out.gguf", "give --format or --mix"),
        ("quantize m out --mix Q4_0", "--mix and --importance are for .gguf files"),
        (
            "quantize m o.gguf --mix Q4_0 --method gptq",
            "--method, --rule and --activations need --format",
        ),
        ("quantize m o.gguf --mix Q4_0 --resume x", "--resume needs --format"),
        ("eval m --tokens 0", "argument --tokens: '0' is not a whole number of 1 or more"),
    ],
)
def test_wrong_usage(line, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert (out, err.splitlines()[-1].partition(": error: ")[2]) == ("", message)


HOSTILE = {
    "x.gguf": (b"GGUF\x03\0\0\0" + b"\xff" * 16, "n_tensors"),
    "y.gguf": (b"not a model", "magic"),
    "z.safetensors": (b"\xff" * 16, "header"),
    "a/model.safetensors": (b"", "header"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_line(run, name, tmp_path):
    content, field = HOSTILE[name]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    for what in {path, path.parent if name.startswith("a/") else path}:
        code, out, err = run("inspect", what)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith(f"qlib: {path}: field '{field}'")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[" * 100_000, "field 'json': "),
        ("[1]", "field 'json': holds a list; need an object"),
        ('{"a": \xff}', "field 'json': "),
    ],
)
def test_hostile_config(run, tmp_path, config, message):
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes(config.encode("latin-1"))
    code, out, err = run("inspect", tmp_path)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith(f"qlib: {tmp_path}/config.json: {message}")


def test_names_from_files_cannot_steer_the_terminal(run, tmp_path):
    save_file({"w\x1b[31m\nx\u202e": torch.ones(2)}, tmp_path / "x.safetensors")
    out = run("inspect", tmp_path / "x.safetensors")[1]
    assert "  w\ufffd[31m x\ufffd  F32" in out
    assert printable("a\tb\x07") == "a b\ufffd"


# Exit codes and streams


def test_interrupted(run, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "inspect", interrupt)
    assert run("inspect", "x") == (130, "", "qlib: interrupted\n")


def test_warnings_and_prints_go_to_stderr_in_one_line(run, monkeypatch):
    def noisy(_):
        print("by the way")
        warnings.warn("two\nlines", stacklevel=2)
        return "answer", {}

    monkeypatch.setitem(cli.COMMANDS, "inspect", noisy)
    assert run("inspect", "x") == (0, "answer\n", "by the way\nqlib: warning: two lines\n")
    assert run("inspect", "x", "-q") == (0, "answer\n", "qlib: warning: two lines\n")


def process(*arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "qlib", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def test_json_alone_is_on_stdout(tiny, tmp_path):
    options = ("--format", "int8-row", "--json")
    done = process("quantize", tiny, tmp_path / "q", *options)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert json.loads(done.stdout)["command"] == "quantize"


def test_exit_codes_of_the_process(tmp_path):
    assert process("plan").returncode == 2
    refused = process("inspect", tmp_path / "no.gguf")
    message = f"qlib: no such file or folder: {tmp_path}/no.gguf\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", message)


def test_a_reader_that_leaves_early_is_no_error():
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "qlib", "inspect", "bpw-small", "--all"]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_container_refuses_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "quantize_model", None)
    command = f"quantize bpw-small {tmp_path / 'x'} --format nf4 --container gptq".split()
    assert cli.main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "qlib: model.layers.0.self_attn.q_proj [256, 256]: gptq cannot hold nf4"
    )
    assert error.endswith("; it fits bitsandbytes\n")
    assert error.count("\n") == 1
