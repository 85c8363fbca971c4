"""Measures the latency of a config's network: in this process on JAX's device, or in a new process on a few CPU cores.

The second kind of measurement runs this file as a program:

    python -m squeeze_jax.jobs._profile 2 '{"model": {"name": "squeezenet"}, "example": [[1, 224, 224, 3], "float32"], ...}'
"""

import contextlib
import json
import os
import sys
from typing import NamedTuple

import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.export import process, runtime

TIMEOUT_SECONDS = 1800.0  # for the new process


class Measurement(NamedTuple):
    """The latency of a network on one device.

    Attributes:
      by_layer, unnamed_ms, idle_ms, traced_ms, latency: see `cost.profile.Profile`.
      device: the device, such as "CPU, 2 cores".
    """

    by_layer: dict[str, float]
    unnamed_ms: float
    idle_ms: float
    traced_ms: float
    latency: dict[str, float]
    device: str


def measure(built, settings) -> Measurement:
    """Measures an experiment's network, with random weights on random inputs.

    Args:
      built: the experiment.
      settings: the job cost's settings: runs, warmup, batch and cores.

    Raises:
      UserError: the machine has fewer cores, or the device's operations cannot be recorded.
      process.Crash: the new process died.
    """
    check_cores(settings.cores)
    example = built.data.example()

    def shape_and_dtype(s):
        return (settings.batch, *s.shape[1:]), s.dtype.name

    if isinstance(example, dict):
        example = {name: shape_and_dtype(s) for name, s in example.items()}
    else:
        example = shape_and_dtype(example)
    task = dict(
        model=built.options,
        example=example,
        runs=settings.runs,
        warmup=settings.warmup,
    )
    if settings.cores is None:
        return _measure(**task)
    printed = process.run_module(
        __name__,
        *(settings.cores, json.dumps(task)),
        what=f"{built.options['name']} on {settings.cores} of the CPU's cores",
        timeout=TIMEOUT_SECONDS,
    )
    return Measurement(**json.loads(printed.splitlines()[-1]))


def check_cores(cores: int | None) -> None:
    """Raises a UserError if this process may use fewer cores, or if the system cannot confine a process to cores."""
    if cores is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(
            f"config.cost.cores = {cores}: this system does not confine processes to cores; leave the key out"
        )
    available = len(os.sched_getaffinity(0))
    if cores > available:
        raise UserError(
            f"config.cost.cores = {cores}, but this process may use {available}: set it to {available} or less"
        )


def _measure(model, example, runs, warmup) -> Measurement:
    """Measures a network in this process.

    Args:
      model: the arguments of `models.make`.
      example: (shape, dtype) of the network's input, or {name: (shape, dtype)}.
      runs: the number of timed runs.
      warmup: the number of runs before them.
    """
    import jax

    from squeeze_jax import models
    from squeeze_jax.cost import profile

    if isinstance(example, dict):
        inputs = {name: _random_input(*spec) for name, spec in example.items()}
    else:
        inputs = _random_input(*example)
    network = models.make(**model)
    measured = profile.measure(network, inputs, runs=runs, warmup=warmup)
    return Measurement(*measured, _device_name(jax.devices()[0]))


def _random_input(shape, dtype) -> np.ndarray:
    """Returns an array: uniform random numbers in [0, 1) for a floating-point dtype, True for bool, 0 for integers."""
    if np.issubdtype(dtype, np.floating):
        return np.random.default_rng(0).random(shape, dtype)
    return np.full(shape, dtype == "bool", dtype)


def _device_name(device) -> str:
    if device.platform != "cpu":
        return device.device_kind
    cores = os.cpu_count()
    with contextlib.suppress(AttributeError):
        cores = len(os.sched_getaffinity(0))
    return f"CPU, {cores} core{'s' if cores > 1 else ''}"


def main(cores: str, task: str) -> int:
    """Runs as the new process: prints the measurement as one line of JSON, and returns the exit status.

    Args:
      cores: the number of cores to use.
      task: the arguments of `_measure`, as JSON.
    """
    try:
        runtime.pin(int(cores))
        print(json.dumps(_measure(**json.loads(task))._asdict()))
    except UserError as error:
        print(error, file=sys.stderr)
        return process.USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
