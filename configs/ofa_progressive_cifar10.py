"""Progressive shrinking on CIFAR-10: the phases that once-for-all's authors published, scaled by a budget.

Cai, Gan, Wang, Zhang, Han 2019, arXiv 1908.09791, section 3.3 and appendix B: the largest network, then elastic kernels, depths and
widths, one after the other. Each step trains random networks on the labels and on the largest one's probabilities. The config uses
the authors' epochs, networks per step and learning rates per 64 examples, and their teacher: the network that the first phase has
trained. They train for 590 epochs in all. The argument scales the epochs: 0.1 trains for 59.

No whole run is recorded yet.

    tfds build cifar10 --file_format=array_record   # or squeeze_jax.data.convert, for a packed archive
    python run.py --config=configs/ofa_progressive_cifar10.py:0.1
"""

from configs import ofa_cifar10


def get_config(budget="0.1"):
    config = ofa_cifar10.get_config()
    epoch = 45_000 // config.batch
    rate = config.batch / 64

    def phase(epochs, lr, random=0, begin=None, **choices):
        options = dict(
            steps=max(1, round(float(budget) * epochs * epoch)),
            optim=dict(lr=lr * rate),
        )
        if random:
            options["gradients"] = dict(
                name="nas.once_for_all",
                rule="random",
                random=random,
                labels=1.0,
                teacher="fixed",
                choices=choices,
            )
        return options | (dict(begin=begin) if begin else {})

    sort = dict(name="nas.sort_channels")
    config.phases = (
        phase(180, 0.08),
        phase(120, 3e-2, 1, depth=(3,), expand=(6,)),
        phase(25, 2.5e-3, 2, depth=(2, 3), expand=(6,)),
        phase(120, 7.5e-3, 2, expand=(6,)),
        phase(25, 2.5e-3, 4, sort, expand=(4, 6)),
        phase(120, 7.5e-3, 4, sort | dict(first=dict(expand=4))),
    )
    return config
