"""The weights of a smaller network inside those of a larger one.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791 (once-for-all), section 3.2. A smaller network uses the first channels of
each layer, and the centre of each kernel. A learned matrix per pair of kernel sizes changes the centre: from 49 values
to the 25 of the 5x5 kernel, and from these to the nine of the 3x3 kernel. All channels of a layer share it. This file
knows no architecture: it compares the shapes of two networks' parameters.

Layers with elastic groups, or of which other channels than the first ones remain, say so by a `Placement`. A layer with more
groups uses the diagonal blocks of the kernel, that is, each output channel the weights of the inputs that it still reads.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.nn.placement import Axis, Placement

Transforms = Mapping[str, Mapping[str, Any]]
Placements = Mapping[str, Placement]

MOST_SLICES = 64  # channels in more pieces are picked one by one


def take(
    variables: Mapping[str, Any],
    shapes: Any,
    transforms: Transforms | None = None,
    placements: tuple[Placements, Placements] = ({}, {}),
) -> dict[str, Any]:
    """Returns the variables of a smaller network, as slices of a larger network's.

    A convolution without placements has the same number of groups in both networks, unless it is depthwise.

    Args:
      variables: collections of the larger network, such as {"params", "batch_stats"}.
      shapes: the same collections of the smaller network, as arrays or shapes. Arrays that it lacks are left out.
      transforms: {layer: {"7to5": [25, 25], "5to3": [9, 9]}}; kernels without one are cropped only. A layer that the larger
        network lacks has its parameters here, {layer: {"kernel": array}}, see `Family.spare_shapes`.
      placements: {layer: placement} of the larger and of the smaller network, see `nn/placement.py`.

    Raises:
      UserError: an array of the smaller network is absent in the larger one, is smaller there, or has a kernel whose
        centre is between two positions; or the groups of the smaller network are not inside those of the larger one.
    """
    large = tree.flatten(variables)
    of_large, of_small = placements

    def sub(name, like):
        layer, _, end = name.partition("/")[2].rpartition("/")
        own = (transforms or {}).get(layer, {})
        if name not in large:
            if end not in own:
                raise UserError(f"{name} is not in the larger network")
            return _slice(name, own[end], like.shape, {})
        if layer in of_small:
            both = of_large.get(layer, Placement()), of_small[layer]
            return _place(name, large[name], like.shape, both)
        return _slice(name, large[name], like.shape, own)

    return tree.map_named(sub, shapes)


def put(large: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a larger network's statistics with a smaller one's in the places from which `take` has taken them.

    Args:
      large: collections of the larger network, whose arrays have no kernels among them, such as {"batch_stats"}.
      small: the same of the smaller network.
    """
    new = tree.flatten(small)

    def write(name, array):
        if name not in new:
            return array
        return array.at[tuple(slice(0, n) for n in new[name].shape)].set(new[name])

    return tree.map_named(write, large)


def _slice(name, array, shape, transforms):
    """Returns the part of an array that a smaller network uses."""
    if array.shape == shape:
        return array
    if array.ndim != len(shape) or any(
        a < b for a, b in zip(array.shape, shape, strict=True)
    ):
        raise UserError(
            f"{name} is {list(array.shape)} in the larger network and {list(shape)} in the smaller one"
        )
    if name.endswith("/kernel") and array.shape[:-2] != shape[:-2]:
        channels = tuple(slice(0, n) for n in shape[-2:])
        kernel = array[(..., *channels)]
        return resize_kernel(name, kernel, shape[:-2], transforms)
    return array[tuple(slice(0, n) for n in shape)]


