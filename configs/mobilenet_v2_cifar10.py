"""MobileNetV2 at width 0.5 (Sandler et al., arXiv 1801.04381) on CIFAR-10.

The stem and the first stages keep the resolution: 32x32 becomes 4x4 where 224x224 becomes 7x7.

    tfds build cifar10 --file_format=array_record   # or squeeze_jax.data.convert, for a packed archive
    python run.py --config=configs/mobilenet_v2_cifar10.py

Result of 3 of the 12 epochs, `--config.steps=1172`: 67.1% test accuracy (JPEG copies of the images, quality 75), 700,490
parameters, 14.0 M MACs; 130 to 170 images/s on 2 busy cores of an AMD EPYC server with AVX-512, 17 minutes. Files:
StableHLO 2.93 MB, TFLite 2.82 MB. All 12 epochs have not been run yet.
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    epochs = 12
    config.batch = 128
    config.steps = epochs * 50_000 // config.batch
    config.data = dict(
        source=dict(name="tfds", dataset="cifar10"),
        size=32,
        mean=(0.491, 0.482, 0.447),
        std=(0.247, 0.243, 0.262),
        crop="pad",
        flip=True,
    )
    config.model = dict(
        name="mobilenet_v2",
        variant="0.5",
        stem_strides=1,
        strides=(1, 2, 2, 2, 1, 1, 1),
        dropout=0.1,
    )
    warmup = 400 / config.steps  # a share, so that it shrinks with a shorter run
    config.optim = dict(name="sgd", lr=0.2, warmup=warmup, decay=5e-4, nesterov=True)
    config.log_every = 100
    config.eval_every = 50_000 // config.batch
    return config
