"""MobileNetV2 at width 0.5 (Sandler et al., arXiv 1801.04381) on CIFAR-10.

The stem and the first stages keep the resolution: 32x32 becomes 4x4 where 224x224 becomes 7x7.

    tfds build cifar10 --file_format=array_record   # or squeeze_jax.data.convert, for a packed archive
    python run.py --config=configs/mobilenet_v2_cifar10.py

Result: 81.0% test accuracy, 80.9% in int8 (JPEG copies of the images, quality 75), 700,490 parameters, 14.0 M MACs; on 2
cores of an AMD EPYC server with AVX-512 about 300 images/s, so 35 minutes. Files and latency p50 of one image on one
thread there: TFLite 2.82 MB, 0.226 ms; int8 1.00 MB, 0.144 ms; StableHLO 2.93 MB, 4.12 ms.
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
