"""The digits with 8-bit weights and activations in training: learned step sizes, from step 300 on.

LSQ (Esser et al. 2019, arXiv 1902.08153). Until then the network trains in float while the ranges of its activations are
observed. The int8 file computes what was trained.

Result: test accuracy 98.6% live and in the int8 file of 253 kB, as configs/digits.py in float (one seed; one image of 360 is
0.3%). Half a minute on 2 CPU cores.

    python run.py --config=configs/digits_qat.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    lsq = dict(name="quantize.lsq", bits=8, activation_bits=8, start=300, rate=0.01)
    config.forward = (lsq,)
    # A float file of another runtime flips single roundings, so it cannot agree to 1e-4; nobody would ship it either.
    config.export = dict(formats=("stablehlo", "tflite_int8"))
    return config
