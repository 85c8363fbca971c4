"""SqueezeNet 1.1 (Iandola et al., arXiv 1602.07360) on CIFAR-10: 12 epochs, which a laptop does in half an hour.

The stem keeps the resolution; with simple bypass and batch normalisation, and no ReLU on the class scores.

    tfds build cifar10 --file_format=array_record   # or squeeze_jax.data.convert, for a packed archive
    python run.py --config=configs/squeezenet_cifar10.py

Result: 83.1% test accuracy, 83.2% in int8 (JPEG copies of the images, quality 75), 730,570 parameters, 16.9 M MACs; about
490 images/s on 2 cores of an AMD EPYC server with AVX-512, so 20 minutes. Files and latency p50 of one image on one
thread there: TFLite 2.94 MB, 0.198 ms; int8 0.84 MB, 0.090 ms; StableHLO 2.97 MB, 0.381 ms.
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
        name="squeezenet",
        variant="1.1",
        stem_strides=1,
        norm=True,
        bypass="simple",
        dropout=0.1,
        conv10_relu=False,
    )
    warmup = 400 / config.steps  # a share, so that it shrinks with a shorter run
    config.optim = dict(name="sgd", lr=0.2, warmup=warmup, decay=5e-4, nesterov=True)
    config.log_every = 100
    config.eval_every = 50_000 // config.batch
    return config
