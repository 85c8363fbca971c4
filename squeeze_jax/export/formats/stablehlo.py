"""StableHLO: one file for all accelerators and batch sizes, run by `jax.export` (and by any PJRT or IREE runtime).

`model.stablehlo` is the portable artifact with its calling convention. `model.mlir` is the same program as readable text,
without its large constants.
"""

import re
from pathlib import Path

import numpy as np

from squeeze_jax.errors import UserError, message_of
from squeeze_jax.export.runnable import Runnable, Spec, name_outputs

SUFFIX = ".stablehlo"
INTEGER = False
NAMED = True  # class names may be appended to the file
NEEDS = ()
PLATFORMS = ("cpu", "cuda", "tpu")
SINGLE_INPUT = "image"  # if this is the only input, the program takes an array instead of a mapping


def convert(fn, inputs, calibration=None) -> dict[str, bytes]:
    """Traces `fn` with a symbolic batch size, for all platforms at once.

    The program takes a mapping {name: array} and returns what `fn` returns. If the only input is an image, it takes the array.

    Args:
      fn: {name: [b, ...]} → an array or a mapping of arrays.
      inputs: {name: Spec}.
      calibration: not used by this format.

    Returns:
      `{suffix: content}`; the first entry is the file that a runtime runs.
    """
    import jax
    from jax import export

    scope = export.SymbolicScope()
    arguments = {}
    for name, spec in inputs.items():
        axes = ", ".join(map(str, ("b", *spec.shape)))
        symbolic = export.symbolic_shape(axes, scope=scope)
        arguments[name] = jax.ShapeDtypeStruct(symbolic, spec.dtype)
    if list(arguments) == [SINGLE_INPUT]:
        called, arguments = (lambda x: fn({SINGLE_INPUT: x})), arguments[SINGLE_INPUT]
    else:
        called = lambda x: fn(x)  # noqa: E731  # a new function, so that jit reuses no earlier trace
    exported = export.export(jax.jit(called), platforms=PLATFORMS)(arguments)
    return {
        SUFFIX: bytes(exported.serialize()),
        ".mlir": _elide_constants(exported.mlir_module()).encode(),
    }


def _elide_constants(text: str) -> str:
    """Returns a module's text without hexadecimal constants and source locations, as MLIR's printer elides them."""
    text = re.sub(r'dense<"0x[0-9A-F]*">', "dense_resource<__elided__>", text)
    text = re.sub(r"^#loc.*\n", "", text, flags=re.M)
    return re.sub(r" loc\((?:#loc\d*|unknown)\)", "", text)


def load(path: str | Path, threads: int | None = None) -> Runnable:
    """Opens a file on this process's default JAX device. `threads` is ignored: XLA chooses its own threads."""
    import jax
    from jax import export

    exported = export.deserialize(bytearray(Path(path).read_bytes()))
    (argument,), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
    takes_array = not isinstance(argument, dict)
    compiled = jax.jit(exported.call)

    def call(x):
        try:
            return compiled(x)
        except (
            jax.errors.JaxRuntimeError
        ) as error:  # the file is parsed at the first call
            raise UserError(
                f"{path} cannot be run as stablehlo: {message_of(error)}"
            ) from error

    def to_argument(x):
        return x[SINGLE_INPUT] if takes_array else dict(x)

    def run(x):
        outputs = name_outputs(call(to_argument(x)))
        arrays = {name: np.asarray(value) for name, value in outputs.items()}
        return {
            name: array if array.dtype.kind in "iub" else array.astype(np.float32)
            for name, array in arrays.items()
        }

    def timed(x):
        on_device = jax.device_put(to_argument(x))
        return lambda: jax.block_until_ready(call(on_device))

    inputs = {SINGLE_INPUT: argument} if takes_array else argument
    inputs = {
        name: Spec(tuple(map(int, aval.shape[1:])), np.dtype(aval.dtype))
        for name, aval in inputs.items()
    }
    return Runnable(inputs, None, run, timed, f"jax {jax.__version__}")
