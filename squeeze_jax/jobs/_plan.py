"""The lines that tell what a run is about to do, before it does it."""

import pathlib
from collections.abc import Mapping

import jax

from squeeze_jax import tree
from squeeze_jax.cost import count
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import forward, sharding


def plan(built: Built, workdir: pathlib.Path) -> str:
    """Describes what the run will do, one line for each part."""
    e, data, mesh = built.experiment, built.data, built.mesh
    shapes = built.abstract()
    params = forward.parameters(shapes.params)
    macs = count.macs(
        lambda v, x: forward.run(built.network, v, x)[0][0],
        shapes.variables(),
        data.example(),
    ).total
    variant = f" {built.options['variant']}" if "variant" in built.options else ""
    devices = jax.devices()
    local = e.batch // sharding.batch_shards(mesh)
    epochs = e.steps * e.batch / data.num_train
    optimizer = f"{e.optim.get('name', 'sgd')}, lr {e.optim['lr']:g} {e.optim.get('schedule', 'cosine')}"
    rows = {
        "work dir": str(workdir),
        "data": "\n           ".join([data.describe, *_notes(built)]),
        "model": f"{built.options['name']}{variant}: {tree.size(params):,} parameters, {macs:,} MACs per {data.noun}",
        "mesh": f"{len(devices)} x {devices[0].device_kind}: "
        + " x ".join(f"{k} {v}" for k, v in mesh.shape.items()),
        "batch": f"{e.batch} = {local} a device"
        + (f", in {e.accumulate} parts" if e.accumulate > 1 else ""),
        "training": f"{e.steps:,} steps ({epochs:.1f} epochs), {optimizer}, {e.dtype}",
    }
    if built.phase.label:
        last = built.phase.end
        rows["phase"] = (
            f"{built.phase.label}: to step {last:,} of {built.whole.steps:,}"
        )
    if e.objective is not None:
        rows["objective"] = " + ".join(
            f"{part.weight:g} {part.name}" if part.weight != 1 else part.name
            for part in built.objective.terms
        )
    if used := _methods(e):
        rows["methods"] = used
    if late := _late(built):
        rows["warning"] = late
    if built.begin is not None:
        rows["begins with"] = built.begin.described
    if built.teachers:
        rows["learns from"] = ", ".join(where for _, _, where in built.teachers)
    return "\n".join(f"{k:<10} {v}" for k, v in rows.items())


def _notes(built: Built) -> list[str]:
    """Lists what happens to the data's files, sizes, channels and classes where it changes them."""
    notes = list(getattr(built.data, "notes", ()))
    classes, names = built.options.get("num_classes"), built.data.label_names
    if names and isinstance(classes, int) and classes > len(names):
        notes.append(
            f"the network has {classes:,} classes: {classes - len(names):,} have no examples"
        )
    return notes


def _methods(e) -> str:
    """Lists the methods of the plug points by the names in the config."""
    named = []
    for plug in ("update", "forward", "gradients", "exchange"):
        sections = getattr(e, plug) or ()
        sections = (sections,) if isinstance(sections, Mapping) else sections
        names = [s["name"] for s in sections if isinstance(s, Mapping)]
        named += [f"{plug} {', '.join(names)}"] if names else []
    return " · ".join(named)


def _late(built: Built) -> str:
    """Names the methods whose schedules reach beyond the end of the phase."""
    steps, plugs = built.experiment.steps, built.plugs
    scheduled = {"config.update": plugs.update, **plugs.forwards}
    late = [f"{k} at step {m.until}" for k, m in scheduled.items() if m.until >= steps]
    if not late or built.phase.end < built.whole.steps:
        return ""
    return f"the run ends after {steps} steps, before schedules of methods take full effect: {', '.join(late)}"


def memory(compiled) -> str:
    """XLA's own estimate of what the compiled step holds on each device."""
    if not hasattr(compiled, "memory_analysis"):
        return "not known: the gradients are compiled in pieces"
    analysis = compiled.memory_analysis()
    if analysis is None:
        return "not known on this backend"
    arguments, temporary = analysis.argument_size_in_bytes, analysis.temp_size_in_bytes
    total = (
        arguments
        + temporary
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
    ) / 2**20
    return f"{total:,.0f} MiB a device: state and batch {arguments / 2**20:,.0f}, intermediate {temporary / 2**20:,.0f}"
