"""Every method of qlib, with its defaults but for tokens, format and steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from task import TASK, Clock, finish, matrix, windows

import qlib
from qlib.linear import QLinear
from qlib.methods import METHODS

KIND = TASK["options"].pop("format", "asym")
FORMAT = f"int{TASK['bits']}-g{TASK['group']}-{KIND}"
STORES = {
    "asym": "float16 scale, integer zero point",
    "offset": "float16 scale, float16 offset",
}[KIND]


def main() -> None:
    method = METHODS[TASK["method"]]
    method = replace(method, function=partial(method.function, **TASK["options"]))
    if (weight := matrix()) is not None:
        with Clock() as clock:
            method.function(weight, qlib.format(FORMAT))
        return finish({}, clock, STORES, "bits-per-weight")
    # Imported on first use, and imports are not on the clock; the peers' are above theirs.
    import qlib.kernels.cpu.bitstream
    import qlib.kernels.cpu.nibbles

    model, _ = qlib.load(TASK["model"])
    data = {} if method.sees == "weight" else {"calibration": list(windows())}
    with Clock() as clock:
        qlib.quantize_model(model, FORMAT, method, progress=False, **data)
    tensors = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, QLinear):
            tensors[f"{name}.weight"] = module.weight.dequantize()
    finish(tensors, clock, STORES, "bits-per-weight")


if __name__ == "__main__":
    main()
