"""Prints the costs of the config's network, layer by layer, without training it.

The job also writes the costs as CSV and PNG.
"""

import contextlib
import csv
import dataclasses
import io
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from squeeze_jax import files, stop, tree
from squeeze_jax.cost import count, layers, memory, program
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _profile, _settings, _workdir, export
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.methods import METHODS
from squeeze_jax.ranges import Bits, Count, Runs, Warmups
from squeeze_jax.report import costs, table, units
from squeeze_jax.train import forward

RUN = "ignores"  # the job needs a config only
MAX_SPREAD = 0.5  # of latencies; a larger spread shows that the machine was busy


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.cost`.

    Attributes:
      weight_bits: bits of each weight, in [1, 64]; or rules (regular expression, bits) over parameter names, of which the
        first match counts; weights that match no rule have 32 bits.
      activation_bits: bits of each activation, in [1, 64].
      latency: whether to run the network and measure the latency of each layer.
      runs: number of timed runs; 1 to 1,000,000.
      warmup: number of untimed runs before them; 0 to 1,000,000.
      batch: examples in each of these runs, at least 1; all other costs are for one example.
      cores: number of CPU cores to use for these runs, in a new process; None runs them on JAX's default device, and on a
        CPU on all cores.
    """

    weight_bits: Bits | tuple[tuple[str, Bits], ...] = 8
    activation_bits: Bits = 8
    latency: bool = False
    runs: Runs = 100
    warmup: Warmups = 10
    batch: Count = 1
    cores: Count | None = None


def check(settings: Settings, built: Built) -> None:
    """Raises a UserError if bits are out of range or a rule matches no parameter."""
    program.check_bits(settings.activation_bits, "config.cost.activation_bits")
    where = "config.cost.weight_bits"
    if isinstance(settings.weight_bits, int):
        program.check_bits(settings.weight_bits, where)
        return
    params = forward.parameters(built.abstract().params)
    tree.apply_rules(settings.weight_bits, params, where=where)
    for pattern, bits in settings.weight_bits:
        program.check_bits(bits, f"{where} of {pattern!r}")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


# (heading of the printed table, key of a row, function that formats the value)
COLUMNS = (
    ("parameters", "parameters", units.count),
    ("MACs", "macs", units.count),
    ("share", "share", _share),
    ("BOPS", "bops", units.count),
    ("bytes moved", "bytes_moved", units.size),
    ("MACs/byte", "macs_per_byte", lambda n: "-" if n is None else f"{n:.3g}"),
    ("live", "live_bytes", units.size),
)
LATENCY_COLUMNS = (  # only with config.cost.latency
    ("latency, ms", "latency_ms", lambda ms: "-" if ms is None else f"{ms:.4f}"),
    ("share", "latency_share", _share),
)


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints one row per layer, the totals, and the peak memory of activations, for one example.

    With `config.cost.latency` it also measures the latency of each layer. It writes the rows to `cost.csv` and `cost.png` in
    the work directory and changes nothing else there.

    Raises:
      UserError: the command line names files, there are several processes, the work directory cannot be written to, or the
        latency cannot be measured as the config asks.
    """
    if inputs:
        raise UserError(f"the job cost takes no files: {inputs[0]}")
    export.check_single_process("cost")
    settings, name = _settings.job_settings(built, Settings), built.options["name"]
    _profile.check_cores(settings.cores)
    model = built.model
    example = built.data.example()
    with forward_methods_active(built):
        layer_costs = layers.layers(
            model,
            example,
            weight_bits=settings.weight_bits,
            activation_bits=settings.activation_bits,
        )
        stop.check()
        peak = memory.peak(model, example, bits=settings.activation_bits)
        uncounted = uncounted_operations(model, example)
        lines = [describe_peak(peak), *other_memory(model, example)]
    stop.check()
    measured = None
    if settings.latency:
        print(f"measuring  {settings.runs} runs of {name}, compiled first", flush=True)
        measured = _profile.measure(built, settings)
    rows = cost_rows(layer_costs, peak, uncounted, measured)
    title = f"{name}, one {built.data.noun} of {example_size(example)}"
    bits = describe_bits(settings)
    live = "live: the most bytes of activations"
    print(f"{title}, {bits}; {live}\n\n{format_table(rows)}\n")
    lines += describe_methods(built, settings)
    caption = f"{bits} · peak at {peak_place(peak)}"
    if measured:
        whole, parts = describe_latency(measured, settings, built.data.noun)
        lines += [f"latency         {whole}", f"by layer        {parts}"]
        caption += f" · latency {whole} · by layer {parts}"
    print("\n".join(lines))
    stop.check()
    csv_file, picture = workdir / "cost.csv", workdir / "cost.png"
    with _workdir.writable(workdir):
        files.write(csv_file, to_csv(rows))
        costs.write(picture, rows, title=title, caption=caption)
    print(f"written         {csv_file} and {picture}")


def forward_methods_active(built: Built) -> contextlib.AbstractContextManager:
    """Returns a context in which the module includes the computation of the methods of `config.forward`.

    Methods that integer files replace by their own rounding, such as quantization-aware training, are left out.
    """
    forwards = {k: f for k, f in built.network.forwards.items() if not f.integer}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _method_shapes(built))
    return forward.applying_interceptions(
        built.network._replace(forwards=forwards), zeros
    )


def _method_shapes(built):
    """Returns the shapes of the parameters and state that methods own, as variables for `forward.run`."""
    state = built.abstract()
    own = state.params.get(METHODS, {})
    return {"params": {METHODS: own}, "extra": state.extra or {}}


def describe_methods(built: Built, settings: Settings) -> list[str]:
    """Returns lines that tell which methods of `config.forward` are included in the costs and which are not."""
    counted = [n for n, f in built.network.forwards.items() if not f.integer]
    inside = [n for n in counted if built.network.forwards[n].intercept]
    lines = []
    if inside:
        lines.append(f"config.forward  {', '.join(inside)}: counted in its layers")
        if settings.latency:
            lines.append(f"                the latency is without {', '.join(inside)}")
    free = [n for n in built.network.forwards if n not in inside]
    if free:
        lines.append(
            f"config.forward  {', '.join(free)}: not counted, an exported file has it in its weights"
        )
    return lines


def describe_bits(settings: Settings) -> str:
    """Returns the bits of weights and activations in words."""
    weights, activations = settings.weight_bits, f"{settings.activation_bits} bits"
    if not isinstance(weights, int):
        return f"weights of bits by rules, activations of {activations}"
    if weights == settings.activation_bits:
        return f"weights and activations of {activations}"
    return f"weights of {weights} bits, activations of {activations}"


def example_size(example) -> str:
    """Returns the size of one example, such as "16x16x3" or "128 tokens"."""
    if isinstance(example, Mapping):
        return f"{example['tokens'].shape[-1]} tokens"
    return "x".join(map(str, example.shape[1:]))


def describe_latency(
    measured: _profile.Measurement, settings: Settings, noun: str = "image"
) -> tuple[str, str]:
    """Returns two phrases: the latency of the whole network and how it was measured; and its division among the layers.

    Args:
      measured: the measurement.
      settings: of this job.
      noun: what one example is called.
    """
    ms = units.milliseconds
    p50, p90, p99 = (ms(measured.latency[k]) for k in ("p50", "p90", "p99"))
    spread = measured.latency["spread"]
    busy = ", so the machine was busy" if spread > MAX_SPREAD else ""
    images = f"{settings.batch} {noun}{'s' if settings.batch > 1 else ''}"
    whole = f"p50 {p50}, p90 {p90}, p99 {p99}, spread {spread:.2f}{busy}: {settings.runs} runs of {images} in float32"
    layered = sum(measured.by_layer.values())
    parts = (
        f"a run took {ms(measured.traced_ms)} while it was recorded: {ms(layered)} in layers;"
        f" elsewhere {ms(measured.unnamed_ms)} in operations of no layer, {ms(measured.idle_ms)} while none ran"
    )
    return f"{whole} on {measured.device}", parts


def uncounted_operations(model, example) -> dict[str, list[str]]:
    """Returns {layer: names of its operations whose MACs are not counted}."""
    uncounted, root = {}, program.root(model)
    for description in count.macs(model, example).unknown:
        operation, _, layer = description.rpartition(" in ")
        operation = re.sub("^while loop, .*", "while beyond one iteration", operation)
        uncounted.setdefault(layer.removeprefix(f"{root}/"), []).append(operation)
    return uncounted


def cost_rows(
    layer_costs: Sequence[layers.Layer],
    peak: memory.Memory,
    uncounted: Mapping[str, Sequence[str]],
    measured: _profile.Measurement | None = None,
) -> list[dict[str, Any]]:
    """Returns one row per layer in order of use, and the total as the last row.

    Args:
      layer_costs: the costs of each layer.
      peak: the memory of activations.
      uncounted: see `uncounted_operations`.
      measured: the measured latency; adds the keys of LATENCY_COLUMNS, and a row for the time outside all layers.

    Returns:
      Dicts with the keys of COLUMNS, "layer" and "not_counted". "live_bytes", "macs_per_byte" and "share" are None if there
      is no memory, no byte or no MAC to relate them to.
    """
    costs_by_layer = {row.name: row for row in layer_costs}
    total = layers.total(tuple(layer_costs))
    times = dict(measured.by_layer) if measured else {}
    names = dict.fromkeys([*peak.by_layer, *costs_by_layer, *uncounted, *times])
    lines = [
        (
            costs_by_layer.get(name, layers.Layer(name)),
            peak.by_layer.get(name),
            uncounted.get(name, ()),
        )
        for name in names
    ]
    if measured:
        lines.append((layers.Layer(costs.ELSEWHERE), None, ()))
        times[costs.ELSEWHERE] = measured.unnamed_ms + measured.idle_ms
        times[total.name] = measured.traced_ms
    all_uncounted = dict.fromkeys(
        operation for operations in uncounted.values() for operation in operations
    )
    lines.append((total, peak.bytes, all_uncounted))
    rows = [
        {
            "layer": row.name,
            "parameters": row.parameters,
            "macs": row.macs,
            "share": row.macs / total.macs if total.macs else None,
            "bops": row.bops,
            "bytes_moved": row.bytes,
            "macs_per_byte": row.intensity if row.bytes else None,
            "live_bytes": live,
            "not_counted": "; ".join(operations),
        }
        for row, live, operations in lines
    ]
    if measured:
        for row in rows:
            row["latency_ms"] = times.get(row["layer"], 0.0)
            row["latency_share"] = row["latency_ms"] / measured.traced_ms
    return rows


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as a table of text.

    A value of 0 or None is written as "-". Operations that are not counted follow below their layer's row.

    Args:
      rows: of `cost_rows`.
    """
    columns = [*COLUMNS, *(LATENCY_COLUMNS if "latency_ms" in rows[-1] else ())]
    headings = ["layer", *(heading for heading, _, _ in columns)]
    cells, notes = [headings], {}
    for row in rows:
        values = (write(row[key] or None) for _, key, write in columns)
        cells.append([row["layer"], *values])
        if row["not_counted"] and row is not rows[-1]:
            notes[len(cells)] = row
            cells.append([row["layer"], *[""] * len(columns)])
    name_width = max(len(row[0]) for row in cells)
    lines = table.align(cells).splitlines()
    for number, row in notes.items():  # outside the columns, which would get as wide
        name = row["layer"].ljust(name_width)
        lines[number + 1] = f"{name}  not counted: {row['not_counted']}"
    return "\n".join(lines)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as CSV with plain numbers; shares lie in [0, 1], and None is an empty cell."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        )
    return buffer.getvalue()


def peak_place(peak: memory.Memory) -> str:
    """Returns the operation at which memory is largest, with its layer."""
    return f"{peak.operation} in {peak.layer}" if peak.layer else peak.operation


def describe_peak(peak: memory.Memory) -> str:
    """Returns a line about the peak memory of activations: its bytes, its operation and the shapes in memory there."""
    shapes = " + ".join("x".join(map(str, s)) or "1" for s in peak.shapes)
    return f"peak memory     {units.size(peak.bytes)} of activations, at {peak_place(peak)}: {shapes}"


def other_memory(model, example) -> list[str]:
    """Returns lines about the peak memory in float32, and about the memory that XLA plans on this machine."""
    lines = [
        f"in float32      {units.size(memory.peak(model, example, bits=32).bytes)}"
    ]
    plan = memory.compiled(model, example)
    if plan is not None:
        whole = plan.inputs + plan.outputs + plan.temporary
        lines.append(
            f"XLA on {jax.default_backend():<9}{units.size(whole)} of inputs, results and temporary buffers"
        )
    return lines
