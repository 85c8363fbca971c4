"""Sorts the channels inside each piece of a network by importance, so that smaller networks get the most important ones.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791, section 3.3 and Figure 3: before the training of smaller widths begins, the
channels of each layer are put in the order of their importance, the sum of the absolute weights that read them.
The function of the network stays the same. This is a transition between two phases.

The method finds by itself which arrays belong together. A layer that some network of the space has with fewer output channels
is sorted, if its channels stay inside the piece. All layers that read a layer's channels are permuted with it.
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
from squeeze_jax.registry import checked


@checked
def make(first: Mapping[str, Any] | None = None) -> Transition:
    """Returns the transition between two phases that sorts the channels.

    Args:
      first: options of a network, such as {"expand": 4}, whose channels stay before all others. An earlier phase has trained
        this network already. None to sort all channels together.

    Raises:
      UserError: in the transition: the network has no elastic options, or it does not compute the same as before.
    """

    def transition(options, state, plain):
        family = Family(options, plain)
        network = {k: v for k, v in state.params.items() if k != METHODS}
        variables = {"params": network, "batch_stats": state.stats}
        kept = None
        if first is not None:
            kept = tree.flatten(family.shapes(family.network(family.space.arch(first))))
        indices = permutations(family, variables, plain.example, kept)
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
    """
    pieces = family.holder().pieces
    outer, inner = _elastic_layers(family)
    indices, x = {}, example
    for piece in pieces:
        name, net = piece.name, Chain((piece,))
        own = {k: {name: v[name]} for k, v in variables.items() if name in v}
        arrays = tree.flatten(own)
        sources = [layer for layer in outer if _inside(layer, name)]
        mixing = {layer for layer in inner if _inside(layer, name)}
        find = make_finder(net, own, mixing, x)
        for group in _groups(find, sources, mixing, arrays):
            indices |= _order(group, arrays, mixing, kept or {}, indices)
        x = jax.eval_shape(net.apply, own, x)[0]
    return indices


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
