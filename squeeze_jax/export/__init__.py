"""Exports a trained model to files that run on devices. Each file is run and compared with the model before it is kept."""

from squeeze_jax import registry

__all__ = ["Disagreement", "Exported", "load", "make"]
# Imported on first use, so that a process that runs a TFLite file need not load JAX.
_PLACES = dict.fromkeys(("make", "Exported", "Disagreement"), "build") | {
    "load": "runtime"
}
__getattr__ = registry.late(__name__, _PLACES)
