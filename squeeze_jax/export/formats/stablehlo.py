"""StableHLO: one file for every accelerator and batch size, run by `jax.export` (and by any PJRT or IREE runtime).

`model.stablehlo` is the portable artifact with its calling convention; `model.mlir` is the same program as text, for
reading: its large constants are elided.
"""

import re
from pathlib import Path

import numpy as np

from squeeze_jax.errors import UserError
from squeeze_jax.export.runnable import Runnable, Spec, named

SUFFIX = ".stablehlo"
INTEGER = False
NAMED = True  # class names may follow its bytes
NEEDS = ()
PLATFORMS = ("cpu", "cuda", "tpu")
ALONE = "image"  # an input that needs no mapping


def convert(fn, inputs, calibration=None) -> dict[str, bytes]:
    """Traces `fn` with a symbolic batch for all platforms at once.

    The program takes a mapping {name: array} and returns what `fn` returns; of an image alone it takes the array.

    Args:
      fn: {name: [b, ...]} → an array or a mapping of arrays.
      inputs: {name: Spec}.
      calibration: not needed by this format.

    Returns:
      `{suffix: content}`, the file that runs first.
    """
    import jax
    from jax import export

    scope = export.SymbolicScope()
    given = {}
    for name, spec in inputs.items():
        axes = ", ".join(map(str, ("b", *spec.shape)))
        symbolic = export.symbolic_shape(axes, scope=scope)
        given[name] = jax.ShapeDtypeStruct(symbolic, spec.dtype)
    if list(given) == [ALONE]:
        called, given = (lambda x: fn({ALONE: x})), given[ALONE]
    else:
        called = lambda x: fn(x)  # noqa: E731  # not a trace from before
    exported = export.export(jax.jit(called), platforms=PLATFORMS)(given)
    return {
        SUFFIX: bytes(exported.serialize()),
        ".mlir": _readable(exported.mlir_module()).encode(),
    }


def _readable(text: str) -> str:
    """The module as MLIR's own printer elides it: hexadecimal constants and source locations left out."""
    text = re.sub(r'dense<"0x[0-9A-F]*">', "dense_resource<__elided__>", text)
    text = re.sub(r"^#loc.*\n", "", text, flags=re.M)
    return re.sub(r" loc\((?:#loc\d*|unknown)\)", "", text)


def load(path: str | Path, threads: int | None = None) -> Runnable:
    """Opens a file on this process's default jax device; `threads` is XLA's own matter."""
    import jax
    from jax import export

    exported = export.deserialize(bytearray(Path(path).read_bytes()))
    (given,), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    alone = not isinstance(given, dict)
    compiled = jax.jit(exported.call)

    def call(x):
        try:
            return compiled(x)
        except jax.errors.JaxRuntimeError as error:  # it is read at the first call
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be run as stablehlo: {reason}") from error

    def entry(x):
        return x[ALONE] if alone else dict(x)

    def run(x):
        found = named(call(entry(x)))
        return {name: np.asarray(value, np.float32) for name, value in found.items()}

    def timed(x):
        on_device = jax.device_put(entry(x))
        return lambda: jax.block_until_ready(call(on_device))

    inputs = {ALONE: given} if alone else given
    inputs = {
        name: Spec(tuple(map(int, aval.shape[1:])), np.dtype(aval.dtype))
        for name, aval in inputs.items()
    }
    return Runnable(inputs, None, run, timed, f"jax {jax.__version__}")
