"""Checks that a function can be exported: it returns arrays, and the outputs of an example depend only on that example."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from squeeze_jax.errors import UserError, shortened
from squeeze_jax.export.runnable import Runnable, Spec, compute_outputs, name_outputs

# Relative to the largest absolute value of an output. Positions in a batch may sum in different orders.
TOLERANCE = 1e-3
_RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform", "dropout"}
TRAINING = (
    "the network seems to be in training mode; evaluate it, such as with train=False"
)


def compile_model(fn: Callable) -> tuple[Callable, list[str]]:
    """Compiles the live function.

    It computes in full float32, even where an accelerator would by default round the factors of matrix products.

    Returns:
      (run, names): `run` maps {name: [b, ...]} to {name: output [b, ...]}; its first call fills `names` with the names of the
      outputs in the order in which `fn` returns them.
    """
    names: list[str] = []

    def traced(x):
        outputs = name_outputs(fn(x))
        names[:] = list(outputs)  # jit sorts the keys of a mapping
        return outputs

    # A new function, so that jit does not reuse a trace from before the parameters changed.
    call = jax.jit(traced)

    def run(x):
        with jax.default_matmul_precision("highest"):
            return {name: np.asarray(value) for name, value in call(x).items()}

    return run, names


def check_output_shapes(fn: Callable, inputs: Mapping[str, Spec]) -> None:
    """Checks that a function returns arrays whose first axis counts the examples, without running it.

    Raises:
      UserError: `fn` is not a function, or an output has no such axis.
    """
    if not callable(fn) or hasattr(fn, "apply"):
        raise UserError(
            f"fn is {shortened(repr(type(fn)), 60)}: give a function of the inputs, such as lambda x: model.apply(variables,"
            " x['image'])"
        )
    for batch in (2, 3):
        input_shapes = {
            name: jax.ShapeDtypeStruct((batch, *spec.shape), spec.dtype)
            for name, spec in inputs.items()
        }
        outputs = jax.eval_shape(lambda x: name_outputs(fn(x)), input_shapes)
        for name, output in outputs.items():
            if output.shape[:1] != (batch,):
                raise UserError(
                    f"the function's output {name} is {list(output.shape)} for {batch} examples: its first axis should"
                    " count the examples, [b, ...]"
                )


def check_independence(
    fn: Callable,
    runnable: Runnable,
    check: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    batch: int,
) -> None:
    """Checks that an example's outputs do not change with the other examples of the batch or its position among them.

    Args:
      fn: the live function.
      runnable: the same function, compiled for `batch` examples.
      check: examples {name: [n, ...]}.
      expected: the function's outputs for these examples.
      batch: number of examples in a batch.

    Raises:
      UserError: the outputs change, because of batch statistics or random numbers.
    """
    count = len(next(iter(check.values())))
    size = max(2, min(batch, count))
    last = {name: array[-1:] for name, array in check.items()}
    copies = {name: np.repeat(row, size, axis=0) for name, row in last.items()}
    repeated = compute_outputs(runnable, copies, size)
    if (
        count == 1
    ):  # a batch of one example: compare with a batch that also holds zeros, to change batch statistics
        mixed = {
            k: np.concatenate([row, np.zeros_like(row)]) for k, row in last.items()
        }
        expected = compute_outputs(runnable, mixed, size)
    position = 0 if count == 1 else -1
    for name, values in repeated.items():
        row = np.asarray(expected[name][position], np.float64)
        limit = TOLERANCE * (float(np.abs(row).max(initial=0)) or 1.0)
        difference = np.abs(values.astype(np.float64) - row).max(initial=0)
        if difference <= limit:
            continue
        problem = "changes with the other examples of its batch"
        if _is_random(fn, runnable.inputs):
            problem = "is random: the function draws random numbers, as dropout does"
        raise UserError(
            f"the output {name} of a check example {problem} (by {difference:.2g}): {TRAINING}"
        )


def _is_random(fn: Callable, inputs: Mapping[str, Spec]) -> bool:
    """Returns whether a function draws random numbers."""
    zeros: dict[str, Any] = {
        name: jnp.zeros((2, *spec.shape), spec.dtype) for name, spec in inputs.items()
    }
    return _has_random_primitive(
        jax.make_jaxpr(lambda x: name_outputs(fn(x)))(zeros).jaxpr
    )


def _has_random_primitive(jaxpr: core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name in _RANDOM
        or any(map(_has_random_primitive, core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
