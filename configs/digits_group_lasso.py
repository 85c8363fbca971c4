"""Group lasso on the filters of the small SqueezeNet of configs/digits.py.

Wen et al. 2016, arXiv 1608.03665, section 3.1. The penalty drives the norms of whole filters towards zero; without a
proximal step they come close to zero and do not reach it, so a later step removes the filters below a threshold. Batch
normalisation follows the convolutions and undoes a common factor of a filter, so the penalty also shrinks filters in use.

    python run.py --config=configs/digits_group_lasso.py
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
    config.optim = dict(name="sgd", lr=0.1, warmup=0.1, nesterov=True)
    config.objective = (
        dict(name="losses.cross_entropy"),
        dict(
            name="prune.group_lasso",
            weight=1e-5,
            groups="filters",
            rules=(("^conv10/", False), ("kernel$", True)),
        ),
    )
    config.eval_every = 200
    return config
