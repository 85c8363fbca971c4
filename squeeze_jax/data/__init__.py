"""Data: sources, transforms, and a deterministic, resumable input pipeline."""

from squeeze_jax.data.pipeline import Data, make

__all__ = ["Data", "make"]
