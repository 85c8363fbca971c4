"""Whether a function can become a file: what it returns, and that an example's outputs depend on that example alone."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from squeeze_jax.errors import UserError, shortened
from squeeze_jax.export.runnable import Runnable, Spec, named, outputs

# Relative to an output's largest number: programs for other places in a batch may add up in another order.
TOLERANCE = 1e-3
_RANDOM = {"random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform", "dropout"}
TRAINING = (
    "the network seems to be in training mode; evaluate it, such as with train=False"
)


def live(fn: Callable) -> tuple[Callable, list[str]]:
    """Returns the function that runs `fn`, and a list that then holds the names of its outputs in its order.

    It computes in full float32, also where an accelerator would round products.
    """
    names: list[str] = []

    def traced(x):  # jit sorts a mapping's keys; the order of the stages is the model's
        found = named(fn(x))
        names[:] = list(found)
        return found

    call = jax.jit(traced)  # not a trace from before the parameters changed

    def run(x):
        with jax.default_matmul_precision("highest"):
            return {name: np.asarray(value) for name, value in call(x).items()}

    return run, names


def shapes(fn: Callable, inputs: Mapping[str, Spec]) -> None:
    """Checks that a function returns arrays with an axis of examples, without running it.

    Raises:
      UserError: it is no function, or it does not.
    """
    if not callable(fn) or hasattr(fn, "apply"):
        raise UserError(
            f"fn is {shortened(repr(type(fn)), 60)}: give a function of the inputs, such as lambda x: model.apply(variables,"
            " x['image'])"
        )
    for batch in (2, 3):
        given = {
            name: jax.ShapeDtypeStruct((batch, *spec.shape), spec.dtype)
            for name, spec in inputs.items()
        }
        for name, found in jax.eval_shape(lambda x: named(fn(x)), given).items():
            if found.shape[:1] != (batch,):
                raise UserError(
                    f"the function's output {name} is {list(found.shape)} for {batch} examples: its first axis should"
                    " count the examples, [b, ...]"
                )


def independent(
    fn: Callable,
    runnable: Runnable,
    check: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    batch: int,
) -> None:
    """Checks that the outputs of an example are the same beside other examples, and in another place of a batch.

    Args:
      fn: the live function.
      runnable: the same, compiled for `batch` examples.
      check: examples {name: [n, ...]}.
      expected: the function's outputs of them.
      batch: examples that were computed at a time.

    Raises:
      UserError: they are not: statistics of the batch, or random numbers.
    """
    count = len(next(iter(check.values())))
    size = max(2, min(batch, count))
    last = {name: array[-1:] for name, array in check.items()}
    copies = {name: np.repeat(row, size, axis=0) for name, row in last.items()}
    alike = outputs(runnable, copies, size)
    if count == 1:  # alone in its batch; beside zeros statistics are others
        mixed = {
            k: np.concatenate([row, np.zeros_like(row)]) for k, row in last.items()
        }
        expected = outputs(runnable, mixed, size)
    place = 0 if count == 1 else -1
    for name, values in alike.items():
        row = np.asarray(expected[name][place], np.float64)
        limit = TOLERANCE * (float(np.abs(row).max(initial=0)) or 1.0)
        apart = np.abs(values.astype(np.float64) - row).max(initial=0)
        if apart <= limit:
            continue
        drawn = _random(fn, runnable.inputs)
        why = "random: it draws random numbers, as dropout does" if drawn else ""
        raise UserError(
            f"the output {name} of a check example is {why or 'another one beside other examples'} (by {apart:.2g}): {TRAINING}"
        )


def _random(fn: Callable, inputs: Mapping[str, Spec]) -> bool:
    """Whether a function draws random numbers."""
    given: dict[str, Any] = {
        name: jnp.zeros((2, *spec.shape), spec.dtype) for name, spec in inputs.items()
    }
    return _draws(jax.make_jaxpr(lambda x: named(fn(x)))(given).jaxpr)


def _draws(jaxpr: core.Jaxpr) -> bool:
    return any(
        eqn.primitive.name in _RANDOM
        or any(map(_draws, core.jaxprs_in_params(eqn.params)))
        for eqn in jaxpr.eqns
    )
