"""Filter pruning between two phases: layers lose the filters with the smallest norms, and later layers lose those inputs.

Li, Kadav, Durdanovic, Samet, Graf 2016, arXiv 1608.08710, rank filters by their norm; this method uses the L2 norm. The result
is a plain network with smaller arrays, and with `widths` among its options. Weights, running statistics, weight averages and
the optimizer's state are sliced in the same way, so training continues where it was.

The method finds out by itself which other arrays it must slice. It builds the network again with the new widths; all arrays
whose shapes differ must be sliced. To find the removed channels in these arrays, it runs the old network with NaN in the
channels that go. After layers that mix channels, NaN is replaced by zero, so that it does not spread.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from squeeze_jax import methods, tree
from squeeze_jax.errors import UserError, nearest
from squeeze_jax.methods import METHODS, Plain, Transition
from squeeze_jax.nn.channels import make_finder
from squeeze_jax.ranges import Fraction
from squeeze_jax.registry import checked


@checked
def make(layers: tuple[str, ...], keep: Fraction = 0.5) -> Transition:
    """Returns the transition between two phases that removes the filters.

    Args:
      layers: paths of convolutions and dense layers, such as ("fire2/expand3x3",).
      keep: share of each layer's filters that stay, in (0, 1); at least one filter stays.

    Raises:
      UserError: There are no layers, or the share is out of range. In the transition: the network does not have a layer, or
        filters cannot be removed from it alone, for example before a residual sum.
    """
    if not layers:
        raise UserError("prune.narrow: layers = () names no layer")
    if not 0 < keep < 1:
        raise UserError(f"prune.narrow: keep = {keep} should lie in (0, 1)")

    def transition(options, state, plain):
        network = {k: v for k, v in state.params.items() if k != METHODS}
        removed = {
            layer: _smallest_filters(_kernel(network, layer), keep) for layer in layers
        }
        widths = {
            layer: _kernel(network, layer).shape[-1] - len(filters)
            for layer, filters in removed.items()
        }
        new_options = {**options, "widths": {**options.get("widths", {}), **widths}}
        variables = {"params": network, "batch_stats": state.stats}
        old_net, new_net = plain.make(options), plain.make(new_options)
        kept = _kept_indices(variables, removed, old_net, new_net, plain)
        return new_options, methods.take(state, kept)

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


def _smallest_filters(kernel, keep: float) -> np.ndarray:
    """Returns the sorted indices of the filters to remove; among filters of equal norm, the last ones."""
    norms = np.sqrt(
        np.square(np.asarray(kernel, np.float64)).sum(tuple(range(kernel.ndim - 1)))
    )
    kept_count = max(1, round(keep * len(norms)))
    return np.sort(np.argsort(-norms, kind="stable")[kept_count:])


def _kept_indices(variables, removed, old_net, new_net, plain: Plain) -> dict:
    """Returns {array's name: {axis: indices that stay}} for each parameter and statistic that gets smaller."""
    new_shapes = jax.eval_shape(
        lambda x: new_net.init(jax.random.key(0), x, train=False), plain.example
    )
    new, changed = tree.flatten(new_shapes), {}
    for name, array in tree.flatten(variables).items():
        for axis, (old_size, new_size) in enumerate(
            zip(array.shape, new[name].shape, strict=True)
        ):
            if old_size != new_size:
                changed[name, axis] = old_size, new_size
    mixing = {
        _layer_path(name)
        for name, axis in changed
        if name.endswith("/kernel") and axis == len(new[name].shape) - 2
    }
    find_readers = make_finder(old_net, variables, mixing, plain.example)
    outputs = {
        layer: _kernel(variables["params"], layer).shape[-1] for layer in removed
    }
    removed_inputs = find_readers(
        {layer: np.isin(np.arange(n), removed[layer]) for layer, n in outputs.items()}
    )
    kept = {}
    for (name, axis), (old_size, new_size) in changed.items():
        layer = _layer_path(name)
        if layer in removed and axis == len(new[name].shape) - 1:
            channels = removed[layer]
        else:
            channels = _removed_channels(removed_inputs, layer, old_size)
        if channels is None or len(channels) != old_size - new_size:
            raise UserError(
                f"prune.narrow: cannot tell which of the {old_size} channels of {name} come from {', '.join(removed)}:"
                " choose other layers"
            )
        kept.setdefault(name, {})[axis] = np.setdiff1d(np.arange(old_size), channels)
    return kept


def _layer_path(name: str) -> str:
    """Returns the path of the layer that has an array."""
    return name.partition("/")[2].rpartition("/")[0]


def _removed_channels(removed_inputs, layer: str, count: int):
    """Returns the indices of the removed channels among the `count` input channels of a layer.

    If the layer itself has another number of inputs, the nearest block around it with `count` inputs decides.
    """
    while layer:
        if layer in removed_inputs and len(removed_inputs[layer]) == count:
            return np.flatnonzero(removed_inputs[layer])
        layer = layer.rpartition("/")[0]
    return None
