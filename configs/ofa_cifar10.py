"""A supernet on CIFAR-10, and the best of its 17 million networks at a third of the largest one's latency.

Cai et al. 2019, arXiv 1908.09791, and Yu et al. 2020, arXiv 2003.11142. First the largest network is trained alone. Then its
channels are sorted by importance, and each step trains the largest, the smallest and a random network by the sandwich rule. The
networks have 3.3 to 18.8 M MACs.

On 2 cores of an AMD EPYC server with AVX-512 a step takes 0.54 s in the first phase and 0.9 s in the second if
nothing else runs, so the training takes about 75 minutes. The run below took 124 minutes beside other work.

    tfds build cifar10 --file_format=array_record   # or squeeze_jax.data.convert, for a packed archive
    python run.py --config=configs/ofa_cifar10.py

Result (JPEG copies of the images, quality 75; one seed): the largest network, 18.8 M MACs, has 85.6% test accuracy. The latency table
has 40 pieces; on six held-out networks of 0.12 to 0.57 ms its predictions err by 1.0% in the mean and 1.5% at most. The predictor's
rank correlation is 0.98 on 40 held-out networks of 200. Networks found at three limits, with the accuracy before and after two
more epochs, and the latency p50 of one image on one thread in LiteRT (the lower of two runs; beside other work up to 21% more):

    share   MACs     parameters   predicted accuracy   validation   test    trained further   predicted   measured
    0.25    4.41 M   402,018      79.8%                80.3%        79.4%   80.8%             0.141 ms    0.138 ms
    0.35    6.24 M   435,610      82.1%                82.1%        81.8%   82.9%             0.195 ms    0.195 ms
    0.5     9.20 M   598,290      84.0%                83.4%        83.2%   83.9%             0.282 ms    0.281 ms

The two more epochs take about two minutes for each network. The scores of all three searches cost 25% of the training's arithmetic. For
comparison: MobileNetV2 at width 0.5 has 81.0% at 0.226 ms after 12 epochs (`mobilenet_v2_cifar10`).

The network of share 0.35, trained alone for 36 epochs, has 86.3% test accuracy (one seed). That takes about a third of the time of the
space's training with the three searches, so at this share it is better to train the network alone:

    python run.py --config=configs/mobilenet_v2_cifar10.py --config.data.validation=0.1 --config.steps=12636 --config.model="{
        'name': 'ofa_mobilenet_v3', 'variant': 'cifar', 'stem_strides': 1, 'kernel': (3, 5, 3, 5, 5, 5, 5, 3, 3),
        'expand': (2, 2, 2, 4, 2, 2, 4, 2, 2), 'depth': (2, 3, 1)}"

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
