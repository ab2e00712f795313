"""How the fragility of the project's own model grows with its training.

    .venv/bin/python tools/checkpoints.py RUN        # a folder of tools/train_own_model.py --out

Quantizes every checkpoint and writes its divergence to book/results/checkpoints.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path

import qlib
from qlib.files import hf
from qlib.files.atomic import replacing
from qlib.recipe import quantized
from qlib.scoreboard import protocols

RESULTS = Path(__file__).parents[1] / "book" / "results" / "checkpoints.json"
FORMATS = ("int4-g32-asym", "int3-g32-asym", "int2-g32-asym")
TOKENS = 4096


def measure(folder: Path) -> dict:
    """Tokens seen, perplexity, and KL by format, of one checkpoint."""
    model, tokenizer = hf.load(folder)
    protocol, _ = protocols(tokenizer, TOKENS)
    reference = qlib.Reference(model, protocol)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    row = {"tokens": log[-1]["tokens"], "protocol": str(protocol), "kl": {}, "kl_error": {}}
    for format in FORMATS:
        with quantized(model, format):
            found = qlib.divergence(reference, model, protocol)
        row["kl"][format], row["kl_error"][format] = found.kl, found.standard_error
        row["perplexity"] = found.reference_perplexity.value
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder with the checkpoints step_N")
    folders = parser.parse_args().run.glob("step_*")
    rows = [measure(f) for f in sorted(folders, key=lambda f: int(f.name.removeprefix("step_")))]
    board = {
        "command": "tools/checkpoints.py",
        "date": datetime.date.today().isoformat(),
        "protocol": rows[0].pop("protocol"),
        "rows": [{k: v for k, v in row.items() if k != "protocol"} for row in rows],
    }
    with replacing(RESULTS) as temporary:
        temporary.write_text(json.dumps(board, indent=1) + "\n")


if __name__ == "__main__":
    main()
