"""Bits per Weight: quantize language models, and count every bit."""

from .errors import FormatError
from .linear import QLinear
from .metrics import Protocol, divergence, perplexity
from .presets import format, formats, quantize
from .qtensor import QTensor
from .recipe import Recipe, plan, quantize_model
from .scheme import Scheme
from .texts import texts
from .zoo import load, save

__version__ = "0.1.0"
