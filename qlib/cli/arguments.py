"""The arguments of the command line, and what its --help says."""

from __future__ import annotations

import argparse

from .. import zoo
from ..activations import STATIC
from ..methods import METHODS
from ..rules import RECIPES
from ..texts import NAMES as TEXTS

EPILOG = f"""\
MODEL is a Hugging Face folder, a folder that quantize wrote, a .gguf file, hf:org/name, or one of
{", ".join(zoo.NAMES)}. OUT is a folder or the path of a .gguf file.

  qlib plan MODEL --format int4-g128 --rule '*.down_proj=int8-g64'
  qlib quantize MODEL OUT --format int4-g128 --method gptq
  qlib quantize MODEL OUT --format w8a8 --method smoothquant
  qlib quantize MODEL OUT.gguf --mix Q4_K_M --importance calibration
  qlib convert OUT OUT.gguf
  qlib inspect OUT.gguf
  qlib eval OUT --reference MODEL

Exit codes: 0 done, 1 refused (one line on stderr says why), 2 wrong usage, 130 interrupted.
`qlib COMMAND --help` lists the options of a command.
"""
FORMAT = "int{1..8}[-g{n}|-row|-tensor][-asym|-offset][-mse], nf4, mxfp4, nvfp4, q4_k, ..."
FORMAT += f" or, with activations, {', '.join(RECIPES)}"
ACTIVATIONS = f"""what layers quantize their inputs to: int8-row, fp8_e4m3, nvfp4, ...; with
{STATIC} after a format of one scale, its range is measured; 'none' leaves inputs as they are"""
MIX = "of a .gguf file: Q4_K_M, IQ4_XS, Q8_0, ..."
RULE = "layers whose names match PATTERN get format F, or 'none' to stay as they are"
TEXT = f"{' or '.join(TEXTS)}, or a UTF-8 file"
TOKENS = "of the text that a method looks at (default: 8192)"
IMPORTANCE = "an imatrix .gguf file, or a text to measure it on"


def parser() -> argparse.ArgumentParser:
    """The parser of every command; `usage` of its result leaves with code 2."""
    raw = argparse.RawDescriptionHelpFormatter
    about = "Quantize language models, and count every bit."
    top = argparse.ArgumentParser("qlib", None, about, EPILOG, formatter_class=raw)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _plan(_command(commands, "plan", "bytes, bits and memory, before anything is quantized"))
    _quantize(_command(commands, "quantize", "quantize a model and write it"))
    _convert(_command(commands, "convert", "write a model in another container, exactly"))
    _inspect(_command(commands, "inspect", "what lies in a file or folder, or what a label means"))
    _eval(_command(commands, "eval", "perplexity, and divergence from a reference"))
    return top


def _command(commands, name: str, about: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
    command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    quiet = "no progress bars, and no report where the result is a file"
    command.add_argument("-q", "--quiet", action="store_true", help=quiet)
    command.set_defaults(usage=command.error)
    return command


def _plan(command: argparse.ArgumentParser) -> None:
    shape = "a model, or a published shape such as Llama-3.1-8B, which needs no file"
    command.add_argument("model", metavar="MODEL", help=shape)
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--format", metavar="F", help=FORMAT)
    which.add_argument("--mix", metavar="M", help=MIX)
    _recipe(command)


def _recipe(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--rule", metavar="PATTERN=F", type=rule, action="append", default=[], help=RULE)
    add("--activations", metavar="A", help=ACTIVATIONS)
    add("--method", metavar="M", help=", ".join(METHODS))
    add("--importance", metavar="I", help=IMPORTANCE)
    add("--tokens", metavar="N", type=positive, default=8192, help=TOKENS)
    _dtype(command)


def _dtype(command: argparse.ArgumentParser) -> None:
    known = ("float32", "bfloat16", "float16")
    about = "type of what is not quantized (default: float32, written as narrowly as is exact)"
    command.add_argument("--dtype", choices=known, help=about)


def _quantize(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL")
    add("out", metavar="OUT")
    add("--format", metavar="F", help=FORMAT)
    add("--mix", metavar="M", type=mix, help=MIX + " or bits per weight, such as 4.5")
    _recipe(command)
    about = f"for methods that look at data: {TEXT} (default: calibration)"
    add("--calibration", metavar="TEXT", default="calibration", help=about)
    add("--context", metavar="N", type=positive, default=256, help="of a window (default: 256)")
    add("--resume", metavar="FOLDER", help="keep every finished block there, and go on from it")
    _container(command)


def _container(command: argparse.ArgumentParser) -> None:
    about = f"{', '.join(zoo.CONTAINERS)} (default: what OUT looks like)"
    command.add_argument("--container", metavar="C", help=about)


def _convert(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="IN")
    command.add_argument("out", metavar="OUT")
    _container(command)


def _inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("path", metavar="PATH", help="a .gguf or .safetensors file, or a folder")
    command.add_argument("--all", action="store_true", help="every tensor and every metadata entry")


def _eval(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL")
    add("--reference", metavar="MODEL2", help="the original: also measure KL and top-1 from it")
    add("--text", default="evaluation", help=f"{TEXT} (default: evaluation)")
    add("--tokens", metavar="N", type=positive, default=2048, help="of the text (default: 2048)")
    add("--context", metavar="N", type=positive, default=256, help="tokens seen (default: 256)")
    _dtype(command)


def positive(text: str) -> int:
    """A whole number of 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def rule(text: str) -> tuple[str, str | None]:
    """A pattern and the name of a format, or None for "none".

    >>> rule("*.down_proj=int8-g64"), rule("*.0.*=none")
    (('*.down_proj', 'int8-g64'), ('*.0.*', None))
    """
    pattern, equals, name = text.rpartition("=")
    if not (pattern and equals and name):
        raise argparse.ArgumentTypeError(f"{text!r} is not PATTERN=FORMAT")
    return pattern, None if name == "none" else name


def mix(text: str) -> str | float:
    """The name of a file type, or a number of bits per weight.

    >>> mix("Q4_K_M"), mix("4.5")
    ('Q4_K_M', 4.5)
    """
    return float(text) if text.replace(".", "", 1).isdecimal() else text
