"""Decodes, resizes, crops and flips images: from encoded files to uint8 [h, w, c].

Random transforms are pure functions of whole batches: they take uniform numbers in [0, 1), one row of `DRAWS` per example. The
random crops follow GoogLeNet (arXiv 1409.4842, section 6) for "random_resized" and ResNet (arXiv 1512.03385, section 4.2) for
"pad". Evaluation rounds and interpolates as torchvision does, so that published weights see the pixels that their accuracies
were measured on.

Images that are not 8-bit grey or RGB are converted. Transparency is laid on white. 16 bits are divided by 256, so that 65535
becomes 255. Floats range from 0 to 1. The first frame of an animation is read. CMYK and other colours are converted without
their profile.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from squeeze_jax.data import randaugment
from squeeze_jax.errors import UserError

# The positions of each transform's numbers among the `DRAWS` uniform numbers of an example.
FLIP, CORNER, ATTEMPTS, OPS, DRAWS = 0, slice(1, 3), slice(3, 23), 24, 64
MAX_OPS = (DRAWS - OPS) // 2
MODES = {1: "L", 3: "RGB"}
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's modes above 8 bits
GREY = ("1", "L", "LA", "La", *DEEP)
COLOUR = ("RGB", "RGBA", "RGBa", "RGBX")
PALETTE = ("P", "PA")
WIDENED = {"L;2": 85, "L;4": 17}  # Pillow's factors for grey PNGs of 2 and 4 bits
HIGH_BYTES, LOW_BYTES = "RGB;16B", "RGB;16L"  # Pillow's words for parts of 16-bit RGB
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
PAD = 4
ASPECT = (3 / 4, 4 / 3)
ORIENTATION = 0x0112  # the EXIF tag
CROP, SQUASH = "crop", "squash"  # the values of `View.resize`
LONG = 32  # the ratio of sides above which only the centre of an image is resized


class Undecodable(ValueError):
    """The bytes are not an image. The message is the reason; the caller adds the name of the file."""


@dataclasses.dataclass(frozen=True)
class View:
    """The size and the transforms of images; `tasks.images.make` describes the fields."""

    size: int | tuple[int, int]
    channels: int
    crop: str = "none"
    pad: int = PAD
    scale: tuple[float, float] = (0.08, 1.0)
    flip: bool = False
    randaugment: int = 0
    magnitude: float = 9.0
    eval_resize: int = 0
    resize: str = SQUASH

    def __post_init__(self):
        low, high = self.scale
        short = min(self.size) if isinstance(self.size, tuple) else self.size
        # If an image is padded by its own size, a crop may show only padding. The default is allowed for any size.
        largest_pad = max(short - 1, PAD)
        for key, is_valid, valid in (
            ("size", len(self.shape) == 3 and short > 0, "positive, one or (h, w)"),
            ("channels", self.channels in MODES, "1 or 3"),
            ("pad", self.pad >= 0, "0 or more"),
            (
                "pad",
                self.pad <= largest_pad,
                f"at most {largest_pad} for images of this size",
            ),
            ("scale", 0 < low <= high <= 1, "0 < low <= high <= 1"),
            ("randaugment", 0 <= self.randaugment <= MAX_OPS, f"0 to {MAX_OPS}"),
            (
                "magnitude",
                0 <= self.magnitude <= randaugment.MAX,
                f"0 to {randaugment.MAX}",
            ),
            (
                "eval_resize",
                self.eval_resize == 0 or self.eval_resize >= short,
                f"0 or at least size = {short}",
            ),
            ("resize", self.resize in (CROP, SQUASH), f"{CROP!r} or {SQUASH!r}"),
        ):
            if not is_valid:
                value = getattr(self, key)
                raise UserError(f"config.data.{key} = {value!r} should be {valid}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return *sides, self.channels


def still(image: bytes | np.ndarray, view: View) -> np.ndarray:
    """Returns an image as evaluation sees it: resized to cover the view's size and cropped in the centre, or squashed to it.

    For a square size, the crop is torchvision's `Resize(size)` and `CenterCrop(size)`; with `eval_resize` it is
    `Resize(eval_resize)` and `CenterCrop(size)`.

    Args:
      image: an encoded file, or uint8 [h, w, c].
      view: the size and the transforms.

    Returns:
      uint8 `view.shape`.

    Raises:
      Undecodable: the bytes are not an image.
    """
    height, width, _ = view.shape
    raw = isinstance(image, np.ndarray) and image.shape == view.shape
    if raw and view.eval_resize in (0, min(height, width)):
        return image
    picture = _in_mode(_open(image), view.channels)
    size = resized_size(picture.size, view)
    if max(size) > LONG * min(size):
        return _array(_centre_of_long(picture, size, (width, height)))
    picture = _resize(picture, size)
    if size != (width, height):
        picture = picture.crop(centre(size, (width, height)))
    return _array(picture)


def resized_size(size: tuple[int, int], view: View) -> tuple[int, int]:
    """Returns the (width, height) of an image before its centre is cropped; sizes are (width, height)."""
    height, width, _ = view.shape
    if view.eval_resize:
        return size_with_short_side(size, view.eval_resize)
    return (
        (width, height)
        if view.resize == SQUASH
        else covering_size(size, (width, height))
    )


def covering_size(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest (width, height) with the aspect ratio of `size` that covers `wanted`; sizes are (width, height)."""
    (w, h), (width, height) = size, wanted
    if width * h >= height * w:
        return width, width * h // w
    return height * w // h, height


