"""StableHLO: one file for every accelerator and batch size, run by `jax.export` (and by any PJRT or IREE runtime).

`model.stablehlo` is the portable artifact with its calling convention; `model.mlir` is the same program as text, for
reading: its large constants are elided.
"""

import re
from pathlib import Path

import numpy as np

from squeeze_jax.export.runnable import Runnable

SUFFIX = ".stablehlo"
INTEGER = False
NEEDS = ()
PLATFORMS = ("cpu", "cuda", "tpu")


def convert(fn, shape, calibration=None) -> dict[str, bytes]:
    """Traces `fn` with a symbolic batch for all platforms at once.

    Args:
      fn: float32 pixels [b, h, w, c] → an array or a tuple of arrays.
      shape: (h, w, c).
      calibration: not needed by this format.

    Returns:
      `{suffix: content}`, the file that runs first.
    """
    import jax
    from jax import export

    pixels = jax.ShapeDtypeStruct(
        export.symbolic_shape(f"b, {', '.join(map(str, shape))}"), np.float32
    )
    exported = export.export(jax.jit(lambda x: fn(x)), platforms=PLATFORMS)(pixels)
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
    call = jax.jit(exported.call)

    def run(images):
        return tuple(map(np.asarray, jax.tree.leaves(call(images))))

    def timed(images):
        on_device = jax.device_put(images)
        return lambda: jax.block_until_ready(call(on_device))

    shape = tuple(map(int, exported.in_avals[0].shape[1:]))
    return Runnable(shape, None, run, timed, f"jax {jax.__version__}")
