"""From a live model to files that run on devices, each run again and compared before it counts."""

_PLACES = {
    "make": "build",
    "Exported": "build",
    "Disagreement": "build",
    "load": "runtime",
}
__all__ = ["Disagreement", "Exported", "load", "make"]


def __getattr__(
    name,
):  # late, so that a process that runs a TFLite file need not load jax
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
