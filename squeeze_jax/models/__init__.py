"""The model zoo: one architecture a file, the file's name is the key."""

import flax.linen as nn

from squeeze_jax import registry


def make(name: str, **options) -> nn.Module:
    """Builds the network of `models/<name>.py`: `(x [b, h, w, c], train) → (logits [b, classes], endpoints)`."""
    module = registry.load(__name__, name, "model")
    registry.check(module.make, options, "config.model")
    return module.make(**options)
