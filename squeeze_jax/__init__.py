"""Efficient deep networks in JAX: design, train, search, compress and ship."""

__version__ = "0.1.0"
