"""The digits on two devices that exchange gradients as 8-bit integers with error feedback: a quarter of the bytes.

Karimireddy et al. 2019, arXiv 1901.09847. The plan says how many bytes a step sends. On a machine with one CPU device,
two are simulated:

    XLA_FLAGS=--xla_force_host_platform_device_count=2 python run.py --config=configs/digits_int8_exchange.py
"""

from configs import digits


def get_config():
    config = digits.get_config()
    config.exchange = dict(name="comm.int8")
    return config
