"""Compute kernels: `matmul(x, q)` runs the fastest one that fits, `explain(x, q)` names it,
`available()` lists them all.

Nothing is imported until it is used. Other libraries probe for a package called `kernels`, and from
the repository root they find and execute this file: it must do nothing and know no other names.
"""

NAMES = ("matmul", "explain", "available", "SlowKernelWarning")


def __getattr__(name: str):
    if name not in NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import dispatch

    return getattr(dispatch, name)
