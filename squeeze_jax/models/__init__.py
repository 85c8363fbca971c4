"""The model zoo: one architecture a file, the file's name is the key."""

from squeeze_jax import registry
from squeeze_jax.models._folder import load, options, save

__all__ = ["load", "make", "options", "save"]


def make(name: str, **given):
    """Builds the Linen module of `models/<name>.py`, `(x, train) → (logits, endpoints)`; its file says what x is."""
    module = registry.load(__name__, name, "model")
    registry.check(module.make, given, "config.model")
    return module.make(**given)
