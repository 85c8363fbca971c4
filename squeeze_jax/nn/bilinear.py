"""A convolution's three maps as primitives that are closed under differentiation.

With T(x, k, ȳ) = <ȳ, x * k>, linear in all three, each map is the gradient of T with respect to one of them: so the
derivative of a map with respect to either argument is one of the other two. Rules that say so give derivatives of every
order, forward and reverse, and each of them is computed by the lowering that is quickest for it, where differentiating
the operations of a forward lowering is slow: on a CPU by up to ten times.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching

from squeeze_jax.nn import lowerings, primitives
from squeeze_jax.nn.lowerings import MAPS, Map
from squeeze_jax.nn.windows import Geometry


def conv(x: jax.Array, k: jax.Array, g: Geometry, lowering: str = "auto") -> jax.Array:
    """The convolution [b, h', w', f] of x [b, h, w, c] with k [kh, kw, c / groups, f], of one dtype.

    Args:
      g: must fit both shapes.
      lowering: of `lowerings.possible(g)`, or "auto": the quickest one for each map on the platform of the compilation.
    """
    return _maps["forward"].bind(x, k, geometry=g, lowering=lowering)


def _run(which: Map, a, b, *, geometry, lowering):
    return lowerings.run(which, lowering, geometry, a, b)


def _run_elsewhere(which: Map, a, b, *, geometry, lowering):
    """As `_run`, for accelerators: there XLA's convolution is the quickest."""
    return _run(which, a, b, geometry=geometry, lowering=_native(lowering))


def _native(lowering: str) -> str:
    return "native" if lowering == "auto" else lowering


# The arguments of a map, and what the derivative with respect to each is: the map and its two arguments, where "ct" is
# the cotangent of the map's result.
_ARGUMENTS = {"forward": "xk", "image": "yk", "kernel": "xy"}
_MAP_OF = {"y": "forward", "x": "image", "k": "kernel"}


def _transpose(which: Map, position: int):
    """The rule for one argument: with the cotangent in the result's place, the map whose result that argument is."""
    names = _ARGUMENTS[which]
    wanted, given = names[position], names[1 - position]
    result = next(n for n, m in _MAP_OF.items() if m == which)

    target = _MAP_OF[wanted]

    def rule(cotangent, *arguments, **params):
        arrays = {result: cotangent, given: arguments[1 - position]}
        return _maps[target].bind(*(arrays[n] for n in _ARGUMENTS[target]), **params)

    return rule


def _batched(which: Map, arrays, dims, *, geometry, lowering):
    """`vmap`: another axis of images joins the batch; several kernels are operations of XLA from here on."""
    a, b = (
        x if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(arrays, dims, strict=True)
    )
    if which != "kernel" and dims[1] is None:
        n, m = a.shape[:2]
        out = _maps[which].bind(
            a.reshape(n * m, *a.shape[2:]), b, geometry=geometry, lowering=lowering
        )
        return out.reshape(n, m, *out.shape[1:]), 0
    axes = tuple(None if d is None else 0 for d in dims)

    def mapped(lowering):
        one = partial(lowerings.run, which, lowering, geometry, plain=True)
        return jax.vmap(one, axes)

    if lowering != "auto":
        return mapped(lowering)(a, b), 0
    elsewhere = mapped(_native(lowering))
    return lax.platform_dependent(a, b, cpu=mapped(lowering), default=elsewhere), 0


def _primitive(which: Map) -> Primitive:
    primitive = primitives.make(
        f"conv_{which}",
        partial(_run, which),
        partial(_run_elsewhere, which),
        like=lambda a, b, **p: _run(which, a, b, **p | {"lowering": "native"}),
    )
    ad.defbilinear(primitive, _transpose(which, 0), _transpose(which, 1))
    batching.primitive_batchers[primitive] = partial(_batched, which)
    return primitive


_maps = {which: _primitive(which) for which in MAPS}
