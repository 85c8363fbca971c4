"""Python files of the user's own are modules of this package, also in worker processes; see `registry.load`."""

from squeeze_jax import registry

__all__ = ["registry"]  # its import installs what finds the files
