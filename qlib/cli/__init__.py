"""The command line: `python -m qlib plan | quantize | convert | inspect | eval`.

Every command asks the library, and returns what a reader sees and the same as data for --json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from .. import label, zoo
from ..calibrate import Calibration
from ..files import gguf_export, inputs, quantized
from ..files.gguf_report import GgufReport
from ..files.inspect import inspect_file
from ..linear import QLinear
from ..metrics import Perplexity, Reference, divergence, perplexity
from ..model import Decoder
from ..presets import format as named_format
from ..protocol import Protocol
from ..recipe import plan, quantize_model
from ..report import Plan
from ..rules import Recipe
from ..tokenizer import Tokenizer
from . import planning
from .arguments import parser
from .text import (
    contents_data,
    contents_text,
    label_data,
    label_text,
    printable,
    report_data,
    to_json,
)  # fmt: skip

DONE, REFUSED, INTERRUPTED = 0, 1, 130
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
Answer = tuple[str, dict]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; wrong usage leaves through argparse with 2.

    Args:
        arguments: those of the command line by default.
    """
    options = parser().parse_args(arguments)
    try:
        with _apart(options.quiet):
            text, data = COMMANDS[options.command](options)
        _show(to_json({"command": options.command, **data}) if options.json else text)
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader has seen enough; without this Python complains again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, ImportError, MemoryError, RecursionError) as error:
        return _complain(_reason(error), REFUSED)
    return DONE


@contextlib.contextmanager
def _apart(quiet: bool):
    """Keep stdout for the answer; what is printed meanwhile, and the bars, go to stderr."""
    stderr = sys.stderr

    def warn(message, *_) -> None:
        print(f"qlib: warning: {printable(message)}", file=stderr)

    aside = io.StringIO() if quiet else stderr
    with warnings.catch_warnings():
        warnings.showwarning = warn
        with contextlib.redirect_stdout(aside), contextlib.redirect_stderr(aside):
            yield


def _show(text: str) -> None:
    if text:
        encoding = sys.stdout.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding))
    sys.stdout.flush()


def _complain(message: str, code: int) -> int:
    print(f"qlib: {printable(message)}", file=sys.stderr)
    return code


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) or type(error).__name__


def _plan(options: argparse.Namespace) -> Answer:
    return planning.run(options, DTYPES[options.dtype or "float32"], _recipe(options))


def _recipe(options: argparse.Namespace) -> Recipe | None:
    """The recipe, every name in it looked up before the model is loaded; None without --format."""
    if options.format is None:
        if options.method or options.rule or options.activations:
            options.usage("--method, --rule and --activations need --format")
        return None
    recipe = Recipe.of(options.format).with_method(options.method)
    recipe = replace(recipe, rules=tuple(options.rule))
    if options.activations is not None:
        chosen = None if options.activations == "none" else options.activations
        recipe = replace(recipe, activations=chosen)
    recipe.chosen_method()
    recipe.choose_inputs("any layer")
    for name in (recipe.format, *(name for _, name in options.rule)):
        if name is not None:
            named_format(name)
    return recipe


def _quantize(options: argparse.Namespace) -> Answer:
    to_gguf = _check_out(options)
    if not to_gguf and (options.mix is not None or options.importance is not None):
        options.usage("--mix and --importance are for .gguf files")
    if options.format is None and options.mix is None:
        options.usage("give --format" + " or --mix" * to_gguf)
    if options.format is None and options.resume is not None:
        options.usage("--resume needs --format")
    recipe, report = _recipe(options), None
    model, tokenizer = _load(options, options.model)
    more = {} if options.mix is None else {"mix": options.mix}
    if options.importance is not None:
        more["importance"] = options.importance
        if not options.importance.endswith(".gguf"):
            more["importance"] = _calibration(options, options.importance, tokenizer)
    if recipe is not None:
        planned = plan(model, recipe)
        _check_formats(options, planned, to_gguf)
        looks = recipe.chosen_method().sees != "weight" or planned.is_static
        seen = _calibration(options, options.calibration, tokenizer) if looks else None
        report = quantize_model(
            model, recipe, None, seen, progress=not options.quiet, resume=options.resume
        )
    if options.dtype is None and not to_gguf:
        _narrowed(model)
    written, file = _save(options, model, tokenizer, more)
    data = {} if report is None else report_data(report)
    reports = [written] if report is None else [report, written]
    return _lines(options, reports), _ends(options) | data | file


def _check_formats(options: argparse.Namespace, planned: Plan, to_gguf: bool) -> None:
    """Refuse before the work what the container could only refuse after it."""
    module = quantized.CONTAINERS.get(options.container)
    for step in planned.steps:
        if step.format is not None and to_gguf:
            gguf_export.require(step.layer, step.format)
        elif module is not None and step.format is not None:
            quantized.require(options.container, step.layer, step.format, step.shape)
            if step.inputs is not None:
                own = (options.container, module, step.layer, step.inputs)
                inputs.require(*own, step.format, step.shape)


def _load(options: argparse.Namespace, name: str) -> tuple[Decoder, Tokenizer | None]:
    dtype = DTYPES[options.dtype or "float32"]
    model, tokenizer = zoo.load(name, dtype)
    # A folder of qlib's own keeps the dtypes that it was written with.
    return model.to(dtype), tokenizer


def _calibration(
    options: argparse.Namespace, text: str, tokenizer: Tokenizer | None
) -> Calibration:
    tokenizer = _need(tokenizer, options.model)
    return Calibration.text(tokenizer, text, options.tokens, options.context)


