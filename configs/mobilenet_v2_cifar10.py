"""MobileNetV2 0.5 on CIFAR-10."""

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
    config.optim = dict(name="sgd", lr=0.2, warmup=400, decay=5e-4, nesterov=True)
    config.log_every = 100
    config.eval_every = 50_000 // config.batch
    return config
