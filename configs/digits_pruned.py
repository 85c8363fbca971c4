"""Magnitude pruning of the small SqueezeNet of configs/digits.py to 80 % zeros.

Zhu and Gupta 2017, arXiv 1710.01878: the sparsity grows by the cubic schedule of equation 1 during the first two thirds
of the run, and the rest of the run trains the weights that are left. The first layer and the classifier stay dense.

Result: test accuracy 0.983 against 0.986 of configs/digits.py (one seed; one image of 360 is 0.003). Half a minute on 2
CPU cores. `pytest tests/test_run_methods.py -k pruned` counts the zeros of such a run.

    python run.py --config=configs/digits_pruned.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.update = (
        "optim",
        dict(
            name="prune.magnitude",
            sparsity=0.8,
            begin=100,
            end=400,
            every=20,
            rules=(("^conv1/|^conv10/", False), ("kernel$", True)),
        ),
    )
    return config
