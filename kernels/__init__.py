"""Compute kernels, imported as `qlib.kernels`; nothing is imported until it is used."""


def __getattr__(name: str):
    if name in ("matmul", "explain"):
        from . import dispatch

        return getattr(dispatch, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
