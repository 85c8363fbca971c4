"""Sections of a config that are settings of the jobs; their attributes are the keys."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from squeeze_jax import registry
from squeeze_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """The keys of `config.export`.

    Attributes:
      formats: names of files in `export/formats`.
      calibration: training examples that the ranges of integer formats are measured on.
      check: test examples on which each file must agree with the live model.
      tolerance: largest difference of a float file's logits, relative to the largest logit where that is above 1.
      int8_agreement: share of check examples whose top class an integer file must share, 0..1.
    """

    formats: tuple = ("stablehlo", "tflite", "tflite_int8")
    calibration: int = 256
    check: int = 128
    tolerance: float = 1e-4
    int8_agreement: float = 0.95


@dataclasses.dataclass(frozen=True)
class BenchmarkSettings:
    """The keys of `config.benchmark`.

    Attributes:
      runs: timed runs of each file at batch 1.
      warmup: runs before them.
    """

    runs: int = 200
    warmup: int = 20


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """The keys of `config.cost`.

    Attributes:
      weight_bits: of all weights; or ordered (regex, bits) rules over parameter names, 32 where none matches.
      activation_bits: of activations.
      latency: whether to run the network and measure where its time goes.
      runs: timed runs.
      warmup: runs before them.
      batch: examples at a time in these runs; all other costs are of one.
      cores: confines them to so many cores of the CPU, in a process of their own; None runs them on JAX's default
        device, and on a CPU on all cores.
    """

    weight_bits: int | tuple = 8
    activation_bits: int = 8
    latency: bool = False
    runs: int = 100
    warmup: int = 10
    batch: int = 1
    cores: int | None = None


@dataclasses.dataclass(frozen=True)
class DistillSettings:
    """The keys of `config.distill`.

    Attributes:
      teachers: networks to learn from, each {"workdir": DIR} of an earlier run or {"folder": DIR} of transformers.
      cache: a folder for their outputs on the training examples, computed once for all runs; "" computes them anew in
        each step.
      cache_dtype: of what is kept there; numbers above 65504, which MobileBERT's layers give, need float32.
    """

    teachers: tuple = ()
    cache: str = ""
    cache_dtype: Literal["float16", "float32"] = "float16"


def made(kind: type, section: Mapping[str, Any], where: str):
    """Builds a dataclass of settings from its section; counts start at 1."""
    registry.check(kind, section, where)
    found = kind(**section)
    counts(dataclasses.asdict(found), where)
    return found


def counts(section: Mapping[str, Any], where: str) -> None:
    """Raises a UserError where an integer is below 1."""
    for key, value in section.items():
        if isinstance(value, int) and not isinstance(value, bool) and value < 1:
            raise UserError(f"{where}.{key} = {value} should be at least 1")


def tuples(value):
    """Lists become tuples all the way down, so that a config is the same from Python, JSON and the command line."""
    if isinstance(value, Mapping):
        return {k: tuples(v) for k, v in value.items()}
    return tuple(tuples(v) for v in value) if isinstance(value, list | tuple) else value
