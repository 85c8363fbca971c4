"""The digits with a penalty that drives whole filters to zero: group lasso.

Wen et al. 2016, arXiv 1608.03665. "sparse_groups" in the records is the share of filters that have become so small that
they can be removed.

    python run.py --config=configs/digits_group_lasso.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.objective = (
        dict(name="losses.cross_entropy"),
        dict(name="prune.group_lasso", strength=1e-4),
    )
    config.optim.decay = 0.0
    return config
