"""Functions that become one operation in a LiteRT file, such as GELU or the lookup in an embedding table.

StableHLO has no such operations. It writes them out as several smaller ones, and LiteRT's converter does not put these together
again. A StableHLO composite keeps a function together under a name that the converter knows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.custom_batching import custom_vmap

# User contexts are part of jit's cache key. So a jitted function that was traced outside a `keep_composites` block is traced
# again when it is called inside one.
_composites_kept = jax.make_user_context(False)


@contextmanager
def keep_composites() -> Iterator[None]:
    """Makes each function of `exported_as` one StableHLO composite in programs traced inside, for LiteRT's converter.

    Use it for no other programs: `jax.export` makes an invalid module of a composite with a symbolic batch size or for several
    platforms.
    """
    with _composites_kept(True):
        yield


def exported_as(
    name: str, plain: Callable, *, elementwise: bool = False, **attributes
) -> Callable:
    """Returns a function that computes `plain`, and that is one StableHLO composite inside `keep_composites`.

    LiteRT's converter recognises composites by their names. Derivatives are always those of `plain`.

    Args:
      name: name of the composite, such as "aten.gelu.default".
      plain: the function in JAX's operations: arrays → an array.
      elementwise: whether `plain` is an elementwise function of one array. Then `jax.vmap` of the result is the composite
        again; otherwise it is `jax.vmap` of `plain`.
      **attributes: attributes of the composite; the converter crashes on any that it does not expect.
    """

    @custom_vmap
    def composite(*arrays):
        def decomposition(*a, **_):
            return plain(*a)

        return jax.lax.composite(decomposition, name=name)(*arrays, **attributes)

    @composite.def_vmap
    def _(size, mapped, *arrays):
        if elementwise:
            return composite(*arrays), True
        axes = tuple(0 if is_mapped else None for is_mapped in mapped)
        return jax.vmap(plain, axes, axis_size=size)(*arrays), True

    differentiable = jax.custom_jvp(composite)

    @differentiable.defjvp
    def _(arrays, tangents):
        return jax.jvp(plain, arrays, tangents)

    def call(*arrays):
        return differentiable(*arrays) if _composites_kept.value else plain(*arrays)

    return call
