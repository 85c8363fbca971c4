"""RandAugment (arXiv 1909.13719): applies a few random operations of the same strength to an image, on the host with Pillow.

The operations and their ranges are those of AutoAugment (arXiv 1805.09501, table 6), in the order of torchvision. The
magnitude runs from 0 to 30, and 30 is the end of each range. Pixels from beyond the image's border are mid-grey.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX = 30.0
FILL = 128

Op = Callable[[Image.Image, float, float], Image.Image]


def apply(picture: Image.Image, draws: np.ndarray, magnitude: float) -> Image.Image:
    """Applies n random operations to a picture, one after the other.

    Args:
      picture: of mode "L" or "RGB".
      draws: uniform numbers in [0, 1), [n, 2]: the first chooses the operation, the second its direction if it has two.
      magnitude: the strength, 0 to 30.
    """
    for choice, side in draws:
        op = OPS[int(choice * len(OPS))][1]
        picture = op(picture, magnitude / MAX, 1.0 if side < 0.5 else -1.0)
    return picture


def _affine(picture, a=1.0, b=0.0, c=0.0, d=0.0, e=1.0, f=0.0):
    """Takes the output's pixel (x, y) from (a x + b y + c, d x + e y + f)."""
    fill = (FILL,) * len(picture.getbands())
    return picture.transform(
        picture.size,
        Image.Transform.AFFINE,
        (a, b, c, d, e, f),
        Image.Resampling.NEAREST,
        fillcolor=fill if len(fill) > 1 else FILL,
    )


def _rotate(picture, strength, sign):
    fill = (FILL,) * len(picture.getbands())
    return picture.rotate(
        sign * 30 * strength,
        Image.Resampling.NEAREST,
        fillcolor=fill if len(fill) > 1 else FILL,
    )


def _enhance(kind) -> Op:
    return lambda picture, strength, sign: kind(picture).enhance(
        1 + sign * 0.9 * strength
    )


# strength is magnitude / 30, in [0, 1]; sign is 1 or -1.
OPS: tuple[tuple[str, Op], ...] = (
    ("identity", lambda p, m, s: p),
    ("shear_x", lambda p, m, s: _affine(p, b=s * 0.3 * m)),
    ("shear_y", lambda p, m, s: _affine(p, d=s * 0.3 * m)),
    ("translate_x", lambda p, m, s: _affine(p, c=int(s * 150 / 331 * p.width * m))),
    ("translate_y", lambda p, m, s: _affine(p, f=int(s * 150 / 331 * p.height * m))),
    ("rotate", _rotate),
    ("brightness", _enhance(ImageEnhance.Brightness)),
    ("color", _enhance(ImageEnhance.Color)),
    ("contrast", _enhance(ImageEnhance.Contrast)),
    ("sharpness", _enhance(ImageEnhance.Sharpness)),
    ("posterize", lambda p, m, s: ImageOps.posterize(p, 8 - round(4 * m))),
    ("solarize", lambda p, m, s: ImageOps.solarize(p, 255 * (1 - m))),
    ("auto_contrast", lambda p, m, s: ImageOps.autocontrast(p)),
    ("equalize", lambda p, m, s: ImageOps.equalize(p)),
)
