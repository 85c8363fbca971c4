"""Operations that an exported file has as one, where StableHLO would spell them out: GELU, an embedding's lookup."""

from collections.abc import Callable

import jax

from squeeze_jax.nn import conv


def exported_as(name: str, plain: Callable, **attributes) -> Callable:
    """Returns `plain` as a function that stays whole in what is exported.

    Inside `conv.lowering("native")` a call is one StableHLO composite, which LiteRT's converter knows by its name and
    others inline; elsewhere it is `plain` itself. Derivatives are always those of `plain`.

    Args:
      name: of the composite, such as "aten.gelu.default".
      plain: arrays → an array, in JAX's operations.
      **attributes: of the composite; the converter crashes on any that it does not expect.
    """

    @jax.custom_jvp
    def whole(*arrays):
        decomposition = lambda *a, **_: plain(*a)  # noqa: E731
        return jax.lax.composite(decomposition, name=name)(*arrays, **attributes)

    @whole.defjvp
    def _(arrays, tangents):
        return jax.jvp(plain, arrays, tangents)

    def call(*arrays):
        # Not wherever XLA's own operations are quickest, as on a GPU: composites cannot be mapped by `vmap`.
        forced = conv._forced.value == "native"
        return whole(*arrays) if forced else plain(*arrays)

    return call
