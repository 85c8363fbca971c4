"""The model zoo: one architecture a file, the file's name is the key."""

import flax.linen as nn

from squeeze_jax import registry
from squeeze_jax.models._folder import load, save

__all__ = ["load", "make", "save"]


def make(name: str, **options) -> nn.Module:
    """Builds the network of `models/<name>.py`: `(x, train) → (logits, endpoints)`.

    x is [b, h, w, c] and logits [b, classes]; an encoder of text takes {"tokens": [b, l], …}, see its file.
    """
    module = registry.load(__name__, name, "model")
    registry.check(module.make, options, "config.model")
    return module.make(**options)
