"""Efficient deep networks in JAX: design, train, search, compress and ship."""

from squeeze_jax import _public, registry

__version__ = "0.1.0"
__all__ = [*_public.PLACES]
__getattr__ = registry.late(__name__, _public.PLACES)


def __dir__():
    return __all__
