"""Bits per Weight: quantize language models, and count every bit."""

from . import allocate, label, lora, methods, plan
from .activations import inputs
from .block import Stats
from .calibrate import Calibration
from .errors import FormatError
from .linear import QLinear
from .metrics import Reference, divergence, perplexity
from .presets import format, formats, quantize
from .protocol import Protocol
from .qtensor import QTensor
from .recipe import quantize_model
from .rules import Recipe, recipes
from .scheme import Scheme
from .texts import texts
from .zoo import load, save

__version__ = "0.1.0"

__all__ = ["Calibration", "FormatError", "Protocol", "QLinear", "QTensor", "Recipe", "Reference"]
__all__ += ["Scheme", "Stats", "allocate", "divergence", "format", "formats", "inputs", "label"]
__all__ += ["load", "lora", "methods", "perplexity", "plan", "quantize", "quantize_model"]
__all__ += ["recipes", "save", "texts"]
