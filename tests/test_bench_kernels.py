"""The benchmarks of kernels try themselves: small products on this CPU, and `--dry` for the GPU's.

No time is compared with another: what a slow kernel leads to is tested with times that are made up.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_generation
import bench_gpu
import bench_kernels
import gpu_contestants
import gpu_tasks
import pytest
import tables
import torch
from bench_kernels import failures

import qlib
from qlib.kernels import measure
from qlib.kernels.gpu import tuning

TOOLS = Path(__file__).parents[1] / "tools"


def child(*arguments: str) -> subprocess.CompletedProcess:
    """bench_gpu in a process of its own, since Triton becomes the interpreter there."""
    command = [sys.executable, TOOLS / "bench_gpu.py", "--dry", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def products() -> list[dict]:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weights = {name: qlib.quantize(weight, name) for name in bench_kernels.FORMATS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "copies", lambda nbytes, device="cpu": 2)
        return bench_kernels.measured(weight, weights, 1, 1, 1e10)


def test_cpu_rows_have_all_fields(products):
    names = [row["name"] for row in products]
    expected = ["float32", "bfloat16", "torch int4-g128", "torch int8", *bench_kernels.FORMATS]
    assert names == [*expected, "ternary, added up"]
    for row in products:
        assert row["ms"] > 0
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
        assert row["of_read"] == pytest.approx(row["gb_per_s"] / 10)
        assert (row["to_fallback"] is not None) == (row["name"] in bench_kernels.FORMATS)
        assert (row["error"] is not None) == row["kernel"].startswith(("cpu.", "dequantize."))
    assert all(row["kernel"].startswith("cpu.") for row in products[4:])


def test_a_kernel_that_loses_or_is_wrong_is_named(products):
    rows = [row | {"to_fallback": row["to_fallback"] and 2.0} for row in products]
    assert failures(rows) == []
    # nf4 loses; ternary would, but it is the fallback itself; the others are too inexact.
    rows[7]["to_fallback"] = 0.9
    rows[-2] |= {"to_fallback": 0.9, "kernel": "dequantize.gemm"}
    rows[5]["error"], rows[6]["error"] = 1.5, float("nan")
    assert failures(rows) == [
        "int4-g128-asym, 1 rows: cpu.nibbles.gemv has 1.50 times the error that is allowed",
        "int4-g32, 1 rows: cpu.nibbles.gemv has nan times the error that is allowed",
        "nf4, 1 rows: cpu.nibbles.gemv loses to dequantize.gemm, 0.90 times its speed",
    ]


@pytest.mark.parametrize(("speed", "status"), [(1.0, 1), (2.0, 0)])
def test_exit_status(monkeypatch, capsys, products, speed, status):
    """A kernel that takes as long as the fallback and a bit more fails the whole run."""
    rows = [row | {"to_fallback": row["to_fallback"] and speed * 0.99} for row in products]
    monkeypatch.setattr(bench_kernels, "measured", lambda *arguments: rows)
    monkeypatch.setattr(measure, "bandwidth", lambda: {"read": 1e10, "copy": 1e10})
    options = ["--size", "256", "--rows", "1", "--threads", "1", "--no-generation"]
    assert bench_kernels.main(options) == status
    assert ("loses to dequantize.gemm" in capsys.readouterr().out) == bool(status)


def test_share_of_budget():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 96, generator=generator) for n in (3, 40))
    assert measure.share_of_budget(x @ weight.T, x, weight) <= 0.5
    x, exact = x.half(), x.half().double() @ weight.double().T
    assert measure.share_of_budget(exact, x, weight) == 0
    assert measure.share_of_budget(exact + 1, x, weight) > 1


def test_generation():
    models = bench_generation.square_models(1, 128, ("int4-g128", "int8-row"))
    rows = bench_generation.our_rows("square", models, rounds=1, tokens=2)
    assert [row["name"] for row in rows] == ["int4-g128", "int8-row"]
    head = 4 * 1024 * 128
    for row, name in zip(rows, models):
        layers = 7 * qlib.quantize(torch.ones(128, 128), name).nbytes
        assert row["bytes"] == layers + head
        assert row["gb_per_s"] == pytest.approx(row["bytes"] * row["tokens_per_s"] / 1e9)


def test_llama_cpp():
    model = bench_generation.square_models(1, 256, ("q4_k",))["q4_k"]
    tokenizer = qlib.load("bpw-small")[1]
    (row,) = bench_generation.llama_cpp_rows("square", model, tokenizer, "Q4_K_S", 1, 1, 4)
    assert (row["engine"], row["name"]) == ("llama.cpp", "Q4_K_S")
    assert row["tokens_per_s"] > 0
    # Seven matrices of Q4_K; the embedding, which is the head as well, is Q6_K; three norms.
    assert row["bytes"] == 7 * 256 * 144 + 1024 * 210 + 3 * 256 * 4


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[dict, str]:
    """(the file that a dry run writes, what it prints)."""
    path = tmp_path_factory.mktemp("dry") / "gpu.json"
    run = child("--out", str(path))
    assert run.stderr == ""
    # Triton's interpreter has no `dot_scaled`, so that one has to fail, and the run with it.
    assert run.returncode == 1
    return json.loads(path.read_text()), run.stdout


FIELDS = {"task", "shape", "rows", "name", "kernel", "us", "bytes", "of_copy", "to_bf16", "error"}


def test_gpu_rows_have_all_fields(dry):
    content, printed = dry
    measured = {row["name"] for row in content["rows"]}
    assert {"bf16", "int4-g128", "q4_k", "ternary", "w8a8 int8-row", "hadamard 256"} <= measured
    for row in content["rows"]:
        assert row.keys() == FIELDS
        assert (row["to_bf16"] is None) == (row["rows"] == 0)
        assert row["error"] <= 1 or row["kernel"] == "matmul_4bit"
        assert row["us"] > 0
        assert f"| {row['name']} " in printed


def test_what_a_gpu_run_lacks_is_named(dry):
    content, printed = dry
    assert content["card"] == "dry"
    assert content["left_out"] == []
    assert {"torch tinygemm", "gemlite"} <= content["not_here"].keys()
    assert [failure["what"] for failure in content["failed"]] == ["microscaled mxfp4"]
    assert "FAILED: prefill, 64 x 256, M = 4: microscaled mxfp4" in printed
    assert content["versions"].keys() >= {"torch", "triton"}


def test_nothing_begins_when_the_time_is_up():
    task = next(gpu_tasks.dry_tasks())
    bench = bench_gpu.Bench(None, 1.0, 0.0, measure.fastest, 1)
    assert bench.run(task) == []
    assert len(bench.left_out) == 1 + len(task.entries)
    assert "decode, 64 x 256, M = 1: weight_only int4-g128" in bench.left_out
    assert (bench.failed, bench.not_here) == ([], {})


def test_tuning(tmp_path, capsys):
    path, name = tmp_path / "tuned.json", "gemv 1 x 64 x 256"
    path.write_text(json.dumps({"other": {"a": {"b": 1}}}))
    run = child("--tune", "--out", str(path))
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"{name}: ")
    tuned = json.loads(path.read_text())
    assert tuned.keys() == {"other", "dry"}
    assert tuned["dry"].keys() == {name}
    assert tuned["dry"][name] in tuning.candidates("gemv", 1, 64, 256)
    # What is known is not measured again: without the interpreter it would fail.
    options = bench_gpu.arguments(["--dry", "--tune", "--out", str(path)])
    assert bench_gpu.run_tuning(options, None, None, "dry") == 0
    assert capsys.readouterr().out == ""


def row(name: str, rows: int, shape: tuple, us: float, **more) -> dict:
    return {"task": "decode", "name": name, "rows": rows, "shape": list(shape), "us": us} | more


def test_targets():
    large, small = gpu_tasks.LARGE, gpu_tasks.SMALL
    rows = [row("int4-g128", 1, large[0], 10, of_copy=0.9, to_bf16=3.5)]
    rows += [row("int4-g128", 1, large[1], 20, of_copy=0.8, to_bf16=3.6)]
    rows += [row("int4-g128", 1, small[0], 30, of_copy=0.1, to_bf16=1.0)]
    rows += [row("torch tinygemm int4-g128", 1, large[0], 20)]
    rows += [row("torch tinygemm int4-g128", 1, small[0], 15)]
    found = {target["target"]: target["measured"] for target in gpu_tasks.targets(rows)}
    assert found["int4-g128, 1 row, large layers: of copy"] == 0.8
    assert found["int4-g128, 1 row, large layers: x bf16"] == 3.5
    assert found["int4-g128, 16 rows: x bf16"] is None
    assert found["int4-g128, 1 row: x torch tinygemm int4-g128, geometric mean"] == 1.0
    assert found["int4-g128, 1 row: x gemlite int4-g128, geometric mean"] is None


def test_tasks_can_be_made():
    """Names of formats and of functions are right, and the important comes first."""
    found = list(gpu_tasks.tasks())
    assert [task.rows for task in found[:6]] == [1] * 6
    kinds = {kind for task in found for kind, _ in task.entries} - set(gpu_tasks.PEERS)
    assert all(callable(getattr(gpu_contestants, kind)) for kind in kinds)
    names = {names[0] for task in found for _, names in task.entries if names}
    assert all(qlib.format(name) for name in names)


class Clock:
    """A GPU whose calls take 5 us, and whose events tell the time."""

    def __init__(self):
        self.now, self.captured = 0.0, None

    def call(self):
        if self.captured is None:
            self.now += 5e-6
        else:
            self.captured.count += 1

    def graph(self):
        graph = type("Graph", (), {"count": 0})()
        graph.replay = lambda: setattr(self, "now", self.now + graph.count * 5e-6)
        return graph

    @contextlib.contextmanager
    def capture(self, graph):
        self.captured = graph
        yield
        self.captured = None

    def event(self, enable_timing):
        event = type("Event", (), {"at": 0.0, "synchronize": lambda self: None})()
        event.record = lambda: setattr(event, "at", self.now)
        event.elapsed_time = lambda other: (other.at - event.at) * 1e3
        return event


def test_replayed(monkeypatch):
    """A graph is replayed often enough, and a call costs what it costs on the GPU."""
    clock = Clock()
    stream = type("Stream", (), {"wait_stream": lambda self, other: None})
    fakes = {"Stream": stream, "current_stream": stream, "stream": contextlib.nullcontext}
    fakes |= {"CUDAGraph": clock.graph, "graph": clock.capture, "Event": clock.event}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    assert measure.replayed({"a": clock.call}, rounds=2) == {"a": pytest.approx(5e-6)}
    assert clock.now > 4 * measure.SPAN


def test_cache_size_and_copies():
    size = measure.cache_size()
    assert size >= 1 << 18
    assert measure.copies(size // 2) * (size // 2) > size
    assert measure.copies(10 * size) == 2


def test_table_and_file(tmp_path):
    columns = {"name": tables.text("name"), "speed": tables.number("speed", 1, 1e3, " k")}
    lines = tables.markdown([{"name": "a", "speed": 2}, {"name": "long"}], columns).splitlines()
    assert lines[2:] == ["| a    | 2000.0 k |", "| long | -        |"]
    content = {"date": "today", "rows": [{"a": 1}, {"a": 2}], "none": []}
    tables.write(tmp_path / "x.json", copy.deepcopy(content))
    assert json.loads((tmp_path / "x.json").read_text()) == content
    assert len((tmp_path / "x.json").read_text().splitlines()) == 8
