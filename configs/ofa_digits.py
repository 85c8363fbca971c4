"""Train once, search, ship: a supernet on the digits, and the best network at half of the largest one's latency.

Cai et al. 2019, arXiv 1908.09791, and Yu et al. 2020, arXiv 2003.11142. First the largest of 400 networks is trained alone. Then its
channels are sorted by importance, and each step trains the largest, the smallest and a random network by the sandwich rule. The
latencies of all pieces are measured in LiteRT, a predictor of accuracy is fitted to scored networks, and evolution finds the best
network within the limit. It is extracted, trained a little further, exported and measured.

Result: test accuracy 98.6% for the largest network with 18,226 parameters, and 97.5% for the smallest with 7,490 (one seed). Under
three minutes on 2 CPU cores once the programs are compiled.

    python run.py --config=configs/ofa_digits.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    del config.steps
    config.data.validation = 0.15  # on these images the search compares networks
    config.model = dict(name="ofa_mobilenet_v3", variant="tiny", stem_strides=1)
    config.phases = (
        dict(steps=300),
        dict(
            steps=500,
            begin=dict(name="nas.sort_channels"),
            gradients=dict(name="nas.once_for_all", random=1),
            optim=dict(lr=0.05),
        ),
    )
    config.eval_every = 0
    config.latency_table = dict(formats=("tflite",), networks=8)
    config.search = dict(
        limits=(dict(cost="latency", table="tflite_1", share=0.5),),
        samples=50,
        score="eval_loss",  # finer than the accuracy on 216 images
        steps=150,
    )
    return config
