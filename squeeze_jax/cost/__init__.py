"""Costs of a function: parameters, multiply-accumulates (MACs), memory and latency."""

from squeeze_jax import registry

__all__ = ["by_layer", "latency", "macs", "memory", "parameters", "total"]
_COUNTS = dict.fromkeys(("macs", "parameters"), "count")
_LAYERS = {"by_layer": "layers:layers", "total": "layers"}
_MODULES = {"latency": "latency:.", "memory": "memory:."}
__getattr__ = registry.late(__name__, _COUNTS | _LAYERS | _MODULES)
