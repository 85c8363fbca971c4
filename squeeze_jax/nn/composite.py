"""Operations that LiteRT has as one, where StableHLO spells them out: GELU, an embedding's lookup."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
from jax.custom_batching import custom_vmap

# A user context is part of jit's cache key, so that a function traced outside a `whole` block is traced again in it.
_whole = jax.make_user_context(False)


@contextmanager
def whole() -> Iterator[None]:
    """Keeps the operations of `exported_as` whole in what is traced inside, for LiteRT's converter.

    Not for other programs: jax.export makes an invalid module of a composite with a symbolic batch or for several
    platforms.
    """
    with _whole(True):
        yield


def exported_as(
    name: str, plain: Callable, *, elementwise: bool = False, **attributes
) -> Callable:
    """Returns `plain` as a function that inside `whole` is one StableHLO composite.

    LiteRT's converter knows composites by their names. Derivatives are always those of `plain`.

    Args:
      name: of the composite, such as "aten.gelu.default".
      plain: arrays → an array, in JAX's operations.
      elementwise: whether `plain` is a function of each number of one array, so that `vmap` of it is the same function.
        That of others is `vmap` of `plain`.
      **attributes: of the composite; the converter crashes on any that it does not expect.
    """

    @custom_vmap
    def whole(*arrays):
        def decomposition(*a, **_):
            return plain(*a)

        return jax.lax.composite(decomposition, name=name)(*arrays, **attributes)

    @whole.def_vmap
    def _(size, mapped, *arrays):
        if elementwise:
            return whole(*arrays), True
        axes = tuple(0 if each else None for each in mapped)
        return jax.vmap(plain, axes, axis_size=size)(*arrays), True

    one = jax.custom_jvp(whole)

    @one.defjvp
    def _(arrays, tangents):
        return jax.jvp(plain, arrays, tangents)

    def call(*arrays):
        return one(*arrays) if _whole.value else plain(*arrays)

    return call
