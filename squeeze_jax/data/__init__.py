"""Data: kinds of examples, their sources and transforms, and a deterministic, resumable input pipeline."""

from squeeze_jax.data.pipeline import Data, check, make

__all__ = ["Data", "check", "make"]
