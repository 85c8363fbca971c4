"""The digits with 8-bit weights and activations in training: learned step sizes, from step 300 on.

LSQ (Esser et al. 2019, arXiv 1902.08153). Until then the network trains in float while the ranges of its activations are
observed. The int8 file computes what was trained.

    python run.py --config=configs/digits_qat.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.forward = (dict(name="quantize.lsq", bits=8, activation_bits=8, start=300),)
    # A float file of another runtime flips single roundings, so it cannot agree to 1e-4; nobody would ship it either.
    config.export = dict(formats=("stablehlo", "tflite_int8"))
    return config
