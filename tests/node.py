"""Runs a widget's script in Node, as the page runs it: what its functions return for given data."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import playwright

# Playwright, which the browser tests need, brings a Node of its own.
NODE = Path(playwright.__file__).parent / "driver/node"


def run(script: str, expression: str, given):
    """What the page computes: `expression`, which names functions of the script, of `given`."""
    text = "\n".join([script, f"console.log(JSON.stringify(({expression})({json.dumps(given)})))"])
    command = [NODE, "--input-type=module"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
