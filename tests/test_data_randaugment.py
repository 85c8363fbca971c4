"""Each operation against torchvision's, and the choice among them."""

import numpy as np
import pytest
from PIL import Image

from squeeze_jax.data import randaugment, vision
from squeeze_jax.data.pipeline import draws

NAMES = [name for name, _ in randaugment.OPS]
# torchvision's operation and what it is called with at strength 1, sign +1, for a picture of 33 x 24 pixels
# (AutoAugment's table 6). Its positive translations move right and down, ours left and up.
THEIRS = {
    "identity": ("Identity", 0.0),
    "shear_x": ("ShearX", 0.3),
    "shear_y": ("ShearY", 0.3),
    "translate_x": ("TranslateX", -150 / 331 * 33),
    "translate_y": ("TranslateY", -150 / 331 * 24),
    "rotate": ("Rotate", 30.0),
    "brightness": ("Brightness", 0.9),
    "color": ("Color", 0.9),
    "contrast": ("Contrast", 0.9),
    "sharpness": ("Sharpness", 0.9),
    "auto_contrast": ("AutoContrast", 0.0),
    "equalize": ("Equalize", 0.0),
}


def picture(channels=3, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(40, 200, (24, 33, channels), np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", THEIRS)
def test_operation_is_torchvisions(torchvision, name, sign, strength, channels):
    from torchvision.transforms import InterpolationMode

    image = picture(channels)
    found = dict(randaugment.OPS)[name](image, strength, sign)
    called, amount = THEIRS[name]
    expected = torchvision.transforms.autoaugment._apply_op(
        image,
        called,
        sign * strength * amount,
        InterpolationMode.NEAREST,
        [randaugment.FILL] * channels,
    )
    assert found.mode == image.mode
    difference = np.asarray(found).astype(int) - np.asarray(expected)
    # Shearing and rotating may round a border pixel to the other side.
    assert (difference != 0).mean() < 0.02


@pytest.mark.parametrize(
    ("magnitude", "bits"), [(0, 8), (9, 7), (15, 6), (22, 5), (30, 4)]
)
def test_posterize_keeps_the_upper_bits(magnitude, bits):
    # AutoAugment's range 4..8 bits: 8 - round(4 * magnitude / 30).
    found = dict(randaugment.OPS)["posterize"](picture(), magnitude / 30, 1.0)
    mask = 256 - 2 ** (8 - bits)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(picture()) & mask)


@pytest.mark.parametrize(("magnitude", "threshold"), [(0, 255), (15, 127.5), (30, 0)])
def test_solarize_inverts_from_the_threshold_on(magnitude, threshold):
    found = dict(randaugment.OPS)["solarize"](picture(), magnitude / 30, 1.0)
    pixels = np.asarray(picture())
    expected = np.where(pixels < threshold, pixels, 255 - pixels)
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_the_operations_are_the_papers():
    # Section 3.1 of arXiv 1909.13719 lists K = 14.
    assert len(NAMES) == len(set(NAMES)) == 14
    assert set(NAMES) == {*THEIRS, "posterize", "solarize"}


@pytest.mark.parametrize("name", NAMES)
def test_magnitude_zero_changes_nothing_but_histograms(name):
    op = dict(randaugment.OPS)[name]
    same = np.array_equal(np.asarray(op(picture(), 0.0, 1.0)), np.asarray(picture()))
    assert same == (name not in ("auto_contrast", "equalize"))


@pytest.mark.parametrize("name", NAMES)
def test_full_magnitude_changes_the_picture(name):
    op = dict(randaugment.OPS)[name]
    same = np.array_equal(np.asarray(op(picture(), 1.0, -1.0)), np.asarray(picture()))
    assert same == (name == "identity")


def test_the_numbers_choose_operation_and_direction():
    image = picture()
    for i, (_, op) in enumerate(randaugment.OPS):
        for side, sign in (0.2, 1.0), (0.7, -1.0):
            row = np.array([[(i + 0.5) / 14, side]])
            found = randaugment.apply(image, row, 21.0)
            expected = op(image, 0.7, sign)
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))
    both = np.array([[1.5 / 14, 0.2], [12.5 / 14, 0.2]])  # shear_x, then auto_contrast
    found = randaugment.apply(image, both, 30.0)
    shear, stretch = randaugment.OPS[1][1], randaugment.OPS[12][1]
    expected = stretch(shear(image, 1.0, 1.0), 1.0, 1.0)
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_all_operations_come_equally_often():
    chosen = (
        draws(0, 0, 2800, vision.DRAWS)[:, vision.OPS : vision.OPS + 40 : 2] * 14
    ).astype(int)
    counts = np.bincount(chosen.ravel(), minlength=14)
    chi2 = ((counts - 4000) ** 2 / 4000).sum()
    assert chi2 < 34.5  # 13 degrees of freedom, once in 1,000


@pytest.mark.parametrize("channels", [1, 3])
def test_augmenting_a_batch_uses_each_rows_own_numbers(channels):
    images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, channels), np.uint8)
    view = vision.View(16, channels, randaugment=3, magnitude=20.0)
    numbers = draws(9, 0, 6, vision.DRAWS)
    together = vision.augment(images.copy(), view, numbers)
    for i in range(6):
        alone = vision.augment(images[i : i + 1].copy(), view, numbers[i : i + 1])
        np.testing.assert_array_equal(alone[0], together[i])
    assert (together != images).any((1, 2, 3)).sum() >= 5
