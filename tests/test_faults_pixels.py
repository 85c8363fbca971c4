"""Pixels of images that are not 8-bit grey or RGB: transparency, 16 bits, floats, printing colours."""

import io
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.data import survey, vision

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
COLOUR = np.stack([GREY, GREY[::-1], 255 - GREY], -1)


def encode(picture, format="PNG", **keys):
    """An image file's bytes of a picture, or of uint8 [h, w, c] or [h, w]."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, format, **keys)
    return buffer.getvalue()


ALPHA = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


def on_white(colour, alpha):
    """The definition of compositing (Porter and Duff 1984, "over") with a white background."""
    share = alpha.astype(float)[..., None] / 255
    return share * colour + (1 - share) * 255


def transparent_pictures():
    rgba = Image.fromarray(np.dstack([COLOUR, ALPHA]))
    la = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
    three = np.repeat(GREY[..., None], 3, -1)
    yield "RGBA PNG", encode(rgba), on_white(COLOUR, ALPHA)
    yield "RGBA TIFF", encode(rgba, "TIFF"), on_white(COLOUR, ALPHA)
    yield "RGBA WebP", encode(rgba, "WEBP", lossless=True, exact=True), on_white(COLOUR, ALPHA)  # fmt: skip
    yield "LA PNG", encode(la), on_white(three, ALPHA)
    palette = Image.fromarray(GREY // 3)
    palette.putpalette([v for i in range(64) for v in (i, 2 * i, 255 - i)])
    index = GREY.astype(int) // 3
    colours = np.stack([index, 2 * index, 255 - index], -1)
    bytes_ = bytes(range(0, 256, 4))
    alphas = index * 4
    yield "P PNG", encode(palette, transparency=bytes_), on_white(colours, alphas)  # fmt: skip
    yield "P GIF", encode(palette, "GIF", transparency=5), on_white(colours, np.where(index == 5, 0, 255))  # fmt: skip
    yield "L PNG, key", encode(Image.fromarray(GREY), transparency=30), on_white(three, np.where(GREY == 30, 0, 255))  # fmt: skip
    at = tuple(int(v) for v in COLOUR[2, 2])
    clear = (np.array(at) == COLOUR).all(-1)
    yield "RGB PNG, key", encode(Image.fromarray(COLOUR), transparency=at), on_white(COLOUR, np.where(clear, 0, 255))  # fmt: skip
    deep = GREY.astype(np.uint16) * 257
    yield "16-bit PNG, key", png(deep, key=30 * 257), on_white(three, np.where(GREY == 30, 0, 255))  # fmt: skip
    for bits in 1, 2, 4, 8:
        values = GREY.astype(int) // 3 % 2**bits
        white = np.repeat(values[..., None] * (255 / (2**bits - 1)), 3, -1)
        for key in 0, 1:
            image = png(values, key, bits=bits)
            yield f"{bits}-bit grey PNG, key {key}", image, on_white(white, np.where(values == key, 0, 255))  # fmt: skip
    # Colours that differ from the transparent one in a low byte alone stay.
    deep = COLOUR.astype(np.uint16) * 256 + np.arange(8, dtype=np.uint16)[:, None, None]
    at = tuple(int(v) for v in deep[2, 2])
    clear = (deep == at).all(-1)
    yield "48-bit PNG, key", png(deep, at), on_white(COLOUR, np.where(clear, 0, 255))
    deep = np.full((8, 8, 3), 1000, np.uint16)
    deep[4:, :, 1] += 1
    shades = on_white(np.full((8, 8, 3), 3), np.repeat([[0], [255]], 4, 0) * np.ones(8))
    yield "48-bit PNG, key in the low byte", png(deep, (1000,) * 3), shades


def png(pixels, key=None, bits=16):
    """A PNG by hand, grey [h, w] or colour [h, w, 3], after the PNG specification."""
    h, w = pixels.shape[:2]

    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))  # fmt: skip

    shifts = np.arange(bits)[::-1]
    stored = (pixels.reshape(h, -1, 1).astype(int) >> shifts & 1).reshape(h, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in np.packbits(stored, axis=1))
    header = struct.pack(">IIBBBBB", w, h, bits, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    parts = chunk(b"IHDR", header)
    if key is not None:
        parts += chunk(b"tRNS", np.array(key, ">u2").tobytes())
    parts += chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(pixels, bits, photometric=1):
    """A grey TIFF by hand with packed bits, after the TIFF 6.0 specification."""
    h, w = pixels.shape
    flat = "".join(f"{int(v):0{bits}b}" for v in pixels.ravel())
    content = int(flat, 2).to_bytes(len(flat) // 8)
    tags = {256: w, 257: h, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: h, 279: len(content)}  # fmt: skip
    start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())  # fmt: skip
    head = b"II" + struct.pack("<HI", 42, 8) + struct.pack("<H", len(tags))
    return head + entries + struct.pack("<I", 0) + content


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("image", "seen"),
    [pytest.param(*case[1:], id=case[0]) for case in transparent_pictures()],
)
def test_transparency_is_laid_on_white(image, seen, channels):
    if channels == 1:
        seen = (seen @ [0.299, 0.587, 0.114])[..., None]  # ITU-R 601, as Pillow's "L"
    found = vision.still(image, vision.View(size=8, channels=channels))
    np.testing.assert_allclose(found, seen, atol=1.01)
    view = vision.View(size=8, channels=channels, crop="random_resized", scale=(1, 1))
    draws = np.full(vision.DRAWS, 0.5)
    np.testing.assert_allclose(vision.random_resized(image, view, draws), seen, atol=1.01)  # fmt: skip


def test_what_is_opaque_stays_as_it_is():
    opaque = np.dstack([COLOUR, np.full((8, 8), 255, np.uint8)])
    for format in "PNG", "TIFF":
        found = vision.still(encode(opaque, format), vision.View(8, 3))
        np.testing.assert_array_equal(found, COLOUR)


FLOATS = (GREY / np.float32(255)).astype(np.float32)


def deep_pictures():
    wide = GREY.astype(np.uint16) * 257
    yield "16-bit PNG", encode(Image.fromarray(wide)), GREY
    yield "16-bit PNG by hand", png(wide), GREY
    yield "16-bit TIFF", encode(Image.fromarray(wide), "TIFF"), GREY
    yield "12-bit TIFF", tiff(GREY.astype(int) * 16, 12), GREY
    yield "8-bit TIFF, 0 is white", tiff(255 - GREY.astype(int), 8, 0), GREY
    little = (65535 - wide).byteswap()
    yield "16-bit TIFF, 0 is white", tiff(little, 16, 0), GREY
    yield "float TIFF", encode(Image.fromarray(FLOATS), "TIFF"), GREY
    head = b"P5\n8 8\n65535\n"
    yield "16-bit PGM", head + wide.astype(">u2").tobytes(), GREY
    yield "48-bit PNG", png(COLOUR.astype(np.uint16) * 257), COLOUR
    bands = [Image.fromarray(b) for b in (*np.moveaxis(COLOUR, -1, 0), ALPHA)]
    cmyk = Image.merge("CMYK", bands)
    # Without a profile: each of red, green and blue is (1 - ink) (1 - black).
    seen = (255 - COLOUR.astype(float)) * (255 - ALPHA.astype(float)[..., None]) / 255
    yield "CMYK TIFF", encode(cmyk, "TIFF"), seen
    middle = Image.new("L", (8, 8), 128)
    lab = Image.merge("LAB", (Image.fromarray(GREY + np.uint8(40)), middle, middle))
    # CIE 1976: a grey of lightness L has the luminance ((L + 16) / 116)^3; then the curve of sRGB.
    luminance = ((GREY + 40.0) / 255 * 100 + 16) ** 3 / 116**3
    curve = 255 * (1.055 * luminance ** (1 / 2.4) - 0.055)
    yield "LAB TIFF", encode(lab, "TIFF"), np.stack([curve] * 3, -1)


@pytest.mark.parametrize(
    ("image", "seen"),
    [pytest.param(*case[1:], id=case[0]) for case in deep_pictures()],
)
def test_deep_and_printed_images_keep_their_brightness(image, seen):
    if seen.ndim == 2:
        grey = vision.still(image, vision.View(size=8, channels=1))
        np.testing.assert_array_equal(grey[..., 0], seen)
        seen = np.repeat(seen[..., None], 3, -1)
    else:
        luma = seen @ [0.299, 0.587, 0.114]  # ITU-R 601
        grey = vision.still(image, vision.View(size=8, channels=1))
        np.testing.assert_allclose(grey[..., 0], luma, atol=1.5)
    found = vision.still(image, vision.View(size=8, channels=3))
    np.testing.assert_allclose(found, seen, atol=1 if seen.dtype == float else 0)


@pytest.mark.parametrize(
    ("picture", "line"),
    [
        (Image.fromarray(FLOATS * 255), "its float pixels are 0 to 189, not 0 to 1"),
        (Image.fromarray(FLOATS - 0.5), "its float pixels are -0.5 to "),
        (Image.fromarray(FLOATS * np.float32("nan")), "its float pixels are nan"),
        (
            Image.fromarray(GREY.astype(np.int32)),
            "its pixels are 32-bit integers, which have no fixed white",
        ),
    ],
    ids=["0..255", "negative", "nan", "int32"],
)
def test_images_without_a_known_white_are_refused(picture, line):
    image = encode(picture, "TIFF")
    for channels in 1, 3:
        with pytest.raises(vision.Undecodable, match=re.escape(line)):
            vision.still(image, vision.View(8, channels))


def test_a_deep_image_is_turned_upright():
    wide = np.arange(32, dtype=np.uint16).reshape(4, 8) * 257
    exif = Image.Exif()
    exif[vision.ORIENTATION] = 6  # a viewer turns it by 90 degrees clockwise
    image = encode(Image.fromarray(wide), exif=exif)
    found = vision.still(image, vision.View(size=(8, 4), channels=1))
    np.testing.assert_array_equal(found[..., 0], np.rot90(wide // 257, -1))
    assert survey.survey_images(["x"], lambda _: io.BytesIO(image)).sizes == {(4, 8): 1}  # fmt: skip