def size_with_short_side(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Returns the (width, height) of an image of that size after its short side is resized to `short`."""
    w, h = size
    long = int(short * max(w, h) / min(w, h))
    return (short, long) if w <= h else (long, short)


def centre(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of the central crop of `wanted` pixels; sizes are (width, height)."""
    left, top = (round((n - m) / 2) for n, m in zip(size, wanted, strict=True))
    return left, top, left + wanted[0], top + wanted[1]


def random_resized(
    image: bytes | np.ndarray, view: View, draws: np.ndarray
) -> np.ndarray:
    """Cuts a crop of random area and aspect ratio out of an image and resizes it to the view's size.

    Args:
      image: an encoded file, or uint8 [h, w, c].
      view: has the size; its `scale` bounds the crop's share of the area.
      draws: uniform numbers [DRAWS].

    Returns:
      uint8 `view.shape`.

    Raises:
      Undecodable: the bytes are not an image.
    """
    picture = _open(image, load=False)
    w, h = picture.size
    left, top, right, bottom = random_box(w, h, view.scale, draws)
    height, width, _ = view.shape
    shrink = min((right - left) / width, (bottom - top) / height)
    if shrink >= 2:
        # JPEG decodes at 1/2, 1/4 or 1/8 of the size in a fraction of the time; the crop stays at least as large as the result.
        picture.draft(
            MODES[view.channels], (int(-(-w // shrink)), int(-(-h // shrink)))
        )
    with decoding():
        picture = _in_mode(picture, view.channels)
        x, y = picture.size[0] / w, picture.size[1] / h
        area = (left * x, top * y, right * x, bottom * y)
        size = (width, height)
        return _array(picture.resize(size, Image.Resampling.BILINEAR, box=area))


def random_box(
    width: int, height: int, scale, draws: np.ndarray
) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a random crop, as in GoogLeNet (arXiv 1409.4842, section 6).

    Ten attempts draw the crop's share of the area uniformly from `scale` and its aspect ratio log-uniformly from 3/4 to 4/3.
    The first attempt that fits into the image counts. If none fits, the result is the largest centred crop with an aspect
    ratio within those bounds.

    Args:
      width, height: of the image.
      scale: the least and the greatest share of the area.
      draws: uniform numbers [DRAWS].
    """
    share, tilt = draws[ATTEMPTS].reshape(2, 10)
    area = width * height * (scale[0] + share * (scale[1] - scale[0]))
    low, high = np.log(ASPECT)
    ratio = np.exp(low + tilt * (high - low))
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = np.flatnonzero((w > 0) & (w <= width) & (h > 0) & (h <= height))
    if len(fits):
        w, h = int(w[fits[0]]), int(h[fits[0]])
        y, x = draws[CORNER]
        left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
    else:
        w = min(width, round(height * ASPECT[1]))
        h = min(height, round(width / ASPECT[0]))
        left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def pad_crop(
    images: np.ndarray, pad: int, draws: np.ndarray, fill: int = 0
) -> np.ndarray:
    """Pads images on all sides and crops them back to their size at random places, as in ResNet (arXiv 1512.03385).

    Args:
      images: [b, h, w, c], or label maps [b, h, w].
      pad: the width of the padding in pixels.
      draws: uniform numbers [b, DRAWS].
      fill: the value of the padding; 0 is black.

    Returns:
      An array of the same shape.
    """
    b, h, w, *c = images.shape
    padded = np.full((b, h + 2 * pad, w + 2 * pad, *c), fill, images.dtype)
    padded[:, pad : pad + h, pad : pad + w] = images
    out = np.empty_like(images)
    for i, (y, x) in enumerate(pad_corners(pad, draws)):
        out[i] = padded[i, y : y + h, x : x + w]
    return out


def pad_corners(pad: int, draws: np.ndarray) -> list[list[int]]:
    """Returns the [top, left] corner of each crop of `pad_crop` in its padded image; `draws` are [b, DRAWS]."""
    return (draws[:, CORNER] * (2 * pad + 1)).astype(int).tolist()


def augment(images: np.ndarray, view: View, draws: np.ndarray) -> np.ndarray:
    """Mirrors each image with probability 1/2 and applies RandAugment, if the view asks for them; works in place.

    Args:
      images: uint8 [b, h, w, c].
      view: has the transforms.
      draws: uniform numbers [b, DRAWS].
    """
    if view.flip:
        chosen = flipped_indices(draws)
        mirror = np.arange(images.shape[2])[::-1]
        images[chosen] = images[chosen].take(mirror, axis=2)  # half the time of [::-1]
    for i in range(len(images) if view.randaugment else 0):
        rows = draws[i, OPS : OPS + 2 * view.randaugment].reshape(-1, 2)
        picture = randaugment.apply(_open(images[i]), rows, view.magnitude)
        images[i] = _array(picture)
    return images


def flipped_indices(draws: np.ndarray) -> np.ndarray:
    """Returns the indices of the images that `augment` mirrors; `draws` are [b, DRAWS]."""
    return np.flatnonzero(draws[:, FLIP] < 0.5)


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """Returns the (width, height) of an upright image; for most files this reads only the header.

    Raises:
      Undecodable: the bytes are not an image.
    """
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    return _open(image, load=False).size


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Returns the (width, height) of a picture after its EXIF rotation, which is not carried out."""
    sideways = "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) > 4
    return picture.size[::-1] if sideways else picture.size


def is_rotated(picture: Image.Image) -> bool:
    """Returns whether a viewer turns or mirrors a picture, according to its header."""
    tiff = picture.format == "TIFF"  # its own tags have the orientation
    known = tiff or "exif" in picture.info
    return known and picture.getexif().get(ORIENTATION, 1) in range(2, 9)


def is_deep(picture: Image.Image) -> bool:
    """Returns whether a picture's channels have more than 8 bits in its file, according to its header."""
    if picture.mode in DEEP:
        return True
    bits = getattr(picture, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))
    # Pillow reads such colours as 8 bits at once; its decoder is told the stored ones.
    arguments = [tile.args for tile in getattr(picture, "tile", ())]
    largest = [a[-1] for a in arguments if picture.format == "PPM" and a]
    return (
        max(bits) > 8
        or any(";16" in str(each) for each in arguments)
        or any(isinstance(value, int) and value > 255 for value in largest)
    )


def has_frames(picture: Image.Image) -> bool:
    """Returns whether a file has more than one frame or page; may move the picture to the second."""
    # A damaged second frame does no harm to the first.
    with contextlib.suppress(Exception):
        if picture.format == "TIFF":
            picture.seek(1)
            return True
        return getattr(picture, "is_animated", False)
    return False


def is_transparent(picture: Image.Image) -> bool:
    """Returns whether a picture has an alpha channel or a transparent colour, according to its header."""
    return picture.has_transparency_data


def _open(image: bytes | np.ndarray, load: bool = True) -> Image.Image:
    """Returns an upright picture; without `load` it reads only the header of a file that has no EXIF rotation."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with decoding():
        picture = open_picture(io.BytesIO(image))
        rotated = "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) != 1
        if picture.mode in DEEP:
            picture = _eight_bits(picture)
        elif picture.format == "PNG" and "transparency" in picture.info:
            picture = _with_clear_colour(picture, image)
        if rotated:
            return ImageOps.exif_transpose(picture)
        if load:
            picture.load()
        return picture


def open_picture(file: IO[bytes]) -> Image.Image:
    """Returns the picture of an image file, of which only the header is read.

    Raises:
      Undecodable: the file is empty.
      Exception: the header cannot be read.
    """
    if not file.read(1):
        raise Undecodable("the file is empty")
    file.seek(0)
    return Image.open(file)


def check_integers(picture: Image.Image) -> None:
    """Raises `Undecodable` for 32-bit integers, of which no value is known to be white."""
    if picture.mode == "I" and picture.format == "TIFF":
        raise Undecodable(
            "its pixels are 32-bit integers, which have no fixed white: save 8 or 16 bits"
        )


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Converts a picture of 16 bits, or of floats in 0..1, to 8-bit grey; transparent pixels become white."""
    pixels, clear = np.asarray(picture), picture.info.get("transparency")
    tags = getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        # The comparison is also False for NaN.
        if not (pixels >= 0).all() or not (pixels <= 1).all():
            raise Undecodable(
                f"its float pixels are {pixels.min():g} to {pixels.max():g}, not 0 to 1: scale them, or save 8 or 16 bits"
            )
        grey = np.rint(pixels * 255)
    else:
        check_integers(picture)
        # In formats other than TIFF, mode "I" is 16 bits. The 12 bits of a camera are not scaled: 0 to 4095.
        bits = 12 if tags.get(BITS_PER_SAMPLE) == (12,) else 16
        grey = (pixels >> (bits - 8)).clip(0, 255)
    grey = grey.astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white; Pillow handles this for 8 bits only
        grey = 255 - grey
    if clear is not None:
        grey[pixels == clear] = 255
    converted = Image.fromarray(grey)
    converted.getexif().update(picture.getexif())  # for its rotation
    return converted


def _with_clear_colour(picture: Image.Image, image: bytes) -> Image.Image:
    """Applies a PNG's transparent colour, which its header gives in the file's own depth, if Pillow decodes to another depth.

    Args:
      picture: the opened file, of which only the header is read.
      image: the file's bytes.
    """
    clear, raw_mode = picture.info["transparency"], picture.tile[0].args
    if raw_mode in WIDENED:
        picture.info["transparency"] = clear * WIDENED[raw_mode]
    if raw_mode != HIGH_BYTES:
        return picture
    other = open_picture(io.BytesIO(image))
    other.tile = [tile._replace(args=LOW_BYTES) for tile in other.tile]
    high, low = np.array(picture), np.asarray(other)
    high[(high * np.uint16(256) + low == clear).all(-1)] = 255
    converted = Image.fromarray(high)
    converted.getexif().update(picture.getexif())  # for its rotation
    return converted


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    """Turns the exceptions that Pillow raises for damaged files into `Undecodable` within this context."""
    try:
        yield
    except MemoryError:
        raise
    except Undecodable:
        raise
    except UnidentifiedImageError:
        raise Undecodable("no known image format") from None
    except Exception as error:  # damaged bytes make Pillow's parsers raise anything
        reason = getattr(error, "strerror", None) or error
        raise Undecodable(" ".join(str(reason).split())) from None


def _in_mode(picture: Image.Image, channels: int) -> Image.Image:
    if picture.mode == MODES[channels] and "transparency" not in picture.info:
        return picture
    with decoding():
        if picture.mode == "LAB":  # Pillow converts it only to RGB
            picture = picture.convert("RGB")
        if is_transparent(picture):
            picture = picture.convert("RGBA")
            white = Image.new("RGB", picture.size, "white")
            white.paste(picture.convert("RGB"), mask=picture.getchannel("A"))
            picture = white
        return picture.convert(MODES[channels])


def _resize(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    return (
        picture
        if picture.size == size
        else picture.resize(size, Image.Resampling.BILINEAR)
    )


def _centre_of_long(
    picture: Image.Image, size: tuple[int, int], wanted: tuple[int, int]
) -> Image.Image:
    """Resizes only the centre of an image, because resizing all of a very long image could take too much memory.

    Pillow rounds the box to float32, so a pixel may differ by 1 from the crop of the whole resized image.
    """
    left, top, right, bottom = centre(size, wanted)
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(right, size[0]), min(bottom, size[1])
    x, y = (n / m for n, m in zip(picture.size, size, strict=True))
    part = picture.resize(
        (x1 - x0, y1 - y0),
        Image.Resampling.BILINEAR,
        box=(x0 * x, y0 * y, x1 * x, y1 * y),
    )
    return part.crop((left - x0, top - y0, right - x0, bottom - y0))


def _array(picture: Image.Image) -> np.ndarray:
    array = np.asarray(picture)
    return array[..., None] if array.ndim == 2 else array
