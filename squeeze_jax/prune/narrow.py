"""Narrowing: between two phases, layers lose the filters with the smallest norms, and what they fed loses the inputs.

Li, Kadav, Durdanovic, Samet, Graf 2016, arXiv 1608.08710, rank filters by their norm; here it is the L2 norm. The result is
a plain network: smaller arrays, and `widths` among its options. Weights, statistics, averages and the optimizer's state
are sliced alike, so training goes on where it was.

Which other arrays have to be sliced is observed, not declared. The network is built once more with the new widths, and
every array whose shape differs is one of them; where in it the removed channels lie is read off a pass through the old
network in which they are NaN. Layers that mix channels let no NaN through.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import tree
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.methods import METHODS, Plain, Transition
from squeeze_jax.ranges import Fraction


def make(layers: tuple[str, ...], keep: Fraction = 0.5) -> Transition:
    """Returns the transition.

    Args:
      layers: paths of convolutions and dense layers, such as ("fire2/expand3x3",).
      keep: share of their filters that stay, in (0, 1); at least one does.

    Raises:
      UserError: no layers, a share out of range; in the transition, a layer that the network does not have, or one whose
        filters cannot be removed alone, as in front of a residual sum.
    """
    if not layers:
        raise UserError("prune.narrow: layers = () names no layer")
    if not 0 < keep < 1:
        raise UserError(f"prune.narrow: keep = {keep} should lie in (0, 1)")

    def transition(options, state, plain):
        network = {k: v for k, v in state.params.items() if k != METHODS}
        removed = {layer: _smallest(_kernel(network, layer), keep) for layer in layers}
        widths = {
            layer: _kernel(network, layer).shape[-1] - len(gone)
            for layer, gone in removed.items()
        }
        after = {**options, "widths": {**options.get("widths", {}), **widths}}
        variables = {"params": network, "batch_stats": state.stats}
        kept = _kept(variables, removed, plain.make(options), plain.make(after), plain)
        return after, _sliced(state, kept)

    return Transition(transition)


def _kernel(params: Mapping[str, Any], layer: str):
    kernels = {
        name.removesuffix("/kernel"): array
        for name, array in tree.flatten(params).items()
        if name.endswith("/kernel")
    }
    if layer not in kernels:
        raise UserError(
            f"prune.narrow: the network has no layer {layer!r}{nearest(layer, kernels)}"
        )
    return kernels[layer]


def _smallest(kernel, keep: float) -> np.ndarray:
    """Returns the indices of the filters to remove, sorted; among equal norms the last ones."""
    norms = np.sqrt(
        np.square(np.asarray(kernel, np.float64)).sum(tuple(range(kernel.ndim - 1)))
    )
    stay = max(1, round(keep * len(norms)))
    return np.sort(np.argsort(-norms, kind="stable")[stay:])


def _kept(variables, removed, before, after, plain: Plain) -> dict:
    """Returns {array's name: {axis: indices that stay}} for each parameter and statistic that gets smaller."""
    wanted = jax.eval_shape(
        lambda x: after.init(jax.random.key(0), x, train=False), plain.example
    )
    new, changed = tree.flatten(wanted), {}
    for name, array in tree.flatten(variables).items():
        for axis, (old, left) in enumerate(
            zip(array.shape, new[name].shape, strict=True)
        ):
            if old != left:
                changed[name, axis] = old, left
    mixing = {
        _layer(name)
        for name, axis in changed
        if name.endswith("/kernel") and axis == len(new[name].shape) - 2
    }
    arriving = _arriving(before, variables, removed, mixing, plain.example)
    kept = {}
    for (name, axis), (old, left) in changed.items():
        layer = _layer(name)
        if layer in removed and axis == len(new[name].shape) - 1:
            gone = removed[layer]
        else:
            gone = _gone(arriving, layer, old)
        if gone is None or len(gone) != old - left:
            raise UserError(
                f"prune.narrow: cannot tell which of the {old} channels of {name} come from {', '.join(removed)}:"
                " choose other layers"
            )
        kept.setdefault(name, {})[axis] = np.setdiff1d(np.arange(old), gone)
    return kept


def _layer(name: str) -> str:
    """Returns the path of the layer that an array belongs to."""
    return name.partition("/")[2].rpartition("/")[0]


def _gone(arriving, layer: str, channels: int):
    """Returns the removed channels among those that arrive at a layer, or at the nearest block around it that has as many."""
    while layer:
        if layer in arriving and len(arriving[layer]) == channels:
            return np.flatnonzero(arriving[layer])
        layer = layer.rpartition("/")[0]
    return None


def _arriving(net, variables, removed, mixing, example) -> dict[str, np.ndarray]:
    """Returns {layer: bool [channels]}: which of the channels that arrive at it are removed ones.

    Args:
      net: the network before.
      variables: of it.
      removed: {layer: its filters that go}.
      mixing: layers that mix the removed channels with others.
      example: shapes of the network's inputs.
    """
    seen = {}

    def observe(call, args, kwargs, context):
        path = "/".join(context.module.path)
        if context.method_name != "__call__" or not path:
            return call(*args, **kwargs)
        x = args[0] if args else None
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating):
            lost = jnp.isnan(x).any(tuple(range(x.ndim - 1)))
            seen[path] = seen[path] | lost if path in seen else lost
        y = call(*args, **kwargs)
        if path in mixing:
            y = jax.tree.map(jnp.nan_to_num, y)
        if path in removed:
            y = y.at[..., removed[path]].set(jnp.nan)
        return y

    def run(variables, x):
        seen.clear()
        with nn.intercept_methods(observe):
            net.apply(variables, x, train=False)
        return dict(seen)

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), example)
    with jax.debug_nans(False):
        return jax.device_get(jax.jit(run)(variables, zeros))


def _sliced(state: Any, kept: Mapping[str, Mapping[int, np.ndarray]]):
    """Slices a training state: each array is cut as the parameter or statistic that it belongs to."""
    parameters = tree.flatten({k: v for k, v in state.params.items() if k != METHODS})
    statistics = tree.flatten(state.stats)

    def leaf(name, array):
        for collection, arrays in ("params", parameters), ("batch_stats", statistics):
            owner = tree.owner(name, np.shape(array), arrays)
            if owner is not None:
                for axis, stay in kept.get(f"{collection}/{owner}", {}).items():
                    array = np.take(np.asarray(array), stay, axis)
                return array
        return array

    parts = {k: getattr(state, k) for k in ("params", "stats", "opt", "ema", "extra")}
    return state._replace(**tree.map_named(leaf, parts))
