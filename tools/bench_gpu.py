"""The GPU kernels beside cuBLAS, other people's kernels and a copy of memory: `make gpu`.

    .venv/bin/python tools/bench_gpu.py                 # to book/results/gpu_<card>.json
    .venv/bin/python tools/bench_gpu.py --tune          # to kernels/gpu/tuned.json
    .venv/bin/python tools/bench_gpu.py --dry           # tiny shapes on a CPU, to try this file

Layers of models with 7, 8 and 70 billion weights. A CUDA graph of many calls is replayed between
two events, every call takes the next copy of its weight, and no cache holds all copies. Speed is
bytes that have to be moved over time, as a share of what a copy moves in the same run, and the
ratio to cuBLAS in bfloat16. Every result is compared with the exact product: its error is given as
a share of what is allowed, twice torch's own.

The most important rows come first, and what is not measured when the time is up is listed. The exit
status is 1 if one of our kernels fails or is wrong.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_tasks
import tables
import torch
from gpu_tasks import PEERS, Task, targets

ROUNDS, SECONDS = 5, 480


class Bench:
    """Measures tasks until the time is up, and keeps what came of them.

    Args:
        copy: bytes a second.
        timer: of calls: `measure.replayed`, or `measure.fastest` on a CPU.
    """

    def __init__(self, setting, copy: float, seconds: float, timer: Callable, rounds: int):
        self.setting, self.copy, self.timer, self.rounds = setting, copy, timer, rounds
        self.stop = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.not_here: dict[str, str] = {}
        self.left_out: list[str] = []

    def run(self, task: Task) -> list[dict[str, Any]]:
        """Rows of the table for the task; what fails is remembered, and the rest goes on."""
        found = [("dense", ())] * bool(task.rows) + list(task.entries)
        ready = [c for entry in found if (c := self._ready(task, *entry))]
        best = self._times(task, [c for c, _ in ready])
        rows = [self._row(task, c, best, error) for c, error in ready if c.name in best]
        self.rows += rows
        return rows

    def _ready(self, task: Task, kind: str, arguments: tuple) -> tuple | None:
        """(contestant, its error), compiled; None if it is left out or fails."""
        title = " ".join(map(str, (kind, *arguments)))
        if time.monotonic() > self.stop:
            self.left_out.append(f"{task}: {title}")
            return None
        if title in self.not_here:
            return None
        try:
            contestant = self._contestant(task, kind, arguments)
            error = contestant.error(contestant.call(contestant.operands[0]))
            if kind in PEERS:
                # Some wait for the GPU, which a graph cannot: that shows here, and harms no other.
                self.timer({contestant.name: self._call(contestant)}, 1)
        except Exception as error:
            if kind in PEERS or type(error).__name__ == "NotHere":
                self.not_here[title] = _text(error)
            else:
                self._fail(task, title, error)
            return None
        return contestant, error

    def _times(self, task: Task, contestants: list) -> dict[str, float]:
        """Seconds by name, of rounds that are interleaved if all can be measured."""
        calls = {c.name: self._call(c) for c in contestants}
        try:
            return self.timer(calls, self.rounds)
        except Exception as error:
            self._fail(task, "measured together", error)
        best = {}
        for name, call in calls.items():
            try:
                best |= self.timer({name: call}, self.rounds)
            except Exception as error:
                self._fail(task, name, error)
        return best

    def _contestant(self, task: Task, kind: str, arguments: tuple):
        import gpu_contestants
        import gpu_peers

        if kind in gpu_peers.PEERS:
            return gpu_peers.PEERS[kind](self.setting, *task.shape, task.rows)
        make = getattr(gpu_contestants, kind)
        if not task.rows:
            return make(self.setting, *arguments, *task.shape)
        name, more = arguments[:1], arguments[1:]
        return make(self.setting, *name, *task.shape, task.rows, *more)

    @staticmethod
    def _call(contestant) -> Callable[[], object]:
        from qlib.kernels import measure

        return measure.in_rotation(contestant.call, contestant.operands)

    def _fail(self, task: Task, what: str, error: Exception) -> None:
        self.failed.append({"task": str(task), "what": what, "error": _text(error)})

    def _row(self, task: Task, c, best: dict[str, float], error: float) -> dict[str, Any]:
        seconds = best[c.name]
        return {
            "task": task.title,
            "shape": list(task.shape),
            "rows": task.rows,
            "name": c.name,
            "kernel": c.kernel,
            "us": seconds * 1e6,
            "bytes": c.nbytes,
            "of_copy": c.nbytes / seconds / self.copy,
            "to_bf16": best["bf16"] / seconds if "bf16" in best else None,
            "error": error,
        }

    def wrong(self) -> list[str]:
        """Rows of ours whose error is more than allowed."""
        ours = [row for row in self.rows if row["kernel"].startswith("gpu.")]
        wrong = [row for row in ours if not row["error"] <= 1]
        return [f"{r['name']} {r['shape']} {r['rows']}: {r['error']:.2f}" for r in wrong]


def _text(error: Exception) -> str:
    """The kind of an exception and the beginning of what it says; no paths of this machine."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return f"{type(error).__name__}: {re.sub(r'/[^ ]*/', '', first)[:300]}"


