"""Measure KV caches: formats x contexts, to book/results/kvcache.json.

    .venv/bin/python tools/cacheboard.py                 # rows that are not there yet
    .venv/bin/python tools/cacheboard.py --model bpw-small --fresh

Every window of text is read 32 tokens at a time through the packed cache. Rows are written as they
are measured, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from pathlib import Path

import torch

import qlib
from qlib.cache import QuantizedCache, kv_format, through_cache
from qlib.cache.error import attention_error
from qlib.files.atomic import replacing
from qlib.metrics import Reference

BOARD = Path(__file__).parents[1] / "book" / "results" / "kvcache.json"
# By channel, queries still see what they complete in full precision: more than a group of 32 tokens
# at once would flatter such a cache.
TOKENS, CHUNK = 4_096, 32
CONTEXTS = {"bpw-small": (256,), "smollm2-135m": (256, 1024, 2048)}
FORMATS = ["f16", "fp8", "fp8-token", "int8", "int8-hadamard", "kivi8", "turbo8", "turbo8-qjl"]
for bits in (4, 3, 2):
    FORMATS += [f"int{bits}", f"int{bits}-hadamard", f"kivi{bits}-w0", f"kivi{bits}"]
    FORMATS += [f"turbo{bits}", f"turbo{bits}-qjl", "polar" if bits == 4 else f"polar{bits}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=CONTEXTS)
    parser.add_argument("--context", action="append", type=int, help="only this context")
    parser.add_argument("--cache", action="append", choices=FORMATS, help="only this format")
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are there")
    arguments = parser.parse_args()
    for name in arguments.model or CONTEXTS:
        model, tokenizer = qlib.load(name)
        for context in arguments.context or CONTEXTS[name]:
            formats = arguments.cache or FORMATS
            run(name, model, tokenizer, context, formats, arguments.fresh)


def run(name: str, model, tokenizer, context: int, formats: list[str], fresh: bool) -> None:
    """Measure every format at one context, and write each row as soon as it is known."""
    protocol = qlib.Protocol.of(
        tokenizer, "evaluation", context=context, stride=context, tokens=TOKENS
    )
    done = {(row["model"], row["cache"], row["protocol"]) for row in read()["rows"]}
    todo = [form for form in formats if fresh or (name, form, str(protocol)) not in done]
    reference = Reference(model, protocol) if todo else None
    for form in todo:
        row = measure(name, model, form, reference, context)
        print(f"{name} {form} {context}: KL {row['kl']:.4g}, {row['seconds']:.0f} s", flush=True)
        write(row)


def measure(name: str, model, form: str, reference: Reference, context: int) -> dict:
    """One row: bytes of the stored cache, the error of attention, and what becomes of the text."""
    protocol, start = reference.protocol, time.perf_counter()
    found = qlib.divergence(reference, through_cache(model, form, CHUNK), protocol)
    window = protocol.tokens[None, :context]
    errors = attention_error(model, form, window, CHUNK)
    cache = QuantizedCache(form)
    for part in window.split(CHUNK, dim=1):
        model.hidden(part, cache)
    key_bits, value_bits = kv_format(form).bits(model.config.head_dim)
    return {
        "model": name,
        "cache": form,
        "context": context,
        "protocol": str(protocol),
        "chunk": CHUNK,
        "key_bits": key_bits,
        "value_bits": value_bits,
        "bytes_per_token": cache.bytes_per_token,
        "attention_error": statistics.fmean(errors),
        "kl": found.kl,
        "kl_error": found.standard_error,
        "perplexity": found.perplexity.value,
        "perplexity_error": found.perplexity.standard_error,
        "reference_perplexity": found.reference_perplexity.value,
        "seconds": time.perf_counter() - start,
    }


def read() -> dict:
    """The board as it is, or an empty one."""
    return json.loads(BOARD.read_text()) if BOARD.is_file() else {"rows": []}


def write(row: dict) -> None:
    """Put one row on the board, in place of an older one of the same model, cache and context."""
    key = ("model", "cache", "context")
    rows = [old for old in read()["rows"] if any(old[k] != row[k] for k in key)]
    content = {
        "command": "tools/cacheboard.py",
        "date": datetime.date.today().isoformat(),
        "device": f"CPU ({platform.machine()}), torch {torch.__version__.split('+')[0]}, float32",
        "rows": sorted([*rows, row], key=_place),
    }
    with replacing(BOARD) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def _place(row: dict) -> tuple:
    """Rows in the order of the lists above, whichever was measured first."""
    return (*CONTEXTS,).index(row["model"]), row["context"], FORMATS.index(row["cache"])


if __name__ == "__main__":
    main()
