"""Knowledge distillation: losses that train a student to match its teachers, one per file, and a cache of teacher outputs."""

from squeeze_jax import registry

__all__ = registry.names(__name__)
__getattr__ = registry.late(__name__, {name: f"{name}:." for name in __all__})
