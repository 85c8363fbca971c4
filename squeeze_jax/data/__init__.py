"""Data: kinds of examples, their sources and transforms, and a deterministic, resumable input pipeline."""

from squeeze_jax.data.pipeline import Data, make

__all__ = ["Data", "make"]
