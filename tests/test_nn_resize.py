"""Resizing of maps against PyTorch, and as one operator of a TFLite file."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.errors import UserError
from squeeze_jax.export import operators
from squeeze_jax.export.formats import tflite
from squeeze_jax.export.runnable import Spec
from squeeze_jax.nn import resize

# (h, w) → (h', w'): up by whole and by broken factors, down by whole ones, one axis alone.
SIZES = [
    ((4, 6), (8, 12)),
    ((5, 7), (13, 10)),
    ((8, 12), (4, 3)),
    ((6, 5), (6, 15)),
    ((1, 3), (4, 1)),
]


def image(size, channels=3):
    return np.random.default_rng(0).normal(size=(2, *size, channels)).astype("float32")


def theirs(x, size, **how):
    import torch

    x = torch.from_numpy(x).permute(0, 3, 1, 2)
    y = torch.nn.functional.interpolate(x, size, **how)
    return y.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(("size", "wanted"), SIZES)
def test_values_are_pytorchs(size, wanted):
    x = image(size)
    for align in False, True:
        expected = theirs(x, wanted, mode="bilinear", align_corners=align)
        found = resize.bilinear(jnp.asarray(x), wanted, align_corners=align)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    expected = theirs(x, wanted, mode="nearest")
    np.testing.assert_array_equal(resize.nearest(jnp.asarray(x), wanted), expected)


def test_the_gradient_is_the_transposed_map():
    """<resize(x), y> = <x, transposed(y)> for all x and y, as for any linear map."""
    x, y = image((4, 5)), image((9, 7))
    _, pullback = jax.vjp(partial(resize.bilinear, size=(9, 7)), jnp.asarray(x))
    (back,) = pullback(jnp.asarray(y))
    forward = resize.bilinear(jnp.asarray(x), (9, 7))
    np.testing.assert_allclose(np.vdot(forward, y), np.vdot(x, back), rtol=1e-4)


@pytest.mark.parametrize(
    ("wanted", "align"), [((8, 12), False), ((7, 11), True), ((2, 3), False)]
)
def test_a_file_resizes_by_one_operator(wanted, align, tmp_path):
    resized = partial(resize.bilinear, size=wanted, align_corners=align)
    x = image((4, 6))[:1]
    inputs = {"image": Spec(x.shape[1:], x.dtype)}
    path = tmp_path / "resize.tflite"
    (content,) = tflite.convert(lambda a: resized(a["image"]), inputs).values()
    path.write_bytes(content)
    assert [node.kind for node in operators.read_operators(path)] == ["RESIZE_BILINEAR"]
    (found,) = tflite.load(path).run({"image": x}).values()
    np.testing.assert_allclose(found, resized(jnp.asarray(x)), atol=1e-5)


def test_an_empty_size_is_an_error():
    with pytest.raises(UserError, match=r"size = \(0, 4\) should be two positive"):
        resize.nearest(jnp.zeros((1, 2, 2, 1)), (0, 4))