COLUMNS = {
    "task": tables.text("task"),
    "shape": lambda row: " x ".join(map(str, row["shape"])),
    "rows": tables.text("rows"),
    "weight": tables.text("name"),
    "kernel": tables.text("kernel"),
    "us": tables.number("us", 1),
    "of copy": tables.number("of_copy", 0, 100, "%"),
    "x bf16": tables.number("to_bf16", 2),
    "error / allowed": tables.number("error", 2),
}
OF_TARGETS = {
    "target": tables.text("target"),
    "wanted": tables.number("wanted", 2),
    "measured": tables.number("measured", 2),
}
CLOCKS = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first card, if it is there."""
    command = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader", "--id=0"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(zip(CLOCKS.split(","), run.stdout.strip().split(", "))) if run.stdout else {}


def arguments(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="begin nothing after so many"
    )
    parser.add_argument("--tune", action="store_true", help="measure tile sizes instead")
    parser.add_argument("--dry", action="store_true", help="tiny shapes in the interpreter")
    parser.add_argument("--out", type=Path, help="the file to write; --dry writes none otherwise")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    if options.dry:
        # Triton reads it when it is imported, which is after this.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        sys.exit("bench_gpu: torch sees no CUDA device (--dry tries the program without one)")
    from gpu_contestants import Setting

    from qlib.kernels import measure

    major, minor = (8, 9) if options.dry else torch.cuda.get_device_capability()
    device, dtype = ("cpu", torch.float16) if options.dry else ("cuda", torch.bfloat16)
    setting = Setting(device, dtype, 10 * major + minor)
    timer = measure.fastest if options.dry else measure.replayed
    card = "dry" if options.dry else torch.cuda.get_device_name()
    if options.tune:
        return run_tuning(options, setting, timer, card)
    return run_tasks(options, setting, timer, card)


def run_tuning(options, setting, timer: Callable, card: str) -> int:
    import gpu_tuning

    from qlib.kernels.gpu import tuning

    path = options.out or (None if options.dry else tuning.TUNED)
    known = gpu_tuning.read(path, card) if path else {}
    sizes = gpu_tasks.DRY_TUNED if options.dry else gpu_tasks.TUNED
    sizes = [size for size in sizes if gpu_tuning.product_name(*size) not in known]
    stop = time.monotonic() + options.seconds
    for found in gpu_tuning.tune(setting, timer, stop, sizes):
        before = "fails" if found.by_rule is None else f"{found.by_rule * 1e6:.1f} us"
        by = f"{found.seconds * 1e6:.1f} us, by rule {before}"
        print(f"{found.name}: {by}, {found.tiles}", flush=True)
        if path:
            gpu_tuning.save(path, card, found)
    return 0


def run_tasks(options, setting, timer: Callable, card: str) -> int:
    from qlib.kernels import measure

    start, found = time.monotonic(), clocks()
    rounds = 1 if options.dry else ROUNDS
    rates = measure.bandwidth(setting.device, rounds)
    print(f"{card}: a copy moves {rates['copy'] / 1e9:.0f} GB/s\n", flush=True)
    left = options.seconds - (time.monotonic() - start)
    bench = Bench(setting, rates["copy"], left, timer, rounds)
    slug = re.sub(r"[^a-z0-9]+", "_", card.lower().removeprefix("nvidia ")).strip("_")
    path = options.out or (None if options.dry else tables.RESULTS / f"gpu_{slug}.json")
    for task in gpu_tasks.dry_tasks() if options.dry else gpu_tasks.tasks():
        rows = bench.run(task)
        if rows:
            print(tables.markdown(rows, COLUMNS) + "\n", flush=True)
        if setting.device == "cuda":
            torch.cuda.empty_cache()
        if path:
            tables.write(path, content(card, rates, found, bench, options))
    print(tables.markdown(targets(bench.rows), OF_TARGETS))
    print(f"\n{time.monotonic() - start:.0f} s. Not here: {bench.not_here or 'nothing'}")
    print(f"Left out for lack of time: {bench.left_out or 'nothing'}")
    for failure in bench.failed:
        print("FAILED", *failure.values(), sep=": ")
    print(*(f"WRONG: {row}" for row in bench.wrong()), sep="\n")
    return int(bool(bench.failed or bench.wrong()))


def content(card: str, rates: dict, found: dict, bench: Bench, options) -> dict[str, Any]:
    """What the file holds."""
    more = {"--seconds": f"{options.seconds:g}"} if options.seconds != SECONDS else {}
    command = shlex.join(["tools/bench_gpu.py", *(word for pair in more.items() for word in pair)])
    where = tables.environment("torch", "triton", "bitsandbytes", "gemlite")
    return {
        "card": card,
        "command": command,
        **where,
        "cuda": torch.version.cuda,
        "clocks": {"before": found, "after": clocks()},
        "bandwidth": rates,
        "targets": targets(bench.rows),
        "not_here": bench.not_here,
        "left_out": bench.left_out,
        "failed": bench.failed,
        "rows": bench.rows,
    }


if __name__ == "__main__":
    sys.exit(main())
