"""The model zoo: one architecture a file, the file's name is the key."""

from squeeze_jax import registry
from squeeze_jax.models._folder import load, save

__all__ = ["load", "make", "save"]


def make(name: str, **options):
    """Builds the Linen module of `models/<name>.py`, `(x, train) → (logits, endpoints)`; its file says what x is."""
    module = registry.load(__name__, name, "model")
    registry.check(module.make, options, "config.model")
    return module.make(**options)
