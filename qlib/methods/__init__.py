"""How the codes are chosen: one method, one file, one public function.

METHODS names those that `quantize_model` can call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from .autoround import autoround
from .awq import awq
from .gptq import gptq
from .hqq import hqq
from .rotate import rotate as rotate
from .rtn import imatrix, rtn
from .smoothquant import smoothquant
from .spinquant import spinquant as spinquant


@dataclass(frozen=True)
class Method:
    """A function that chooses codes, and what it has to see for that.

    Args:
        name: for reports.
        function: `sees` says how it is called.
        sees: "weight": function(weight, format) -> QTensor; "inputs": function(weight, format,
            stats) -> QTensor; "block": function(block, formats) -> QTensor of every layer name.
        stacks: every row is chosen by itself, so layers that read the same (q, k and v) can be
            given as one tall weight, which saves time.
        targets: the block has to know what the original model puts out (`Block.targets`).
    """

    name: str
    function: Callable
    sees: str = "weight"
    stacks: bool = False
    targets: bool = False


METHODS = {
    method.name: method
    for method in (
        Method("rtn", rtn),
        Method("hqq", hqq),
        Method("imatrix", imatrix, "inputs"),
        Method("gptq", gptq, "inputs", stacks=True),
        Method("gptq-act-order", partial(gptq, act_order=True), "inputs", stacks=True),
        Method("awq", awq, "block"),
        Method("awq-clip", partial(awq, clip=True), "block"),
        Method("smoothquant", smoothquant, "block"),
        Method("smoothquant-search", partial(smoothquant, alpha=None), "block"),
        Method("smoothquant-gptq", partial(smoothquant, rounding=gptq), "block"),
        Method("autoround", autoround, "block", targets=True),
        # An eighth of the work.
        Method("autoround-light", partial(autoround, steps=50, batch=2), "block", targets=True),
    )
}
