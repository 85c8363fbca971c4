"""Names of layers in the weights that the authors of once-for-all have released.

Layers of elastic width have one more level of names than other layers, such as `conv.conv` and `bn.bn`. The extracted networks
that the authors released do not have it, and older files name the branch of a block differently. So a layer has several
possible names.
"""

import itertools
from collections.abc import Sequence

from squeeze_jax.nn.chain import Chain, Piece

Names = dict[str, tuple[str, ...]]

# {naming: (regex of arrays that no parameter of the network holds, what they are)}
APART = {
    "released": (
        r"\.\d+to\d+_matrix$",
        "matrices that change the kernels of smaller networks left out: nas.once_for_all reads them by its option"
        " matrices, such as config.gradients.matrices",
    )
}
_BRANCHES = ("conv", "mobile_inverted_conv")
_PARTS = {"expand": "inverted_bottleneck", "depthwise": "depth_conv", "project": "point_linear"}  # fmt: skip


def blocks(net: Chain) -> list[Piece]:
    """Returns the residual blocks of a network in order."""
    return [p for p in net.pieces if p.name == "first" or p.name.startswith("stage")]


def unit(ours: str, *theirs: str) -> Names:
    """Returns the names of a convolution and its normalisation.

    Args:
      ours: our name of the convolution.
      theirs: possible names of the module around both.
    """
    pairs = list(itertools.product(theirs, ("conv.conv", "conv")))
    norms = list(itertools.product(theirs, ("bn.bn", "bn")))
    return {
        ours: tuple(f"{module}.{end}" for module, end in pairs),
        f"{ours}_norm": tuple(f"{module}.{end}" for module, end in norms),
    }


def bottlenecks(pieces: Sequence[Piece]) -> Names:
    """Returns the names of the layers of MobileNetV3's bottlenecks."""
    names = {}
    for number, (name, block) in enumerate((p.name, p.module) for p in pieces):
        branches = [f"blocks.{number}.{branch}" for branch in _BRANCHES]
        for ours, theirs in _PARTS.items():
            if ours != "expand" or block.expand != block.inputs:
                names |= unit(f"{name}/{ours}", *(f"{b}.{theirs}" for b in branches))
        for layer in ("reduce", "expand") if block.excite else ():
            names[f"{name}/squeeze_excite/{layer}"] = tuple(
                f"{b}.depth_conv.se.fc.{layer}" for b in branches
            )
    return names
