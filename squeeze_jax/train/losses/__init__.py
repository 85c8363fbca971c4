"""Losses of tasks, one a file; the file's name is the key."""

from squeeze_jax import registry

__all__ = registry.names(__name__)
__getattr__ = registry.late(__name__, {name: f"{name}:." for name in __all__})
