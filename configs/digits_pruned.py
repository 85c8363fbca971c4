"""The digits with four of five weights at zero: global magnitude pruning while it trains.

Zhu and Gupta 2017, arXiv 1710.01878: the share of zeros grows from 0 at step 100 to 80% at step 450, fast at first.

    python run.py --config=configs/digits_pruned.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    pruning = dict(name="prune.magnitude", sparsity=0.8, begin=100, end=450, every=10)
    config.update = ("optim", pruning)
    config.ema = 0.99
    return config
