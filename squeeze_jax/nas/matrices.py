"""Reads the matrices that change the kernels of smaller networks, from the weights that once-for-all's authors released.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791, section 3.2; see `nas/subnetwork.py`. They are arrays such as
`blocks.1.conv.depth_conv.conv.7to5_matrix` [25, 25], beside the kernel of the largest network.
"""

import re
import sys
from collections.abc import Mapping
from pathlib import Path

import flax.linen as nn
import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.weights import foreign, pretrained

_NAME = re.compile(r"(.+)\.(\d+to(\d+))_matrix")


def read(path: str | Path, net: nn.Module) -> dict[str, dict[str, np.ndarray]]:
    """Returns {layer: {"7to5": [25, 25], "5to3": [9, 9]}} from a file of released weights.

    Args:
      path: .pth, .safetensors or .npz; code in a file is never run.
      net: the network that holds the weights.

    Raises:
      UserError: the file cannot be read, has no such matrices, or one that does not belong to a kernel of the network.
    """
    names = getattr(sys.modules[type(net).__module__], "released_names", None)
    if names is None:
        raise UserError(f"matrices: no released weights belong to {type(net).__name__}")
    arrays, _ = pretrained.read(path)
    layers = {t: o for o, t in foreign.resolve_names(names(net), arrays).items()}
    matrices = {}
    for name, array in arrays.items():
        if match := _NAME.fullmatch(name):
            layer, sizes, side = match.groups()
            ours = layers.get(f"{layer}.conv")
            if ours is None or array.shape != (int(side) ** 2,) * 2:
                raise UserError(f"{path}: {name} {array.shape} has no place")
            matrices.setdefault(ours, {})[sizes] = np.asarray(array, np.float32)
    if not matrices:
        raise UserError(f"{path} has no matrices, such as 7to5_matrix: leave it out")
    return matrices


def replaced(
    start: Mapping[str, Mapping[str, np.ndarray]],
    values: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the matrices of `start` with the values of the same matrices in `values`; a UserError names a missing one."""

    def value(layer, sizes):
        if sizes not in values.get(layer, {}):
            raise UserError(f"matrices: the file has no {sizes} of {layer}")
        return values[layer][sizes]

    return {
        layer: {sizes: value(layer, sizes) for sizes in own}
        for layer, own in start.items()
    }
