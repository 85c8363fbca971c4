"""Prints what the config's network costs, layer by layer, before anything is trained; writes nothing."""

import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from squeeze_jax.cost import count, layers, memory
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import export
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.report import table, units

NEEDS_RUN = False  # a config is enough
BITS = 8  # of weights and activations, as in the files for microcontrollers
HEADINGS = ["layer", "parameters", "MACs", "BOPS", "bytes moved", "MACs/byte", "live"]


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints a row a layer, totals, and the peak memory of activations, of one image.

    Raises:
      UserError: files are given, or there are several processes.
    """
    if inputs:
        raise UserError(f"the job cost takes no files: {inputs[0]}")
    export.alone("cost")
    model, image = (
        built.model,
        jax.ShapeDtypeStruct((1, *built.data.shape), jnp.float32),
    )
    rows = layers.layers(model, image, weight_bits=BITS, activation_bits=BITS)
    peak = memory.peak(model, image, bits=BITS)
    size = "x".join(map(str, built.data.shape))
    print(
        f"{built.experiment.model['name']} of one image of {size}, weights and activations of {BITS} bits;"
        f" live: the most bytes of activations\n\n{text(rows, peak)}\n"
    )
    for line in (*where(peak), *elsewhere(model, image)):
        print(line)
    for missing in count.macs(model, image).unknown:
        print(f"not counted     {missing}")


def text(rows: Sequence[layers.Layer], peak: memory.Memory) -> str:
    """The table, whose last row is the total."""
    known = {row.name: row for row in rows}
    names = dict.fromkeys([*peak.by_layer, *known])
    lines = [
        cells(known.get(name, layers.Layer(name)), peak.by_layer.get(name))
        for name in names
    ]
    total = cells(layers.total(tuple(rows)), peak.bytes)
    return table.aligned([HEADINGS, *lines, total])


def cells(row: layers.Layer, live: int | None) -> list[str]:
    """A layer's row as text; what it has none of is `-`."""
    counts = (row.parameters, row.macs, row.bops)
    return [
        row.name,
        *(units.count(n or None) for n in counts),
        units.size(row.bytes or None),
        f"{row.intensity:.3g}" if row.bytes else "-",
        units.size(live),
    ]


def where(peak: memory.Memory) -> list[str]:
    """Where the peak is, and what lies in memory there."""
    place = f"{peak.operation} in {peak.layer}" if peak.layer else peak.operation
    shapes = " + ".join("x".join(map(str, s)) or "1" for s in peak.shapes)
    return [
        f"peak memory     {units.size(peak.bytes)} of activations, at {place}: {shapes}"
    ]


def elsewhere(model, image) -> list[str]:
    """The same in float32, and what XLA plans for this machine."""
    lines = [f"in float32      {units.size(memory.peak(model, image, bits=32).bytes)}"]
    plan = memory.compiled(model, image)
    if plan is not None:
        whole = plan.inputs + plan.outputs + plan.temporary
        lines.append(
            f"XLA on {jax.default_backend():<9}{units.size(whole)} of inputs, results and temporary buffers"
        )
    return lines
