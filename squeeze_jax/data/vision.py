"""From an encoded image to uint8 [h, w, c]: decoding, resizing, and the random crops and flips of training.

Random transforms take their randomness as uniform numbers in [0, 1), one row of `DRAWS` an example, so that they are pure
functions that work on whole batches. The random crops are those of GoogLeNet (arXiv 1409.4842, section 6) for
"random_resized" and of ResNet (arXiv 1512.03385, section 4.2) for "pad". Evaluation rounds and interpolates as torchvision
does, so that published weights see the pixels that their accuracies were measured on.

What is not 8-bit grey or RGB: transparency is laid on white; 16 bits are divided by 256, so that 65535 becomes 255; floats are
0 to 1; of an animation the first frame counts; CMYK and other colours are converted without their profile.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from squeeze_jax.data import randaugment
from squeeze_jax.errors import UserError

# Which of an example's uniform numbers serve what.
FLIP, CORNER, ATTEMPTS, OPS, DRAWS = 0, slice(1, 3), slice(3, 23), 24, 64
MAX_OPS = (DRAWS - OPS) // 2
MODES = {1: "L", 3: "RGB"}
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")  # Pillow's, more than 8 bits
GREY = ("1", "L", "LA", "La", *DEEP)
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # TIFF tags
PAD = 4
ASPECT = (3 / 4, 4 / 3)
ORIENTATION = 0x0112  # the EXIF tag
CROP, SQUASH = "crop", "squash"  # the values of `View.resize`
LONG = 32  # an image that is this many times as long as it is wide


class Undecodable(ValueError):
    """The bytes are no image. The message is the reason; the caller knows the name."""


@dataclasses.dataclass(frozen=True)
class View:
    """How images are looked at; the fields are parameters of `data.make`, and are described there."""

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
        # Of an image that is padded by its own size, a crop may show nothing; the default is allowed for any size.
        most = max(short - 1, PAD)
        for key, fine, valid in (
            ("size", len(self.shape) == 3 and short > 0, "positive, one or (h, w)"),
            ("channels", self.channels in MODES, "1 or 3"),
            ("pad", self.pad >= 0, "0 or more"),
            ("pad", self.pad <= most, f"at most {most} for images of this size"),
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
            if not fine:
                value = getattr(self, key)
                raise UserError(f"config.data.{key} = {value!r} should be {valid}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image."""
        sides = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return *sides, self.channels


def still(image: bytes | np.ndarray, view: View) -> np.ndarray:
    """Returns an image as evaluation sees it: resized to cover the view and cropped in the centre, or squashed into it.

    For a square size this is torchvision's `Resize(size)` and `CenterCrop(size)`; with `eval_resize` it is
    `Resize(eval_resize)` and `CenterCrop(size)`.

    Args:
      image: an encoded file, or uint8 [h, w, c].

    Returns:
      uint8 `view.shape`.

    Raises:
      Undecodable: the bytes are no image.
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
        return resized(size, view.eval_resize)
    return (width, height) if view.resize == SQUASH else covering(size, (width, height))


def covering(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int]:
    """Returns the smallest (width, height) of an image of that size that covers the wanted one at its aspect ratio."""
    (w, h), (width, height) = size, wanted
    if width * h >= height * w:
        return width, width * h // w
    return height * w // h, height


def resized(size: tuple[int, int], short: int) -> tuple[int, int]:
    """Returns the (width, height) of an image of that size after its short side has become `short`."""
    w, h = size
    long = int(short * max(w, h) / min(w, h))
    return (short, long) if w <= h else (long, short)


def centre(size: tuple[int, int], wanted: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of the central crop; sizes are (width, height)."""
    left, top = (round((n - m) / 2) for n, m in zip(size, wanted, strict=True))
    return left, top, left + wanted[0], top + wanted[1]


