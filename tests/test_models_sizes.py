"""Sizes of the maps of every network of images: those that are published, and those of small images."""

import jax
import jax.numpy as jnp
import pytest

from squeeze_jax import models
from squeeze_jax.errors import UserError


def shapes(net, size):
    """{endpoint: its height}, without computing anything; in no order."""
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    found = jax.eval_shape(lambda x: net.init_with_output(jax.random.key(0), x), x)
    return {name: e.shape[1] for name, e in found[0][1].items()}


def test_an_image_too_small_for_the_strides_is_an_error():
    with pytest.raises(UserError, match="smaller than a window"):
        shapes(models.make("squeezenet", variant="1.0"), 16)


class TestSqueezeNet:
    def test_published_maps_at_224(self):
        # Table 1: 111 (of 227), pooled to 55, 27, 13.
        net = models.make("squeezenet", variant="1.0")
        found = shapes(net, 227)
        fires = dict.fromkeys(("fire2", "fire3", "fire4"), 55)
        fires |= dict.fromkeys(("fire5", "fire6", "fire7", "fire8"), 27)
        assert found == dict(conv1=111, **fires, fire9=13, conv10=13)

    def test_stem_and_pools_for_small_images(self):
        net = models.make("squeezenet", stem_strides=1, pools=["fire3", "fire5"])
        found = shapes(net, 32)
        # 3x3 without padding 30, ceil(27 / 2) + 1 = 15, ceil(12 / 2) + 1 = 7.
        before = dict.fromkeys(("conv1", "fire2", "fire3"), 30)
        between = dict.fromkeys(("fire4", "fire5"), 15)
        after = dict.fromkeys(("fire6", "fire7", "fire8", "fire9", "conv10"), 7)
        assert found == before | between | after
        with pytest.raises(UserError, match="unknown layer 'fire33' in pools"):
            models.make("squeezenet", pools=("fire33",))


class TestMobileNetV2:
    def test_published_maps_at_224(self):
        # Table 2, the inputs of each line.
        found = shapes(models.make("mobilenet_v2"), 224)
        stages = dict(stage1=112, stage2=56, stage3=28, stage4=14, stage5=14, stage6=7)
        assert found == dict(conv1=112, **stages, stage7=7, head=7)

    def test_strides_for_small_images(self):
        net = models.make("mobilenet_v2", stem_strides=1, strides=[1, 1, 2, 2, 1, 2, 1])
        stages = dict(stage1=32, stage2=32, stage3=16, stage4=8, stage5=8, stage6=4)
        assert shapes(net, 32) == dict(conv1=32, **stages, stage7=4, head=4)
        with pytest.raises(UserError, match="7 stages need as many"):
            models.make("mobilenet_v2", strides=(1, 2))


class TestMobileNetV3:
    def test_published_maps_at_224(self):
        # Tables 1 and 2, the inputs of each line.
        large = [112, 56, 56, 28, 28, 28, *[14] * 6, 7, 7, 7]
        small = [56, 28, 28, *[14] * 5, 7, 7, 7]
        for variant, sizes in ("large", large), ("small", small):
            found = shapes(models.make("mobilenet_v3", variant=variant), 224)
            blocks = {f"bottleneck{n}": size for n, size in enumerate(sizes, 1)}
            assert found == dict(conv1=112, **blocks, head=7)

    def test_strides_for_small_images(self):
        net = models.make(
            "mobilenet_v3", variant="small", stem_strides=1, strides=[1, 1, 2, 1, 2]
        )
        blocks = {f"bottleneck{n}": 32 for n in (1, 2, 3)}
        blocks |= {f"bottleneck{n}": 16 for n in (4, 5, 6, 7, 8)}
        blocks |= {f"bottleneck{n}": 8 for n in (9, 10, 11)}
        assert shapes(net, 32) == dict(conv1=32, **blocks, head=8)
        with pytest.raises(UserError, match="6 stages need as many"):
            models.make("mobilenet_v3", variant="large", strides=(1, 2))


class TestEfficientNet:
    def test_published_maps_at_224(self):
        # Table 1, the inputs of each stage.
        found = shapes(models.make("efficientnet"), 224)
        stages = dict(stage2=112, stage3=56, stage4=28, stage5=14, stage6=14, stage7=7)
        assert found == dict(conv1=112, **stages, stage8=7, head=7)

    def test_strides_for_small_images(self):
        net = models.make("efficientnet", stem_strides=1, strides=[1, 1, 1, 2, 1, 2, 1])
        stages = dict(stage2=32, stage3=32, stage4=32, stage5=16, stage6=16, stage7=8)
        assert shapes(net, 32) == dict(conv1=32, **stages, stage8=8, head=8)
        with pytest.raises(UserError, match="7 stages need as many"):
            models.make("efficientnet", strides=(1, 2))


class TestShuffleNet:
    def test_published_maps_at_224(self):
        # Table 1.
        found = shapes(models.make("shufflenet"), 224)
        assert found == dict(conv1=112, stage2=28, stage3=14, stage4=7)

    def test_stem_and_strides_for_small_images(self):
        net = models.make(
            "shufflenet", stem_strides=1, stem_pool=False, strides=[1, 2, 2]
        )
        assert shapes(net, 32) == dict(conv1=32, stage2=32, stage3=16, stage4=8)
        with pytest.raises(UserError, match="3 stages need as many"):
            models.make("shufflenet", strides=(1, 2))


class TestResNet:
    def test_published_maps_at_224(self):
        # Table 1.
        found = shapes(models.make("resnet"), 224)
        assert found == dict(conv1=112, conv2=56, conv3=28, conv4=14, conv5=7)

    def test_cifar_stem_keeps_the_size(self):
        found = shapes(models.make("resnet", variant="18", stem="cifar"), 32)
        assert found == dict(conv1=32, conv2=32, conv3=16, conv4=8, conv5=4)


class TestFCN:
    def test_stages_halve_the_map_and_scores_stand_beside_them(self):
        found = shapes(models.make("fcn"), 224)
        # Section 4.2: scores at 1/32, 1/16 and 1/8.
        stages = dict(stage1=112, stage2=56, stage3=28, stage4=14, stage5=7)
        assert found == stages | dict(score5=7, score4=14, score3=28)

    def test_dilated_stages_keep_the_size_of_the_map(self):
        for dilated, sizes in (1, (28, 14, 14)), (2, (28, 28, 28)):
            found = shapes(models.make("fcn", dilated=dilated), 224)
            assert tuple(found[f"stage{n}"] for n in (3, 4, 5)) == sizes
        with pytest.raises(UserError, match=r"dilated = 3 should lie in \[0, 2\]"):
            models.make("fcn", dilated=3)
