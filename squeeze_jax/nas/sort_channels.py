"""Sorts the channels inside each piece of a network by importance, so that smaller networks get the most important ones.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791, section 3.3 and Figure 3: before the training of smaller widths begins, the
channels of each layer are put in the order of their importance, the sum of the absolute weights that read them.
The function of the network stays the same. This is a transition between two phases.

The method finds by itself which arrays belong together. A layer that some network of the space has with fewer output channels
is sorted, if its channels stay inside the piece. All layers that read a layer's channels are permuted with it. Layers with
placements (`nn/placement.py`) tell which channels they have: heads and hidden channels of encoders are sorted by these.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from squeeze_jax import methods, tree
from squeeze_jax.errors import UserError
from squeeze_jax.methods import METHODS, Plain, Transition
from squeeze_jax.nas.family import Family
from squeeze_jax.nn.chain import Chain
from squeeze_jax.nn.channels import OUTPUT, make_finder
from squeeze_jax.nn.placement import Axis, Placement, placements
from squeeze_jax.registry import checked


@checked
def make(first: Mapping[str, Any] | None = None) -> Transition:
    """Returns the transition between two phases that sorts the channels.

    Args:
      first: options of a network, such as {"expand": 4}, whose channels stay before all others. An earlier phase has trained
        this network already. None to sort all channels together. If this network has more groups, heads and hidden channels of
        encoders stay in their groups, so that what it computes does not change either.

    Raises:
      UserError: in the transition: the network has no elastic options, or it does not compute the same as before.
    """

    def transition(options, state, plain):
        family = Family(options, plain)
        network = {k: v for k, v in state.params.items() if k != METHODS}
        variables = {"params": network, "batch_stats": state.stats}
        kept, trained = None, family.holder()
        if first is not None:
            trained = family.network(family.space.arch(first))
            kept = tree.flatten(family.shapes(trained))
        indices = permutations(family, variables, plain.example, kept)
        indices |= placed_permutations(family.holder(), trained, variables["params"])
        after = methods.take(state, indices)
        _check_unchanged(family.holder(), state, after, plain)
        return options, after

    return Transition(transition)


def permutations(
    family: Family, variables: Mapping[str, Any], example: Any, kept: Any = None
) -> dict[str, dict[int, np.ndarray]]:
    """Returns the new order of the channels of each array, {"params/...": {axis: indices}}.

    Args:
      family: the networks.
      variables: {"params", "batch_stats"} of the network that holds the weights.
      example: shapes of its inputs.
      kept: {array: shape} of a network whose channels stay before all others; None for none.

    Layers with placements are left out, see `placed_permutations`.
    """
    pieces = family.holder().pieces
    outer, inner = _elastic_layers(family)
    indices, x = {}, example
    for piece in pieces:
        name, net = piece.name, Chain((piece,))
        sources = [layer for layer in outer if _inside(layer, name)]
        if sources:
            own = {k: {name: v[name]} for k, v in variables.items() if name in v}
            arrays = tree.flatten(own)
            mixing = {layer for layer in inner if _inside(layer, name)}
            find = make_finder(net, own, mixing, x)
            for group in _groups(find, sources, mixing, arrays):
                indices |= _order(group, arrays, mixing, kept or {}, indices)
        x = jax.eval_shape(net.init_with_output, jax.random.key(0), x)[0][0]
    return indices


def placed_permutations(
    holder: Chain, trained: Chain, params: Mapping[str, Any]
) -> dict[str, dict[int, np.ndarray]]:
    """Returns the new order of the channels of layers with placements, {"params/...": {axis: indices}}.

    A unit, such as a head, is as important as the sum of the absolute weights that read it. The most important ones come
    first in the blocks of `Axis`. Units change places only if their channels are in the same groups in both networks.

    Args:
      holder: the network that holds the weights.
      trained: a network whose channels and function are kept, too; the holder for none.
      params: of the holder.
    """
    arrays, kept = tree.flatten({"params": params}), placements(trained.pieces)
    indices: dict[str, dict[int, np.ndarray]] = {}
    groups: dict[str, dict[str, Placement]] = {}
    for layer, placement in placements(holder.pieces).items():
        groups.setdefault(layer.partition("/")[0], {})[layer] = placement
    for layers in groups.values():
        sides = {
            axis._replace(shuffle=(1, 1))
            for placement in layers.values()
            for axis in placement[1:]
            if axis is not None
        }
        for axis in sides:
            importance = _importance(axis, layers, arrays)
            classes = _classes(axis, layers, kept)
            if importance is None:
                continue
            order = _in_blocks(axis, importance, classes)
            for layer, (_, inputs, outputs) in layers.items():
                for name, array in arrays.items():
                    if name.rpartition("/")[0] == f"params/{layer}":
                        own = indices.setdefault(name, {})
                        if _has(outputs, axis):
                            own[array.ndim - 1] = order
                        if _has(inputs, axis) and array.ndim > 1:
                            own[array.ndim - 2] = order
    return {name: axes for name, axes in indices.items() if axes}


def _has(axis: Axis | None, other: Axis) -> bool:
    return axis is not None and axis.name == other.name


def _importance(axis: Axis, layers: Mapping[str, Placement], arrays):
    """Returns the importance of the units of an axis, [units]; None if a grouped layer reads them.

    The groups of that layer would need orders of their own.

    Args:
      axis: the channels.
      layers: {layer: placement} of layers of the network that holds the weights.
      arrays: {"params/...": array} of this network.
    """
    sums = np.zeros(axis.count)
    for layer, placement in layers.items():
        if _has(placement.inputs, axis):
            if placement.groups > 1:
                return None
            kernel = np.asarray(arrays[f"params/{layer}/kernel"], np.float64)
            sums += np.abs(kernel).sum((*range(kernel.ndim - 2), kernel.ndim - 1))
    return sums.reshape(-1, axis.unit).sum(1)


def _classes(
    axis: Axis, layers: Mapping[str, Placement], kept: Mapping[str, Placement]
) -> np.ndarray:
    """Returns a number for each unit of an axis, int [units]: those with equal numbers may change places.

    Their channels are in the same groups of all layers, in the network that holds the weights and in another one that is kept.

    Args:
      axis: the channels in the network that holds the weights.
      layers: {layer: placement} of layers of this network.
      kept: {layer: placement} of the other network.
    """
    groups = []
    for layer, held in layers.items():
        for placement in held, kept.get(layer, held):
            for side in placement[1:]:
                if _has(side, axis):
                    group = np.full(axis.total, -1)  # -1: the network lacks the channel
                    numbers = np.arange(side.count) * placement.groups // side.count
                    group[side.channels()] = numbers
                    groups.append(group[axis.channels()].reshape(-1, axis.unit))
    rows = np.concatenate(groups, -1)
    return np.unique(rows, axis=0, return_inverse=True)[1].ravel()


def _in_blocks(axis: Axis, importance: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Returns the new order of channels, int [channels], with the most important units at the beginnings of blocks."""
    size = axis.total // axis.unit // axis.blocks  # of a block, in units
    places = np.argsort(axis.units() % size, kind="stable")
    order = np.arange(len(importance))
    for number in range(classes.max() + 1):
        members = np.flatnonzero(classes == number)
        by_importance = members[np.argsort(-importance[members], kind="stable")]
        order[places[classes[places] == number]] = by_importance
    return (order[:, None] * axis.unit + np.arange(axis.unit)).ravel()


