"""Prints what the config's network costs, layer by layer, before anything is trained, and writes it as CSV and PNG."""

import csv
import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from squeeze_jax.cost import count, layers, memory, program
from squeeze_jax.errors import UserError
from squeeze_jax.export import files
from squeeze_jax.jobs import _workdir, export
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.report import costs, table, units

NEEDS_RUN = False  # a config is enough
BITS = 8  # of weights and activations, as in the files for microcontrollers
# heading, key of a row, how its value is written
COLUMNS = (
    ("parameters", "parameters", units.count),
    ("MACs", "macs", units.count),
    ("share", "share", lambda share: "-" if share is None else f"{100 * share:.1f}%"),
    ("BOPS", "bops", units.count),
    ("bytes moved", "bytes_moved", units.size),
    ("MACs/byte", "macs_per_byte", lambda n: "-" if n is None else f"{n:.3g}"),
    ("live", "live_bytes", units.size),
)


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints a row a layer, totals, and the peak memory of activations, of one image.

    Writes the rows to `cost.csv` and `cost.png` in the work directory, and nothing else: whether it holds a run, and
    which, stays as it is.

    Raises:
      UserError: files are given, there are several processes, or the work directory cannot be written to.
    """
    if inputs:
        raise UserError(f"the job cost takes no files: {inputs[0]}")
    export.alone("cost")
    model, image = (
        built.model,
        jax.ShapeDtypeStruct((1, *built.data.shape), jnp.float32),
    )
    found = layers.layers(model, image, weight_bits=BITS, activation_bits=BITS)
    peak = memory.peak(model, image, bits=BITS)
    listed = rows(found, peak, unknown(model, image))
    size = "x".join(map(str, built.data.shape))
    title = f"{built.experiment.model['name']}, one image of {size}"
    bits = f"weights and activations of {BITS} bits"
    live = "live: the most bytes of activations"
    print(f"{title}, {bits}; {live}\n\n{text(listed)}\n")
    for line in (*where(peak), *elsewhere(model, image)):
        print(line)
    data, drawn = workdir / "cost.csv", workdir / "cost.png"
    caption = f"{bits} · peak at {place(peak)}"
    with _workdir.writable(workdir):
        files.write(data, comma_separated(listed))
        costs.write(drawn, listed, title=title, caption=caption)
    print(f"written         {data} and {drawn}")


def unknown(model, image) -> dict[str, list[str]]:
    """{layer: what of it is not counted}."""
    found, root = {}, program.root(model)
    for each in count.macs(model, image).unknown:
        what, _, layer = each.rpartition(" in ")
        what = re.sub("^while loop, .*", "while beyond one iteration", what)
        found.setdefault(layer.removeprefix(f"{root}/"), []).append(what)
    return found


def rows(
    found: Sequence[layers.Layer],
    peak: memory.Memory,
    unknown: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """A row a layer, in order of use, and last the total; keys are those of COLUMNS, layer and not_counted.

    Bytes live, MACs a byte and the share are None where there is nothing that they could be of.
    """
    known = {row.name: row for row in found}
    total = layers.total(tuple(found))
    names = dict.fromkeys([*peak.by_layer, *known, *unknown])
    lines = [
        (known.get(name, layers.Layer(name)), peak.by_layer.get(name), whats)
        for name in names
        for whats in [unknown.get(name, ())]
    ]
    every = dict.fromkeys(what for whats in unknown.values() for what in whats)
    lines.append((total, peak.bytes, every))
    return [
        {
            "layer": row.name,
            "parameters": row.parameters,
            "macs": row.macs,
            "share": row.macs / total.macs if total.macs else None,
            "bops": row.bops,
            "bytes_moved": row.bytes,
            "macs_per_byte": row.intensity if row.bytes else None,
            "live_bytes": live,
            "not_counted": "; ".join(whats),
        }
        for row, live, whats in lines
    ]


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, whose last row is the total; what a layer has none of is `-`, what is not counted a row below it."""
    headings = ["layer", *(heading for heading, _, _ in COLUMNS)]
    cells, notes = [headings], {}
    for row in rows:
        cells.append([row["layer"], *(w(row[key] or None) for _, key, w in COLUMNS)])
        if row["not_counted"] and row is not rows[-1]:
            notes[len(cells)] = row
            cells.append([row["layer"], *[""] * len(COLUMNS)])
    names = max(len(row[0]) for row in cells)
    lines = table.aligned(cells).splitlines()
    for at, row in notes.items():  # not in a column, which would get as wide
        name = row["layer"].ljust(names)
        lines[at + 1] = f"{name}  not counted: {row['not_counted']}"
    return "\n".join(lines)


def comma_separated(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as CSV with plain numbers; shares lie in 0..1, and what is None is empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        )
    return buffer.getvalue()


def place(peak: memory.Memory) -> str:
    """The operation of the peak and its layer."""
    return f"{peak.operation} in {peak.layer}" if peak.layer else peak.operation


def where(peak: memory.Memory) -> list[str]:
    """Where the peak is, and what lies in memory there."""
    shapes = " + ".join("x".join(map(str, s)) or "1" for s in peak.shapes)
    return [
        f"peak memory     {units.size(peak.bytes)} of activations, at {place(peak)}: {shapes}"
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
