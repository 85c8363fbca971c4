"""Semantic segmentation of CamVid's street scenes, 11 classes, by a small FCN-8s with dilated last stages.

FCN is Long et al. 2015, arXiv 1411.4038; dilation instead of strides is Yu and Koltun 2016, arXiv 1511.07122. Images and
targets are at a quarter of their stored resolution, 90x120 pixels, so that training takes minutes on two CPU cores.

Result: mean IoU 35.6% and pixel accuracy 79.7% on the 233 test images (mean IoU 35.3% as an int8 TFLite file of 490 kB),
one run, about 5 minutes on two shared CPU cores. The network recognises road and sky (IoU 81% and 85%), but hardly poles,
signs, pedestrians and bicyclists (below 2%), which are a few pixels wide at this resolution.

    python run.py --config=configs/camvid_fcn.py --config.data.source.path=camvid_480x360_webp90.zip
"""

import ml_collections


def get_config():
    config = ml_collections.ConfigDict()
    config.steps = 1000
    config.batch = 8
    config.data = dict(
        name="segmentation",
        source=dict(name="camvid", path="camvid_480x360_webp90.zip"),
        size=(90, 120),
        crop="random_resized",
        scale=(0.4, 1.0),
        flip=True,
    )
    config.model = dict(name="fcn", variant="8s", dilated=2)
    config.optim = dict(name="adamw", lr=3e-3, warmup=0.05, decay=1e-4)
    config.eval_every = 250
    config.save_every = 250
    return config
