"""Recompute every output of the notebooks and compare it with the committed one (nbval, strict).

python tools/nbtest.py [--threads N] [FILE ...]      all notebooks of _toc.yml without arguments
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest
from notebooks import ROOT, listed, prepare_environment


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument(
        "--threads", type=int, default=1, help="of each kernel; outputs must not care"
    )
    options = parser.parse_intermixed_args()
    prepare_environment(options.threads)
    files = [str(path) for path in options.files or listed()]
    # One worker takes a whole notebook: its cells share a kernel.
    workers = ["-n", "2", "--dist", "loadfile"] if len(files) > 1 else []
    sanitize = f"--nbval-sanitize-with={ROOT / 'tools/nbval_sanitize.cfg'}"
    arguments = ["--nbval", "--nbval-current-env", sanitize, "--override-ini=addopts=", "-q"]
    return pytest.main([*arguments, *workers, *files])


if __name__ == "__main__":
    sys.exit(main())