def random_resized(
    image: bytes | np.ndarray, view: View, draws: np.ndarray
) -> np.ndarray:
    """A crop of random area and aspect ratio, resized to the view's size.

    Args:
      image: an encoded file, or uint8 [h, w, c].
      view: `scale` bounds the crop's share of the area.
      draws: [DRAWS] uniform numbers.

    Returns:
      uint8 `view.shape`.

    Raises:
      Undecodable: the bytes are no image.
    """
    picture = _open(image, load=False)
    w, h = picture.size
    left, top, right, bottom = box(w, h, view.scale, draws)
    height, width, _ = view.shape
    shrink = min((right - left) / width, (bottom - top) / height)
    if shrink >= 2:
        # JPEG decodes at 1/2, 1/4 or 1/8 for a fraction of the time; a crop stays at least as large as the result.
        picture.draft(
            MODES[view.channels], (int(-(-w // shrink)), int(-(-h // shrink)))
        )
    with decoding():
        picture = _in_mode(picture, view.channels)
        x, y = picture.size[0] / w, picture.size[1] / h
        area = (left * x, top * y, right * x, bottom * y)
        size = (width, height)
        return _array(picture.resize(size, Image.Resampling.BILINEAR, box=area))


def box(width: int, height: int, scale, draws: np.ndarray) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of a random crop.

    Ten attempts draw the share of the area uniformly from `scale` and the aspect ratio log-uniformly from 3/4 to 4/3; the
    first that fits counts. If none does, it is the largest centred crop whose ratio is within those bounds.
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
    """Pads with `fill` (black) and crops back to the old size at a random place; draws [b, DRAWS].

    Args:
      images: [b, h, w, c], or maps of labels [b, h, w].

    Returns:
      The same shape.
    """
    b, h, w, *c = images.shape
    padded = np.full((b, h + 2 * pad, w + 2 * pad, *c), fill, images.dtype)
    padded[:, pad : pad + h, pad : pad + w] = images
    out = np.empty_like(images)
    for i, (y, x) in enumerate(pad_corners(pad, draws)):
        out[i] = padded[i, y : y + h, x : x + w]
    return out


def pad_corners(pad: int, draws: np.ndarray) -> list[list[int]]:
    """Returns the [top, left] corner of each crop of `pad_crop` in the padded image; draws [b, DRAWS]."""
    return (draws[:, CORNER] * (2 * pad + 1)).astype(int).tolist()


def augment(images: np.ndarray, view: View, draws: np.ndarray) -> np.ndarray:
    """Flips each image with probability 1/2, then RandAugment, as `view` says; works in place.

    Args:
      images: uint8 [b, h, w, c].
      draws: [b, DRAWS] uniform numbers.
    """
    if view.flip:
        chosen = flipped(draws)
        mirror = np.arange(images.shape[2])[::-1]
        images[chosen] = images[chosen].take(mirror, axis=2)  # half the time of [::-1]
    for i in range(len(images) if view.randaugment else 0):
        rows = draws[i, OPS : OPS + 2 * view.randaugment].reshape(-1, 2)
        picture = randaugment.apply(_open(images[i]), rows, view.magnitude)
        images[i] = _array(picture)
    return images


def flipped(draws: np.ndarray) -> np.ndarray:
    """Returns the indices of the images that are mirrored; draws [b, DRAWS]."""
    return np.flatnonzero(draws[:, FLIP] < 0.5)


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """Returns the (width, height) of an upright image; of most files only the header is read.

    Raises:
      Undecodable: the bytes are no image.
    """
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    return _open(image, load=False).size


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Returns the (width, height) of a picture after its EXIF rotation, which is not carried out."""
    sideways = "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) > 4
    return picture.size[::-1] if sideways else picture.size


def transparent(picture: Image.Image) -> bool:
    """Whether a picture has an alpha channel or a transparent colour, by its header."""
    return picture.has_transparency_data


def _open(image: bytes | np.ndarray, load: bool = True) -> Image.Image:
    """A picture, upright; of a file without EXIF rotation only the header is read unless `load`."""
    if isinstance(image, np.ndarray):
        return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    with decoding():
        picture = Image.open(io.BytesIO(image))
        turned = "exif" in picture.info and picture.getexif().get(ORIENTATION, 1) != 1
        if picture.mode in DEEP:
            picture = _eight_bits(picture)
        if turned:
            return ImageOps.exif_transpose(picture)
        if load:
            picture.load()
        return picture


def _eight_bits(picture: Image.Image) -> Image.Image:
    """Returns the grey picture of one with 16 bits, or with floats in 0..1; white where it is transparent."""
    pixels, clear = np.asarray(picture), picture.info.get("transparency")
    tags = getattr(picture, "tag_v2", {})
    if picture.mode == "F":
        # The comparison is False of NaN, too.
        if not (pixels >= 0).all() or not (pixels <= 1).all():
            raise Undecodable(
                f"its float pixels are {pixels.min():g} to {pixels.max():g}, not 0 to 1: scale them, or save 8 or 16 bits"
            )
        grey = np.rint(pixels * 255)
    elif picture.mode == "I" and picture.format == "TIFF":
        raise Undecodable(
            "its pixels are 32-bit integers, which have no fixed white: save 8 or 16 bits"
        )
    else:
        # Of formats other than TIFF, mode "I" is 16 bits. A camera's 12 bits arrive as they are, 0 to 4095.
        bits = 12 if tags.get(BITS_PER_SAMPLE) == (12,) else 16
        grey = (pixels >> (bits - 8)).clip(0, 255)
    grey = grey.astype(np.uint8)
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white, which Pillow knows of 8 bits only
        grey = 255 - grey
    if clear is not None:
        grey[pixels == clear] = 255
    shallow = Image.fromarray(grey)
    shallow.getexif().update(picture.getexif())  # for its rotation
    return shallow


@contextlib.contextmanager
def decoding() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except UnidentifiedImageError:
        raise Undecodable("no known image format") from None
    except Exception as error:  # damaged bytes make Pillow's parsers raise anything
        raise Undecodable(" ".join(str(error).split())) from None


def _in_mode(picture: Image.Image, channels: int) -> Image.Image:
    if picture.mode == MODES[channels] and "transparency" not in picture.info:
        return picture
    with decoding():
        if picture.mode == "LAB":  # Pillow converts it only to RGB
            picture = picture.convert("RGB")
        if transparent(picture):
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
    """Resizes an image and crops its centre, without the ends, which could take more memory than there is.

    Pillow rounds the box to float32, so a pixel may differ by 1 from the crop of the whole.
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
