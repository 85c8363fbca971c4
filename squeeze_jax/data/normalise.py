"""Normalises pixels 0..255 by mean and standard deviation."""

from collections.abc import Sequence

import jax.numpy as jnp

from squeeze_jax.errors import UserError


def per_channel(numbers: float | Sequence[float]) -> tuple[float, ...]:
    """Returns one number, or one for each channel, as a tuple of floats."""
    is_single = isinstance(numbers, int | float)
    return (float(numbers),) if is_single else tuple(map(float, numbers))


def check_normalisation(
    mean: Sequence[float], std: Sequence[float], channels: int
) -> None:
    """Raises a UserError unless there is one number or one per channel, and all deviations are positive."""
    for key, values in ("mean", mean), ("std", std):
        if len(values) not in (1, channels):
            raise UserError(
                f"config.data.{key} has {len(values)} numbers: it should have 1, or one for each of {channels} channels"
            )
    if min(std) <= 0:
        raise UserError(f"config.data.std = {std} should be positive")


def normalised(images, mean: Sequence[float], std: Sequence[float]):
    """Returns (x / 255 - mean) / std, float32, for pixels [b, h, w, c] of any dtype; runs under jit.

    Args:
      images: the pixels.
      mean, std: in units of 0..1, one number or one per channel.
    """
    mean, std = (jnp.array(v, jnp.float32) for v in (mean, std))
    return images.astype(jnp.float32) * (1 / (255 * std)) - mean / std
