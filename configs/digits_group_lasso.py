"""Group lasso on the filters of the small SqueezeNet of configs/digits.py.

Wen et al. 2016, arXiv 1608.03665, section 3.1. The penalty drives the norms of whole filters towards zero; without a
proximal step they come close to zero and do not reach it, so a later step removes the filters below a threshold. Batch
normalisation follows the convolutions and undoes a common factor of a filter, so the penalty also shrinks filters in use.

Result: test accuracy 0.986, as configs/digits.py (one seed; one image of 360 is 0.003). Of the 1,472 penalised filters
22 % end with a norm below a tenth of the largest in their layer: "small_groups" of the progress lines. Half a minute on 2
CPU cores.

    python run.py --config=configs/digits_group_lasso.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.optim.decay = 0.0  # the penalty takes its place
    config.objective = (
        dict(name="losses.cross_entropy"),
        dict(
            name="prune.group_lasso",
            weight=4e-4,
            groups="filters",
            rules=(("^conv10/", False), ("kernel$", True)),
        ),
    )
    return config
