"""Operations that LiteRT has as one, where StableHLO spells them out: GELU, an embedding's lookup."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

# A user context is part of jit's cache key, so that a function traced outside a `whole` block is traced again in it.
_whole = jax.make_user_context(False)


@contextmanager
def whole() -> Iterator[None]:
    """Keeps the operations of `exported_as` whole in what is traced inside, for LiteRT's converter.

    Not for other programs: a composite cannot be mapped by `vmap`, and jax.export makes an invalid module of one with
    a symbolic batch or for several platforms.
    """
    with _whole(True):
        yield


def exported_as(name: str, plain: Callable, **attributes) -> Callable:
    """Returns `plain` as a function that inside `whole` is one StableHLO composite.

    LiteRT's converter knows composites by their names. Derivatives are always those of `plain`.

    Args:
      name: of the composite, such as "aten.gelu.default".
      plain: arrays → an array, in JAX's operations.
      **attributes: of the composite; the converter crashes on any that it does not expect.
    """

    @jax.custom_jvp
    def one(*arrays):
        def decomposition(*a, **_):
            return plain(*a)

        return jax.lax.composite(decomposition, name=name)(*arrays, **attributes)

    @one.defjvp
    def _(arrays, tangents):
        return jax.jvp(plain, arrays, tangents)

    def call(*arrays):
        return one(*arrays) if _whole.value else plain(*arrays)

    return call