def _place(name, array, shape, placements: tuple[Placement, Placement]):
    """Returns the part of an array of a layer that a smaller network uses, for layers with placements.

    Args:
      name: of the array.
      array: kernel [..., c / groups, features] or an array [features], such as the bias.
      shape: its shape in the smaller network.
      placements: of the layer in the larger and in the smaller network.
    """
    if placements[0] == placements[1]:
        return array
    large, small = placements
    columns = _positions(
        _channels(small.outputs, shape[-1]),
        _channels(large.outputs, array.shape[-1]),
        name,
    )
    if len(shape) == 1:
        return _pick(array, columns, 0)
    sources = _channels(large.inputs, array.shape[-2] * large.groups)
    sources = sources.reshape(large.groups, -1)
    wanted = _channels(small.inputs, shape[-2] * small.groups)
    blocks = []
    for rows, block in zip(
        wanted.reshape(small.groups, -1),
        columns.reshape(small.groups, -1),
        strict=True,
    ):
        groups = set((block * large.groups // array.shape[-1]).tolist())
        if len(groups) > 1:
            raise _not_inside(name)
        rows = _positions(rows, sources[groups.pop()], name)
        blocks.append(_pick(_pick(array, block, -1), rows, -2))
    if len(blocks) == 1:
        return blocks[0]
    concatenate = np.concatenate if isinstance(array, np.ndarray) else jnp.concatenate
    return concatenate(blocks, -1)


def _channels(axis: Axis | None, count: int) -> np.ndarray:
    return np.arange(count) if axis is None else axis.channels()


def _positions(wanted: np.ndarray, channels: np.ndarray, name: str) -> np.ndarray:
    """Returns the positions of the wanted channels among others; raises a UserError if one of them is not there."""
    order = np.argsort(channels)
    places = np.searchsorted(channels, wanted, sorter=order)
    found = order[np.minimum(places, len(channels) - 1)]
    if not np.array_equal(channels[found], wanted):
        raise _not_inside(name)
    return found


def _not_inside(name: str) -> UserError:
    return UserError(
        f"{name}: its channels or groups are not inside those of the network that holds the weights: give that network the"
        " most channels and 1 group"
    )


def _pick(array, indices: np.ndarray, axis: int):
    """Returns array[indices] along an axis; slices are faster than indices, above all for gradients."""
    starts = np.flatnonzero(np.diff(indices, prepend=-2) != 1)
    if len(starts) > MOST_SLICES:
        take = np.take if isinstance(array, np.ndarray) else jnp.take
        return take(array, indices, axis=axis)
    others = (slice(None),) * (-axis - 1 if axis < 0 else 0)
    slices = [
        slice(int(indices[a]), int(indices[a]) + int(b - a))
        for a, b in itertools.pairwise([*starts, len(indices)])
    ]
    parts = [array[(..., s, *others)] for s in slices]
    if len(parts) == 1:
        return parts[0]
    concatenate = np.concatenate if isinstance(array, np.ndarray) else jnp.concatenate
    return concatenate(parts, axis)


def resize_kernel(
    name: str, kernel: jax.Array, size: Sequence[int], transforms: Mapping[str, Any]
) -> jax.Array:
    """Returns a kernel of a smaller size: its centre, changed by the matrices on the way from size to size.

    Args:
      name: of the kernel, for the error message.
      kernel: [*sides, c, features].
      size: the smaller sides, all equal if there are transforms.
      transforms: {"7to5": matrix}; the kernel passes through each size that is the target of a matrix and not below `size`.

    Raises:
      UserError: a side shrinks by an odd number, so the kernel has no centre of that size.
    """
    steps = sorted(
        {int(key.partition("to")[2]) for key in transforms} | {max(size)}, reverse=True
    )
    for side in steps:
        if side < max(size) or side >= kernel.shape[0]:
            continue
        sides = tuple(size) if side == max(size) else (side,) * len(size)
        matrix = transforms.get(f"{kernel.shape[0]}to{side}")
        starts = [
            (old - new) / 2 for old, new in zip(kernel.shape, sides, strict=False)
        ]
        if any(start != int(start) for start in starts):
            raise UserError(
                f"{name}: a kernel of {kernel.shape[0]} has no centre of {side}: choose sizes that are all odd, or all even"
            )
        centre = tuple(
            slice(int(start), int(start) + new)
            for start, new in zip(starts, sides, strict=True)
        )
        kernel = kernel[centre]
        if matrix is not None:
            flat = kernel.reshape(side ** len(size), -1)
            kernel = (matrix.astype(kernel.dtype) @ flat).reshape(kernel.shape)
    return kernel


def kernel_sizes(shapes: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Returns the sides of those kernels that have several, {layer: sides in descending order}.

    Args:
      shapes: the parameters of networks of one space, such as the largest and one for each choice.
    """
    sides: dict[str, set] = {}
    for network in shapes:
        for name, array in tree.flatten(network).items():
            if name.endswith("/kernel") and len(array.shape) > 2:
                sides.setdefault(name.rpartition("/")[0], set()).add(array.shape[:-2])
    several = {}
    for layer, extents in sides.items():
        squares = {extent for extent in extents if len(set(extent)) == 1}
        if len(extents) > 1 and squares == extents:
            several[layer] = tuple(sorted((e[0] for e in extents), reverse=True))
    return several


def identity_transforms(
    sizes: Mapping[str, Sequence[int]], axes: int = 2
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the matrices that leave the centres of kernels as they are, {layer: {"7to5": identity}}.

    Args:
      sizes: {layer: sides in descending order}.
      axes: number of spatial axes.
    """
    return {
        layer: {
            f"{large}to{small}": np.eye(small**axes, dtype=np.float32)
            for large, small in itertools.pairwise(sides)
        }
        for layer, sides in sizes.items()
    }


def initial_parameters(
    key: jax.Array, shapes: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Returns initial parameters of layers: LeCun's normal distribution for kernels, ones for scales, zeros for the others.

    Args:
      key: random key.
      shapes: {layer: {"kernel": shape}}.
    """
    kernel = jax.nn.initializers.lecun_normal()
    starts = {"kernel": kernel, "scale": jax.nn.initializers.ones}
    return {
        layer: {
            end: starts.get(end, jax.nn.initializers.zeros)(
                jax.random.fold_in(key, index), leaf.shape, leaf.dtype
            )
            for end, leaf in arrays.items()
        }
        for index, (layer, arrays) in enumerate(shapes.items())
    }