def _need(tokenizer: Tokenizer | None, model: str) -> Tokenizer:
    if tokenizer is None:
        raise ValueError(f"{model}: has no tokenizer.json, so it can read no text")
    return tokenizer


def _check_out(options: argparse.Namespace) -> bool:
    """Whether OUT will be a GGUF file; what could only fail after the work is refused before it."""
    out, container = Path(options.out), options.container
    if container is not None and container not in zoo.CONTAINERS:
        raise ValueError(zoo.unknown_container(container))
    if out.exists() and Path(options.model).exists() and out.samefile(options.model):
        raise ValueError(f"{out}: this is the model itself; choose another place for the result")
    to_gguf = container == "gguf" or (container is None and options.out.endswith(".gguf"))
    if to_gguf and not out.absolute().parent.is_dir():
        raise ValueError(f"no such folder: {out.absolute().parent}")
    if to_gguf == out.is_dir() and out.exists():
        kind = "a folder; give the path of a .gguf file" if to_gguf else "a file; give a folder"
        raise ValueError(f"{out}: this is {kind}")
    return to_gguf


def _save(options: argparse.Namespace, model: Decoder, tokenizer: Tokenizer | None, more: dict):
    """Write the model; what to say of it, as text and as data."""
    written = zoo.save(model, options.out, tokenizer, options.container, **more)
    if isinstance(written, GgufReport):
        return written, {"file": report_data(written)}
    files = [path for path in Path(options.out).glob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    text = f"written to {options.out}: {total:,} bytes in {len(files)} files"
    if written is None:
        return text, {"file": {"bytes": total}}
    stored = {"container": written.container, "quantized_bits_per_weight": written.bits_per_weight}
    return f"{text}\n{written}", {"file": {"bytes": total} | stored}


def _lines(options: argparse.Namespace, reports: list) -> str:
    return "" if options.quiet or options.json else "\n".join(map(str, reports))


def _ends(options: argparse.Namespace) -> dict[str, str]:
    return {"model": options.model, "out": options.out}


def _convert(options: argparse.Namespace) -> Answer:
    to_gguf = _check_out(options)
    if Path(options.model).is_dir():
        wide = [t.name for t in inspect_file(options.model).tensors if t.kind == "F64"]
        if wide:
            raise ValueError(f"{wide[0]}: is float64, which no container here keeps exactly")
    # Converting is exact: the channels of a known model stay where they are.
    model, tokenizer = zoo.load(options.model, permuted=False, packed=True)
    dtype = _narrowed(model)
    # By default a .gguf file has a mix, which would quantize.
    more = {"mix": next(n for n, d in gguf_export.DENSE.items() if d == dtype)} if to_gguf else {}
    written, file = _save(options, model, tokenizer, more)
    packed = sum(isinstance(module, QLinear) for module in model.modules())
    dense, name = len(list(model.parameters())), str(dtype).removeprefix("torch.")
    kept = "were decoded exactly to float32" if options.container == "hf" else "kept their values"
    exact = f"{packed} packed layers {kept}, {dense} tensors kept theirs in {name}"
    data = {"packed": packed, "dense": dense, "dtype": name}
    return _lines(options, [exact, written]), _ends(options) | data | file


def _narrowed(model: Decoder) -> torch.dtype:
    """The narrowest dtype that holds every unquantized value; the model is cast to it."""
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(p.to(dtype).to(p.dtype), p) for p in model.parameters()):
            model.to(dtype)
            return dtype
    return torch.float32


def _inspect(options: argparse.Namespace) -> Answer:
    known = {zoo.SMALL: lambda: zoo.SMALL_FOLDER}
    known[zoo.SMOLLM2] = lambda: zoo.packaged_path(zoo.SMOLLM2_FILE)
    if options.path in known:
        contents = inspect_file(known[options.path]())
    elif not os.path.exists(options.path) and (found := label.find(options.path)):
        return label_text(found), {"label": label_data(found)}
    else:
        contents = inspect_file(options.path)
    return contents_text(contents, options.all), contents_data(contents, options.all)


def _eval(options: argparse.Namespace) -> Answer:
    protocol, reference = None, None
    if options.reference is not None:
        # Of the reference only its hidden states stay in memory.
        model, protocol = _measured(options, options.reference)
        reference = Reference(model, protocol)
    model, own = _measured(options, options.model)
    if reference is None:
        found = perplexity(model, own)
        return str(found), {"model": options.model, **_scores(found), "protocol": str(own)}
    if not own.same(protocol):
        raise ValueError(f"{options.model} and {options.reference} cut the text into other tokens")
    found = divergence(reference, model, protocol)
    data = {"model": options.model, "reference": options.reference, "kl": found.kl}
    data |= {"kl_error": found.standard_error, "kl_99": found.kl_99, "top1": found.top1}
    data |= {"top1_error": found.top1_error, **_scores(found.perplexity)}
    data |= {"reference_" + key: x for key, x in _scores(found.reference_perplexity).items()}
    text = f"{found.perplexity}\n{found}".removesuffix(f" ({protocol})")
    return text, data | {"protocol": str(protocol)}


def _measured(options: argparse.Namespace, name: str) -> tuple[Decoder, Protocol]:
    model, tokenizer = _load(options, name)
    tokenizer = _need(tokenizer, name)
    return model, Protocol.of(tokenizer, options.text, options.tokens, options.context)


def _scores(found: Perplexity) -> dict[str, float]:
    return {"perplexity": found.value, "perplexity_error": found.standard_error}


COMMANDS = {
    "plan": _plan,
    "quantize": _quantize,
    "convert": _convert,
    "inspect": _inspect,
    "eval": _eval,
}
