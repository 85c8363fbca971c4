"""The digits with one network that runs at four widths: slimmable, trained by the sandwich rule with in-place distillation.

Yu et al. 2018, arXiv 1812.08928, and Yu and Huang 2019, arXiv 1903.05134. Scores and files are the largest width's; the
records show the losses of the smallest and of the random widths against its soft labels.

Result: test accuracy 98.1% at full width, 97.8% in the int8 file of 14 kB (one seed). Half a minute on 2 CPU cores.

    python run.py --config=configs/digits_slimmable.py
"""

from configs import digits

WIDTHS = (0.25, 0.5, 0.75, 1.0)


def get_config():
    config = digits.get_config()
    config.model = dict(name="slimmable", variant="tiny", switches=WIDTHS)
    config.gradients = dict(name="nas.sandwich", widths=WIDTHS, random=1)
    return config
