"""The three maps of a convolution as JAX primitives, whose derivatives are again one of the three maps.

The maps are described in `nn/lowerings.py`. T(x, k, ȳ) = <ȳ, x * k> is linear in all three arguments, and each map is the
gradient of T with respect to one of them. So the derivative of a map with respect to either of its arguments is one of the
other two maps. The primitives' rules state this to JAX. It gives derivatives of every order, in forward and in reverse mode,
and each derivative is computed by the lowering that is fastest for it. To differentiate the operations of a forward lowering
instead is up to ten times slower on a CPU.
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
    """Returns the convolution of images with a kernel, [b, h', w', f].

    Args:
      x: images [b, h, w, c].
      k: kernel [kh, kw, c / groups, f], of the same dtype.
      g: the convolution's geometry, which fits both shapes.
      lowering: a name of `lowerings.possible(g)`; or "auto" for the fastest lowering of each map on the platform that the
        function is compiled for.
    """
    return _maps["forward"].bind(x, k, geometry=g, lowering=lowering)


def _run(which: Map, a, b, *, geometry, lowering):
    return lowerings.run(which, lowering, geometry, a, b)


def _run_elsewhere(which: Map, a, b, *, geometry, lowering):
    """Computes a map on an accelerator, where XLA's convolution is the fastest lowering."""
    return _run(which, a, b, geometry=geometry, lowering=_auto_is_native(lowering))


def _auto_is_native(lowering: str) -> str:
    return "native" if lowering == "auto" else lowering


# The two arguments of each map, and the map that returns each array.
_ARGUMENTS = {"forward": "xk", "image": "yk", "kernel": "xy"}
_MAP_RETURNING = {"y": "forward", "x": "image", "k": "kernel"}


def _transpose(which: Map, position: int):
    """Returns the transpose rule of a map for one of its arguments.

    The cotangent of that argument is the map that returns an array like the argument. It gets the map's other argument, and
    the cotangent of the map's result in the place of the result.
    """
    names = _ARGUMENTS[which]
    argument, other = names[position], names[1 - position]
    result = next(name for name, map in _MAP_RETURNING.items() if map == which)
    target = _MAP_RETURNING[argument]

    def rule(cotangent, *arguments, **params):
        arrays = {result: cotangent, other: arguments[1 - position]}
        return _maps[target].bind(*(arrays[n] for n in _ARGUMENTS[target]), **params)

    return rule


def _batch_rule(which: Map, arrays, dims, *, geometry, lowering):
    """Applies `jax.vmap` to a map.

    A mapped axis of images joins their batch axis. Mapped kernels, and the map "kernel", need `jax.vmap` of the lowering's
    operations.
    """
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
        run = partial(lowerings.run, which, lowering, geometry, for_vmap=True)
        return jax.vmap(run, axes)

    if lowering != "auto":
        return mapped(lowering)(a, b), 0
    elsewhere = mapped(_auto_is_native(lowering))
    return lax.platform_dependent(a, b, cpu=mapped(lowering), default=elsewhere), 0


def _primitive(which: Map) -> Primitive:
    primitive = primitives.make(
        f"conv_{which}",
        partial(_run, which),
        partial(_run_elsewhere, which),
        like=lambda a, b, **p: _run(which, a, b, **p | {"lowering": "native"}),
    )
    ad.defbilinear(primitive, _transpose(which, 0), _transpose(which, 1))
    batching.primitive_batchers[primitive] = partial(_batch_rule, which)
    return primitive


_maps = {which: _primitive(which) for which in MAPS}
