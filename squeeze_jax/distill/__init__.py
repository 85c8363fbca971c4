"""Distillation: losses that pull a student towards its teachers, one a file, and what they share."""

from squeeze_jax import registry

__all__ = registry.names(__name__)
__getattr__ = registry.late(__name__, {name: f"{name}:." for name in __all__})
