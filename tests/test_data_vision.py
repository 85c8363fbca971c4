"""Decoding, resizing and random crops, against torchvision, hand calculation and statistics."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.data import vision
from squeeze_jax.data.pipeline import draws
from squeeze_jax.errors import UserError

ROW = np.full(vision.DRAWS, 0.5)


def view(size, channels=3, **keys):
    return vision.View(size=size, channels=channels, **keys)


def encode(picture, kind="PNG", **keys):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **keys)
    return buffer.getvalue()


def noise(h, w, c=3, seed=0):
    shape = (h, w, c) if c > 1 else (h, w)
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def smooth(h, w):
    """A picture without high frequencies, so that ways of resizing agree."""
    y, x = np.mgrid[:h, :w]
    waves = [np.sin(x / 70 + k) + np.cos(y / 90 - k) for k in range(3)]
    return (np.stack(waves, -1) * 63 + 127).astype(np.uint8)


@pytest.mark.parametrize("short", [128, 146])
def test_evaluation_is_torchvisions_pixel_for_pixel(short, shared, torchvision):
    """The default is Resize(size) and CenterCrop(size); `eval_resize` gives the short side another length."""
    import torchvision.transforms as T

    theirs = T.Compose([T.Resize(short), T.CenterCrop(128)])
    keys = dict(eval_resize=short) if short > 128 else dict(resize="crop")
    with zipfile.ZipFile(shared / "data" / "photos" / "imagenet_50.zip") as archive:
        names = [n for n in archive.namelist() if n.endswith(".webp")][:12]
        for name in names:
            data = archive.read(name)
            picture = Image.open(io.BytesIO(data)).convert("RGB")
            for upright in picture, picture.transpose(Image.Transpose.ROTATE_90):
                found = vision.still(encode(upright), view(128, **keys))
                np.testing.assert_array_equal(found, np.asarray(theirs(upright)), name)
    assert len(names) == 12


def test_crop_of_one_size_beside_torchvisions_antialiased_tensors(torchvision):
    """On tensors torchvision interpolates in float32 and rounds once, Pillow after each axis: 1 apart at most."""
    import torch
    import torchvision.transforms.functional as F

    pixels = smooth(150, 233)
    tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
    theirs = F.center_crop(F.resize(tensor, [64], antialias=True), [64, 64])
    found = vision.still(pixels, view(64, resize="crop"))
    np.testing.assert_allclose(found, theirs.permute(1, 2, 0), atol=1)


@pytest.mark.parametrize(
    ("stored", "size", "covers"),
    [
        # (width, height) stored, (height, width) of the view, (width, height) before the crop
        ((100, 50), 20, (40, 20)),
        ((50, 100), 20, (20, 40)),
        ((101, 50), 20, (40, 20)),  # 40.4 rounded down, as torchvision does
        ((100, 50), (20, 30), (40, 20)),
        ((100, 50), (20, 60), (60, 30)),
        ((100, 50), (20, 40), (40, 20)),
        ((10, 10), (20, 60), (60, 60)),
        ((20, 20), 20, (20, 20)),
    ],
)
def test_an_image_is_resized_until_it_covers_the_view(stored, size, covers):
    keys = view(size, resize="crop")
    assert vision.resized_size(stored, keys) == covers
    pixels = noise(*stored[::-1])
    whole = Image.fromarray(pixels).resize(covers, Image.Resampling.BILINEAR)
    height, width, _ = keys.shape
    left, top = round((covers[0] - width) / 2), round((covers[1] - height) / 2)
    expected = np.asarray(whole)[top : top + height, left : left + width]
    np.testing.assert_array_equal(vision.still(pixels, keys), expected)


@pytest.mark.parametrize("keys", [dict(resize="crop"), dict(eval_resize=30)])
def test_a_very_long_image_is_cropped_without_its_ends(keys):
    """The whole of it, resized to 24 x 96,000,000 pixels, would take 7 GB."""
    short = keys.get("eval_resize", 24)
    for shape in (2, 200), (200, 2):
        pixels = smooth(*shape)
        size = [n * short // 2 for n in shape[::-1]]
        whole = np.asarray(Image.fromarray(pixels).resize(size, Image.BILINEAR))
        top, left = (n // 2 - 12 for n in whole.shape[:2])
        found = vision.still(pixels, view(24, **keys))
        expected = whole[top : top + 24, left : left + 24]
        np.testing.assert_allclose(found, expected, atol=1)
    long = np.broadcast_to(np.uint8([9, 90, 200]), (1, 4_000_000, 3))
    found = vision.still(np.ascontiguousarray(long), view(24, **keys))
    np.testing.assert_array_equal(found, np.broadcast_to(long[:, :24], (24, 24, 3)))


def test_direct_resize_is_torchvisions(torchvision):
    import torchvision.transforms as T

    pixels = noise(37, 61)
    expected = T.Resize((24, 24))(Image.fromarray(pixels))
    np.testing.assert_array_equal(vision.still(pixels, view(24)), np.asarray(expected))


def test_an_image_of_the_right_size_is_not_touched():
    for c in 1, 3:
        pixels = noise(16, 16, c).reshape(16, 16, c)
        for keys in {}, {"resize": "crop"}:
            found = vision.still(pixels, view(16, c, **keys))
            np.testing.assert_array_equal(found, pixels)
        data = encode(Image.fromarray(pixels.squeeze()))
        np.testing.assert_array_equal(vision.still(data, view(16, c)), pixels)


def test_modes_become_rgb_or_grey():
    grey, rgb = noise(8, 8, 1), noise(8, 8)
    three = np.repeat(grey[..., None], 3, axis=-1)
    cases = {
        "grey": (Image.fromarray(grey), three),
        "grey, 16 bits": (Image.fromarray(grey.astype(np.uint16) * 257), three),
        "bits": (Image.fromarray(grey > 99), (three > 99) * np.uint8(255)),
        "rgba": (Image.fromarray(np.dstack([rgb, np.full((8, 8), 255, "u1")])), rgb),
        "palette": (Image.fromarray(three).convert("P"), three),
    }
    for name, (picture, expected) in cases.items():
        found = vision.still(encode(picture), view(8))
        if name != "palette":
            np.testing.assert_array_equal(found, expected, name)
        else:  # its colours are rounded to a palette, but it is indices no more
            assert np.abs(found.astype(int) - expected).mean() < 30
    transparent = Image.fromarray(rgb).quantize(16)
    data = encode(transparent, transparency=b"\x00\xff")
    # Index 0 is transparent, and white shows; the other colours are opaque.
    seen = np.array(transparent.convert("RGB"))
    seen[np.asarray(transparent) == 0] = 255
    np.testing.assert_array_equal(vision.still(data, view(8)), seen)
    # ITU-R 601 luma, as Pillow documents it for "L": 0.299 R + 0.587 G + 0.114 B.
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    found = vision.still(encode(Image.fromarray(rgb)), view(8, 1))
    np.testing.assert_allclose(found[..., 0], luma, atol=1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    upright = Image.fromarray(smooth(40, 64))
    # What a camera stores for each orientation: the inverse of what a viewer has to do.
    stored = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    picture = upright.transpose(stored[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[vision.ORIENTATION] = orientation
    data = encode(picture, "JPEG", quality=98, exif=exif)
    expected = np.asarray(upright.resize((16, 16), Image.Resampling.BILINEAR))
    whole = vision.View(16, 3, crop="random_resized", scale=(1.0, 1.0))
    for found in (
        vision.still(data, view(16)),
        vision.random_resized(data, whole, np.zeros(vision.DRAWS)),
    ):
        assert np.abs(found.astype(int) - expected).max() <= 12 or (orientation == 0)


@pytest.mark.parametrize("cut", [3, 100, 0.5, 0.95])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damaged_files_are_undecodable(kind, cut):
    data = encode(Image.fromarray(noise(40, 40)), kind)
    data = data[: int(cut * len(data)) if cut < 1 else cut]
    for decode in (
        lambda: vision.still(data, view(16)),
        lambda: vision.random_resized(data, view(16, crop="random_resized"), ROW),
    ):
        with pytest.raises(vision.Undecodable) as error:
            decode()
        assert "\n" not in str(error.value)
        assert "object at" not in str(error.value)


def test_noise_instead_of_a_file_is_undecodable():
    for seed in range(20):
        with pytest.raises(vision.Undecodable):
            vision.still(noise(1, 500, 1, seed).tobytes(), view(8))


def test_random_boxes_have_the_promised_distribution():
    scale = (0.08, 1.0)
    boxes = [
        vision.random_box(500, 400, scale, row)
        for row in draws(0, 0, 4000, vision.DRAWS)
    ]
    left, top, right, bottom = np.array(boxes).T
    assert left.min() >= 0
    assert top.min() >= 0
    assert right.max() <= 500
    assert bottom.max() <= 400
    w, h = right - left, bottom - top
    ratio, share = w / h, w * h / 200_000
    assert 3 / 4 - 0.01 < ratio.min() < 0.76
    assert 1.32 < ratio.max() < 4 / 3 + 0.01
    assert 0.079 < share.min() < 0.085
    assert share.max() > 0.95
    # Among the small crops none is rejected: ratio is log-uniform, share uniform, place uniform.
    small = share < 0.5
    spread = np.log(4 / 3) / 3**0.5
    n = small.sum()
    assert abs(np.log(ratio[small]).mean()) < 5 * spread / n**0.5
    assert abs(np.log(ratio[small]).std() - spread) < 0.01
    middle, width = 0.29, 0.42 / 12**0.5
    assert abs(share[small].mean() - middle) < 5 * width / n**0.5
    free = left[small] / (500 - w[small])
    assert abs(free.mean() - 0.5) < 5 * 12**-0.5 / n**0.5 + 0.005
    down = top[small] / (400 - h[small])
    for pair in (free, down), (free, ratio[small]), (ratio[small], share[small]):
        assert abs(np.corrcoef(*pair)[0, 1]) < 5 / n**0.5


def test_random_boxes_match_torchvisions(torchvision):
    """Two independent samples of the same distribution, a wide picture so that attempts fail and fall back."""
    from torchvision.transforms import RandomResizedCrop

    picture = Image.new("L", (300, 100))
    theirs = np.array(
        [
            RandomResizedCrop.get_params(picture, (0.3, 1.0), (3 / 4, 4 / 3))
            for _ in range(3000)
        ]
    )
    ours = np.array(
        [
            vision.random_box(300, 100, (0.3, 1.0), r)
            for r in draws(1, 0, 3000, vision.DRAWS)
        ]
    )
    ours = np.stack(
        [ours[:, 1], ours[:, 0], ours[:, 3] - ours[:, 1], ours[:, 2] - ours[:, 0]], 1
    )
    for name, a, b in zip(
        ("top", "left", "height", "width"), ours.T, theirs.T, strict=True
    ):
        both = np.sort(np.concatenate([a, b]))
        gap = (
            np.abs(
                np.searchsorted(np.sort(a), both, "right")
                - np.searchsorted(np.sort(b), both, "right")
            ).max()
            / 3000
        )
        # Kolmogorov-Smirnov: 1.95 sqrt(2 / n) is passed once in 1,000 times.
        assert gap < 1.95 * (2 / 3000) ** 0.5, name


def test_a_box_that_never_fits_is_the_largest_centred_one():
    # 400 x 100 pixels, all of the area: widths near 200 and heights near 200 never fit; ratio 4/3 → 133 x 100.
    assert vision.random_box(400, 100, (1.0, 1.0), ROW) == (133, 0, 266, 100)
    # 100 x 400: ratio 3/4 → 100 x 133.
    assert vision.random_box(100, 400, (1.0, 1.0), ROW) == (0, 133, 100, 266)


def test_random_resized_is_crop_then_resize(torchvision):
    from torchvision.transforms import functional as F

    pixels = smooth(90, 120)
    keys = view(32, crop="random_resized", scale=(0.2, 0.6))
    for row in draws(3, 0, 20, vision.DRAWS):
        left, top, right, bottom = vision.random_box(120, 90, keys.scale, row)
        expected = F.resized_crop(
            Image.fromarray(pixels), top, left, bottom - top, right - left, (32, 32)
        )
        found = vision.random_resized(pixels, keys, row)
        # The filter may look over the box's edge; inside there is no difference.
        np.testing.assert_array_equal(
            found[3:-3, 3:-3], np.asarray(expected)[3:-3, 3:-3]
        )
        np.testing.assert_allclose(found, np.asarray(expected), atol=3)


def test_a_big_jpeg_decoded_at_reduced_scale_looks_the_same():
    pixels = smooth(1200, 1600)
    data = encode(Image.fromarray(pixels), "JPEG", quality=97)
    for scale in (1.0, 1.0), (0.3, 0.3):
        keys = view(48, crop="random_resized", scale=scale)
        for row in draws(4, 0, 5, vision.DRAWS):
            found = vision.random_resized(data, keys, row).astype(int)
            exact = vision.random_resized(pixels, keys, row)
            assert np.abs(found - exact).max() <= 6
    grey = vision.random_resized(data, view(48, 1, crop="random_resized"), ROW)
    assert grey.shape == (48, 48, 1)


def test_pad_crop_moves_each_image_by_its_own_numbers():
    images = np.arange(1, 3 * 4 * 4 + 1, dtype=np.uint8).reshape(3, 4, 4, 1)
    numbers = np.full((3, vision.DRAWS), 0.5)
    # pad 2 → 5 corners a side; 0.0 → 0 (moved down and right by 2), 0.5 → 2 (in place), 0.99 → 4.
    numbers[0, vision.CORNER] = 0.0, 0.5
    numbers[2, vision.CORNER] = 0.99, 0.99
    found = vision.pad_crop(images, 2, numbers)[..., 0]
    first = np.zeros((4, 4), np.uint8)
    first[2:] = images[0, :2, :, 0]
    last = np.zeros((4, 4), np.uint8)
    last[:2, :2] = images[2, 2:, 2:, 0]
    np.testing.assert_array_equal(found, [first, images[1, ..., 0], last])


def test_pad_crop_corners_are_uniform():
    spots = np.zeros((9000, 3, 3, 1), np.uint8)
    spots[:, 1, 1] = 1
    moved = vision.pad_crop(spots, 1, draws(0, 0, 9000, vision.DRAWS))[..., 0]
    counts = moved.sum(0)  # the spot lands in each of 9 places with probability 1/9
    assert counts.sum() == 9000
    chi2 = ((counts - 1000) ** 2 / 1000).sum()
    assert chi2 < 26.1  # 8 degrees of freedom, once in 1,000


def test_flip_mirrors_half_of_the_images():
    images = noise(1000, 4).reshape(1000, 2, 2, 3)
    numbers = draws(0, 0, 1000, vision.DRAWS)
    found = vision.augment(images.copy(), view(2, flip=True), numbers)
    same = (found == images).all((1, 2, 3))
    mirrored = (found == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / 1000**0.5
    still = vision.augment(images.copy(), view(2), numbers)
    np.testing.assert_array_equal(still, images)


def test_views_check_themselves():
    with pytest.raises(UserError, match=r"config.data.channels = 2 should be 1 or 3"):
        view(8, 2)
