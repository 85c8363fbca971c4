"""Prints what the config's network costs, layer by layer, before anything is trained, and writes it as CSV and PNG."""

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

from squeeze_jax import files, tree
from squeeze_jax.cost import count, layers, memory, program
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _profile, _settings, _workdir, export
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.methods import METHODS
from squeeze_jax.ranges import Bits, Count, Whole
from squeeze_jax.report import costs, table, units
from squeeze_jax.train import forward

RUN = "ignores"  # a config is enough
BUSY = 0.5  # spread of latencies, above which they say little


@dataclasses.dataclass(frozen=True)
class Settings:
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

    weight_bits: Bits | tuple[tuple[str, Bits], ...] = 8
    activation_bits: Bits = 8
    latency: bool = False
    runs: Count = 100
    warmup: Whole = 10
    batch: Count = 1
    cores: Count | None = None


def check(settings: Settings, built: Built) -> None:
    """Raises a UserError where bits are out of range or a rule fits no parameter."""
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


# heading, key of a row, how its value is written
COLUMNS = (
    ("parameters", "parameters", units.count),
    ("MACs", "macs", units.count),
    ("share", "share", _share),
    ("BOPS", "bops", units.count),
    ("bytes moved", "bytes_moved", units.size),
    ("MACs/byte", "macs_per_byte", lambda n: "-" if n is None else f"{n:.3g}"),
    ("live", "live_bytes", units.size),
)
MEASURED = (  # where the config asks for it
    ("latency, ms", "latency_ms", lambda ms: "-" if ms is None else f"{ms:.4f}"),
    ("share", "latency_share", _share),
)


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints a row a layer, totals, and the peak memory of activations, of one example.

    With `config.cost.latency` also what time each layer takes, measured. Writes the rows to `cost.csv` and `cost.png` in
    the work directory, and nothing else: whether it holds a run, and which, stays as it is.

    Raises:
      UserError: files are given, there are several processes, the work directory cannot be written to, or the latency
        cannot be measured as the config asks.
    """
    if inputs:
        raise UserError(f"the job cost takes no files: {inputs[0]}")
    export.alone("cost")
    settings, name = _settings.of(built, Settings), built.options["name"]
    _profile.check_cores(settings.cores)
    model = built.model
    example = built.data.example()
    with as_run(built):
        found = layers.layers(
            model,
            example,
            weight_bits=settings.weight_bits,
            activation_bits=settings.activation_bits,
        )
        peak = memory.peak(model, example, bits=settings.activation_bits)
        uncounted = unknown(model, example)
        places = [*where(peak), *elsewhere(model, example)]
    measured = None
    if settings.latency:
        print(f"measuring  {settings.runs} runs of {name}, compiled first", flush=True)
        measured = _profile.run(built, settings)
    listed = rows(found, peak, uncounted, measured)
    title = f"{name}, one {built.data.noun} of {sizes(example)}"
    live = "live: the most bytes of activations"
    print(f"{title}, {bits(settings)}; {live}\n\n{text(listed)}\n")
    lines = [*places, *methods(built, settings)]
    caption = f"{bits(settings)} · peak at {place(peak)}"
    if measured:
        whole, parts = timing(measured, settings, built.data.noun)
        lines += [f"latency         {whole}", f"by layer        {parts}"]
        caption += f" · latency {whole} · by layer {parts}"
    print("\n".join(lines))
    data, drawn = workdir / "cost.csv", workdir / "cost.png"
    with _workdir.writable(workdir):
        files.write(data, comma_separated(listed))
        costs.write(drawn, listed, title=title, caption=caption)
    print(f"written         {data} and {drawn}")


def as_run(built: Built) -> contextlib.AbstractContextManager:
    """Adds to the module what `config.forward` computes in it, except what integer files do by themselves."""
    forwards = {k: f for k, f in built.network.forwards.items() if not f.integer}
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _owned(built))
    return forward.intercepted(built.network._replace(forwards=forwards), zeros)


def _owned(built):
    """The shapes of what methods own, as variables of a network."""
    state = built.abstract()
    own = state.params.get(METHODS, {})
    return {"params": {METHODS: own}, "extra": state.extra or {}}


def methods(built: Built, settings: Settings) -> list[str]:
    """How the methods of `config.forward` count."""
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


def bits(settings: Settings) -> str:
    """The bits that are counted for."""
    weights, activations = settings.weight_bits, f"{settings.activation_bits} bits"
    if not isinstance(weights, int):
        return f"weights of bits by rules, activations of {activations}"
    if weights == settings.activation_bits:
        return f"weights and activations of {activations}"
    return f"weights of {weights} bits, activations of {activations}"


def sizes(example) -> str:
    """The size of an example, such as "16x16x3", or "128 tokens"."""
    if isinstance(example, Mapping):
        return f"{example['tokens'].shape[-1]} tokens"
    return "x".join(map(str, example.shape[1:]))


def timing(
    measured: _profile.Measured, settings: Settings, noun: str = "image"
) -> tuple[str, str]:
    """The latency of the whole and how it was measured, and what the parts by layer are."""
    ms = units.milliseconds
    p50, p90, p99 = (ms(measured.latency[k]) for k in ("p50", "p90", "p99"))
    spread = measured.latency["spread"]
    busy = ", so the machine was busy" if spread > BUSY else ""
    images = f"{settings.batch} {noun}{'s' if settings.batch > 1 else ''}"
    whole = f"p50 {p50}, p90 {p90}, p99 {p99}, spread {spread:.2f}{busy}: {settings.runs} runs of {images} in float32"
    layered = sum(measured.by_layer.values())
    parts = (
        f"a run took {ms(measured.traced_ms)} while it was recorded: {ms(layered)} in layers;"
        f" elsewhere {ms(measured.unnamed_ms)} in operations of no layer, {ms(measured.idle_ms)} while none ran"
    )
    return f"{whole} on {measured.device}", parts


def unknown(model, example) -> dict[str, list[str]]:
    """{layer: what of it is not counted}."""
    found, root = {}, program.root(model)
    for each in count.macs(model, example).unknown:
        what, _, layer = each.rpartition(" in ")
        what = re.sub("^while loop, .*", "while beyond one iteration", what)
        found.setdefault(layer.removeprefix(f"{root}/"), []).append(what)
    return found


def rows(
    found: Sequence[layers.Layer],
    peak: memory.Memory,
    unknown: Mapping[str, Sequence[str]],
    measured: _profile.Measured | None = None,
) -> list[dict[str, Any]]:
    """A row a layer, in order of use, and last the total; keys are those of COLUMNS, layer and not_counted.

    Bytes live, MACs a byte and the share are None where there is nothing that they could be of. Where latency was
    measured, rows have the keys of MEASURED too, and there is one more for the time that no layer took.
    """
    known = {row.name: row for row in found}
    total = layers.total(tuple(found))
    times = dict(measured.by_layer) if measured else {}
    names = dict.fromkeys([*peak.by_layer, *known, *unknown, *times])
    lines = [
        (known.get(name, layers.Layer(name)), peak.by_layer.get(name), whats)
        for name in names
        for whats in [unknown.get(name, ())]
    ]
    if measured:
        lines.append((layers.Layer(costs.ELSEWHERE), None, ()))
        times[costs.ELSEWHERE] = measured.unnamed_ms + measured.idle_ms
        times[total.name] = measured.traced_ms
    every = dict.fromkeys(what for whats in unknown.values() for what in whats)
    lines.append((total, peak.bytes, every))
    made = [
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
    if measured:
        for row in made:
            row["latency_ms"] = times.get(row["layer"], 0.0)
            row["latency_share"] = row["latency_ms"] / measured.traced_ms
    return made


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, whose last row is the total; what a layer has none of is `-`, what is not counted a row below it."""
    columns = [*COLUMNS, *(MEASURED if "latency_ms" in rows[-1] else ())]
    headings = ["layer", *(heading for heading, _, _ in columns)]
    cells, notes = [headings], {}
    for row in rows:
        cells.append([row["layer"], *(w(row[key] or None) for _, key, w in columns)])
        if row["not_counted"] and row is not rows[-1]:
            notes[len(cells)] = row
            cells.append([row["layer"], *[""] * len(columns)])
    names = max(len(row[0]) for row in cells)
    lines = table.align(cells).splitlines()
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


def elsewhere(model, example) -> list[str]:
    """The same in float32, and what XLA plans for this machine."""
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
