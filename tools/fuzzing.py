"""What the fuzzers share: try inputs, count what became of them, and say which ones failed."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar

Content = TypeVar("Content")
Found = tuple[Counter, dict[int, str]]


def outcomes(inputs: Iterable[tuple[int, Content]], check: Callable[[int, Content], str]) -> Found:
    """How often `check` said what of the inputs, and the failures by number."""
    counts: Counter = Counter()
    failures: dict[int, str] = {}
    for number, content in inputs:
        try:
            counts[check(number, content)] += 1
        # Whatever it is, it is a finding.
        except Exception as error:
            failures[number] = f"{type(error).__name__}: {error!s:.200}"
    return counts, failures


def main(description: str, run: Callable[[int, int], Found]) -> None:
    """The command line of a fuzzer, whose `run` takes the first number and how many inputs."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--start", type=int, default=0)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    found, failures = run(arguments.start, arguments.count)
    seconds = time.perf_counter() - begin
    for number, failure in list(failures.items())[:20]:
        print(f"input {number}: {failure}")
    counts = ", ".join(f"{n:,} {outcome}" for outcome, n in sorted(found.items()))
    rate = arguments.count / seconds
    print(
        f"{arguments.count:,} inputs in {seconds:.0f} s ({rate:,.0f}/s): {counts}, "
        f"{len(failures):,} failed"
    )
    raise SystemExit(bool(failures))
