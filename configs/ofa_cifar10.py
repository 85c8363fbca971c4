"""A supernet on CIFAR-10, and the best of its 17 million networks at a third of the largest one's latency.

Cai et al. 2019, arXiv 1908.09791, and Yu et al. 2020, arXiv 2003.11142. First the largest network is trained alone. Then its
channels are sorted by importance, and each step trains the largest, the smallest and a random network by the sandwich rule. The
networks have 3.3 to 18.8 M MACs.

The training takes about two hours on 2 CPU cores, by the measured time of a step (0.4 to 0.5 s in the first phase, 0.8 to 1 s in
the second): no whole run is recorded yet.

    tfds build cifar10 --file_format=array_record   # or squeeze_jax.data.convert, for a packed archive
    python run.py --config=configs/ofa_cifar10.py

Other limits, from the same training:

    python run.py --job=search --workdir=runs/ofa_cifar10 --config.search.to=runs/half --config.search.limits="({'cost': 'latency', 'table': 'tflite_1', 'share': 0.5},)"
"""

from configs import mobilenet_v2_cifar10


def get_config():
    config = mobilenet_v2_cifar10.get_config()
    config.data.validation = 0.1  # on these images the search compares networks
    epoch = 45_000 // config.batch
    del config.steps
    config.model = dict(name="ofa_mobilenet_v3", variant="cifar", stem_strides=1)
    config.phases = (
        dict(steps=6 * epoch),
        dict(
            steps=10 * epoch,
            begin=dict(name="nas.sort_channels"),
            gradients=dict(name="nas.once_for_all", random=1),
            optim=dict(lr=0.1),
        ),
    )
    config.eval_every = 2 * epoch
    config.latency_table = dict(formats=("tflite",))
    config.search = dict(
        limits=(dict(cost="latency", table="tflite_1", share=0.35),),
        samples=200,
        steps=2 * epoch,
    )
    return config