def _elastic_layers(family: Family) -> tuple[set[str], set[str]]:
    """Returns the layers that have fewer outputs in some network of the space, and those that have fewer inputs."""
    large = tree.flatten(family.shapes(family.holder())["params"])
    outer, inner = set(), set()
    for name, positions in family.space.choices.items():
        values = tuple(choices[0] for choices in positions)
        small = family.network(family.space.arch({name: values}))
        for key, array in tree.flatten(family.shapes(small)["params"]).items():
            if key.endswith("/kernel") and key in large:
                layer = key.removesuffix("/kernel")
                if array.shape[-1] < large[key].shape[-1]:
                    outer.add(layer)
                if array.shape[-2] < large[key].shape[-2]:
                    inner.add(layer)
    return outer, inner


def _inside(layer: str, piece: str) -> bool:
    return layer.partition("/")[0] == piece


def _groups(find, sources, mixing, arrays):
    """Yields the groups of layers whose channels belong together, as ({layer that writes}, {layer that reads}).

    Args:
      find: the function of `channels.make_finder`.
      sources: layers with elastic outputs.
      mixing: layers that mix channels.
      arrays: {name: array} of the piece.
    """
    kernels = {layer: arrays[f"params/{layer}/kernel"].shape for layer in sources}
    sizes = {layer: shape[-1] for layer, shape in kernels.items()}
    reached, grouped = {}, set()
    for source in sorted(sources):
        followed = {
            layer: np.zeros(n, bool) if layer != source else np.arange(n) == n - 1
            for layer, n in sizes.items()
        }
        found = find(followed)
        if found.pop(OUTPUT).any():  # other pieces read these channels
            continue
        if kernels[source][-2] < len(found[source]):
            grouped.add(source)
        n = sizes[source]
        reached[source] = {
            layer
            for layer, channels in found.items()
            if len(channels) == n and channels[n - 1] and not channels[: n - 1].any()
        }
    remaining = dict(reached)
    while remaining:
        source, readers = remaining.popitem()
        group, members = {source}, set(readers)
        while joined := [
            other
            for other, theirs in remaining.items()
            if theirs & members or other in members - mixing
        ]:
            for other in joined:
                group.add(other)
                members |= remaining.pop(other)
        if not group <= grouped:  # else the order is that of the piece's inputs
            yield group, members


