"""Bits per Weight: quantize language models, and count every bit."""

from .errors import FormatError
from .linear import QLinear
from .metrics import Reference, divergence, perplexity
from .presets import format, formats, quantize
from .protocol import Protocol
from .qtensor import QTensor
from .recipe import Recipe, quantize_model
from .scheme import Scheme
from .texts import texts
from .zoo import load, save

__version__ = "0.1.0"

__all__ = ["FormatError", "Protocol", "QLinear", "QTensor", "Recipe", "Reference", "Scheme"]
__all__ += ["divergence", "format", "formats", "load", "perplexity", "quantize"]
__all__ += ["quantize_model", "save", "texts"]
