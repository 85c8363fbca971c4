"""From a live model to files that run on devices, each run again and compared before it counts."""

from squeeze_jax import registry

__all__ = ["Disagreement", "Exported", "load", "make"]
# Late, so that a process that runs a TFLite file need not load jax.
_PLACES = dict.fromkeys(("make", "Exported", "Disagreement"), "build") | {
    "load": "runtime"
}
__getattr__ = registry.late(__name__, _PLACES)
