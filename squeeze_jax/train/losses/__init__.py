"""Losses of tasks, one per file. A config names a loss by its file, such as "losses.cross_entropy"."""

from squeeze_jax import registry

__all__ = registry.names(__name__)
__getattr__ = registry.late(__name__, {name: f"{name}:." for name in __all__})