def _order(group, arrays, mixing, kept, taken):
    """Returns the new order of the channels of one group, {array: {axis: indices}}, together with other axes so far.

    Args:
      group: (layers that write the channels, layers that read them).
      arrays: {name: array} of the piece.
      mixing: layers that mix channels; all others that read the channels also write them.
      kept: see `permutations`.
      taken: {array: {axis: indices}} of other groups.
    """
    writers, readers = group
    count = arrays[f"params/{next(iter(writers))}/kernel"].shape[-1]
    axes = []
    for name in arrays:
        layer, _, array = name.partition("/")[2].rpartition("/")
        writes = layer in writers or (layer in readers and layer not in mixing)
        if writes and arrays[name].shape[-1] == count:
            axes.append((name, arrays[name].ndim - 1))
        if layer in readers and layer in mixing and array == "kernel":
            axes.append((name, arrays[name].ndim - 2))
    importance = np.zeros(count)
    for name, axis in axes:
        if axis == arrays[name].ndim - 2:
            others = tuple(a for a in range(arrays[name].ndim) if a != axis)
            importance += np.abs(np.asarray(arrays[name], np.float64)).sum(others)
    smaller = [kept[name].shape[axis] for name, axis in axes if name in kept]
    before = np.arange(count) >= min(smaller, default=count)
    order = np.lexsort((-importance, before))  # stable
    return {name: {**taken.get(name, {}), axis: order} for name, axis in axes}


def _check_unchanged(net, before, after, plain: Plain) -> None:
    """Raises a UserError unless the network computes the same as before, up to the order of sums."""
    rng = np.random.default_rng(0)
    x = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), plain.example)
    apply = jax.jit(functools.partial(net.apply, train=False))
    logits = [
        np.asarray(apply({"params": _plain(s.params), "batch_stats": s.stats}, x)[0])
        for s in (before, after)
    ]
    scale = max(np.abs(logits[0]).max(), 1e-6)
    if not np.abs(logits[1] - logits[0]).max() <= 1e-3 * scale:
        raise UserError(
            "nas.sort_channels: the sorted network computes something else: a layer reads channels in a way that this method"
            " does not follow; leave the transition out"
        )


def _plain(params):
    return {k: v for k, v in params.items() if k != METHODS}
