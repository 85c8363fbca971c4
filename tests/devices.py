"""Simulated CPU devices: of this process, and of those that tests start."""

import contextlib
import os

import jax
import jax.extend.backend


def xla_flags(devices: int) -> str:
    """Returns the tests' own XLA_FLAGS with a number of simulated devices."""
    return f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"


@contextlib.contextmanager
def simulated(devices: int):
    """Starts JAX anew with so many devices, and with one afterwards. Arrays stay valid; what was compiled is forgotten."""

    def restart(devices):
        jax.extend.backend.clear_backends()
        jax.config.update("jax_num_cpu_devices", devices)

    restart(devices)
    yield
    restart(1)
