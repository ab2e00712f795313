"""How the codes are chosen: one method, one file, one public function.

Every method is `method(weight, format, ...) -> QTensor`; METHODS names those that
`quantize_model` can call.
"""

from .rtn import rtn

METHODS = {"rtn": rtn}
