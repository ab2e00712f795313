"""Recompute every output of the notebooks and compare it with the committed one (nbval, strict).

python tools/nbtest.py [FILE ...]      all notebooks of _toc.yml without arguments
"""

from __future__ import annotations

import sys

import pytest
from notebooks import ROOT, listed, prepare_environment

if __name__ == "__main__":
    prepare_environment()
    files = sys.argv[1:] or [str(path) for path in listed()]
    # One worker takes a whole notebook: its cells share a kernel.
    workers = ["-n", "2", "--dist", "loadfile"] if len(files) > 1 else []
    sanitize = f"--nbval-sanitize-with={ROOT / 'tools/nbval_sanitize.cfg'}"
    arguments = ["--nbval", "--nbval-current-env", sanitize, "--override-ini=addopts=", "-q", *workers]
    sys.exit(pytest.main([*arguments, *files]))
