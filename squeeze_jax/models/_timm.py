"""timm's layer names of the inverted bottlenecks that MobileNets and EfficientNets share."""


def stem_and_head() -> dict[str, str]:
    """Returns {our layer: timm's} outside the blocks, for networks with a last convolution before the mean."""
    names = dict(conv1="conv_stem", conv1_norm="bn1", head="conv_head", head_norm="bn2")
    return names | {"classifier": "classifier"}


def bottleneck(ours: str, theirs: str, *, expand: bool, excite: bool) -> dict[str, str]:
    """Returns {our layer: timm's} of one block.

    Args:
      ours, theirs: our name and timm's name of the block.
      expand: whether the block starts with a 1x1 convolution.
      excite: whether the block has squeeze and excitation.
    """
    units = {"expand": "conv_pw", "depthwise": "conv_dw", "project": "conv_pwl"}
    if not expand:
        units = {"depthwise": "conv_dw", "project": "conv_pw"}
    names = {}
    for number, (unit, conv) in enumerate(units.items(), 1):
        names[f"{ours}/{unit}"] = f"{theirs}.{conv}"
        names[f"{ours}/{unit}_norm"] = f"{theirs}.bn{number}"
    for unit in ("reduce", "expand") if excite else ():
        names[f"{ours}/squeeze_excite/{unit}"] = f"{theirs}.se.conv_{unit}"
    return names
