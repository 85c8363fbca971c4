"""A supernet on CIFAR-10: one training run gives 17 million networks of 3.3 to 18.8 M MACs.

Cai et al. 2019, arXiv 1908.09791, and Yu et al. 2020, arXiv 2003.11142. First the largest network is trained alone. Then its
channels are sorted by importance, and each step trains the largest, the smallest and a random network by the sandwich rule.

Two to two and a half hours on 2 CPU cores: 26 epochs, of which the last 16 train three networks in each step. A step takes
0.4 to 0.5 s in the first phase and 0.8 to 1 s in the second one.

    tfds build cifar10 --file_format=array_record   # or squeeze_jax.data.convert, for a packed archive
    python run.py --job=fit --config=configs/ofa_cifar10.py
    python run.py --job=extract --workdir=runs/ofa_cifar10 --config.extract.to=runs/small --config.extract.arch=smallest
"""

from configs import mobilenet_v2_cifar10


def get_config():
    config = mobilenet_v2_cifar10.get_config()
    epoch = 50_000 // config.batch
    del config.steps
    config.model = dict(name="ofa_mobilenet_v3", variant="cifar", stem_strides=1)
    config.phases = (
        dict(steps=10 * epoch),
        dict(
            steps=16 * epoch,
            begin=dict(name="nas.sort_channels"),
            gradients=dict(name="nas.once_for_all", random=1),
            optim=dict(lr=0.1),
        ),
    )
    config.eval_every = 4 * epoch
    return config
