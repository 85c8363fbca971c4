"""Measures a config's network: in this process on JAX's device, or on a few cores in a process of its own.

python -m squeeze_jax.jobs._profile 2 '{"model": {"name": "squeezenet"}, "example": [[1, 224, 224, 3], "float32"], "runs": 100, ...}'
"""

import contextlib
import json
import os
import sys
from typing import NamedTuple

import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.export import process, runtime

SECONDS = 1800.0  # until a process of its own is given up


class Measured(NamedTuple):
    """What was found, and where.

    Attributes:
      by_layer, unnamed_ms, idle_ms, traced_ms, latency: as in `cost.profile.Profile`.
      device: such as "cpu, 2 cores".
    """

    by_layer: dict[str, float]
    unnamed_ms: float
    idle_ms: float
    traced_ms: float
    latency: dict[str, float]
    device: str


def run(built, settings) -> Measured:
    """Measures the network of an experiment as the job cost's settings say, on random numbers with random weights.

    Raises:
      UserError: more cores than there are, or the device's operations cannot be recorded.
      process.Crash: the process of its own died.
    """
    check_cores(settings.cores)
    example = built.data.example()

    def shaped(s):
        return (settings.batch, *s.shape[1:]), s.dtype.name

    if isinstance(example, dict):
        example = {name: shaped(s) for name, s in example.items()}
    else:
        example = shaped(example)
    task = dict(
        model=built.options,
        example=example,
        runs=settings.runs,
        warmup=settings.warmup,
    )
    if settings.cores is None:
        return _measured(**task)
    printed = process.run_module(
        __name__,
        *(settings.cores, json.dumps(task)),
        what=f"{built.options['name']} on {settings.cores} of the CPU's cores",
        timeout=SECONDS,
    )
    return Measured(**json.loads(printed.splitlines()[-1]))


def check_cores(cores: int | None) -> None:
    """Raises a UserError where there are fewer cores, or the system confines no process."""
    if cores is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise UserError(
            f"config.cost.cores = {cores}: this system does not confine processes to cores; leave the key out"
        )
    there = len(os.sched_getaffinity(0))
    if cores > there:
        raise UserError(
            f"config.cost.cores = {cores}, but this process may use {there}: set it to {there} or less"
        )


def _measured(model, example, runs, warmup) -> Measured:
    import jax

    from squeeze_jax import models
    from squeeze_jax.cost import profile

    if isinstance(example, dict):
        given = {name: _numbers(*each) for name, each in example.items()}
    else:
        given = _numbers(*example)
    network = models.make(**model)
    found = profile.measure(network, given, runs=runs, warmup=warmup)
    return Measured(*found, _device(jax.devices()[0]))


def _numbers(shape, dtype) -> np.ndarray:
    """Random numbers in [0, 1), the integer 0 or True."""
    if np.issubdtype(dtype, np.floating):
        return np.random.default_rng(0).random(shape, dtype)
    return np.full(shape, dtype == "bool", dtype)


def _device(device) -> str:
    if device.platform != "cpu":
        return device.device_kind
    there = os.cpu_count()
    with contextlib.suppress(AttributeError):
        there = len(os.sched_getaffinity(0))
    return f"CPU, {there} core{'s' if there > 1 else ''}"


def main(cores: str, task: str) -> int:
    """The process of its own: prints what it found as one line of JSON."""
    try:
        runtime.pin(int(cores))
        print(json.dumps(_measured(**json.loads(task))._asdict()))
    except UserError as error:
        print(error, file=sys.stderr)
        return process.USER_ERROR
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
