"""The main job: a small SqueezeNet on scikit-learn's handwritten digits (8x8 pixels, shown at 16x16).

Everything it needs comes inside installed packages. SqueezeNet 1.1 (Iandola et al., arXiv 1602.07360) at half width,
with simple bypass and batch normalisation, and without the ReLU on the class scores, which lets classes die on data
this small.

    python run.py
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.steps = 600
    config.batch = 64
    config.data = dict(source=dict(name="digits"), size=16, crop="pad", pad=2)
    config.model = dict(
        name="squeezenet",
        variant="1.1",
        width=0.5,
        stem_strides=1,
        bypass="simple",
        norm=True,
        dropout=0.1,
        conv10_relu=False,
    )
    config.optim = dict(name="sgd", lr=0.1, warmup=0.1, decay=1e-4, nesterov=True)
    config.eval_every = 200
    return config
