"""Describes a run before it starts: data, model, devices, training steps and methods."""

import pathlib
from collections.abc import Mapping

import jax

from squeeze_jax import tree
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.train import forward, sharding


def plan(built: Built, workdir: pathlib.Path) -> str:
    """Returns the description of a run, one line for each part.

    Args:
      built: the experiment in one of its phases.
      workdir: the run's work directory.
    """
    e, data, mesh = built.experiment, built.data, built.mesh
    shapes = built.abstract()
    params = forward.parameters(shapes.params)
    variant = f" {built.options['variant']}" if "variant" in built.options else ""
    devices = jax.devices()
    examples_per_device = e.batch // sharding.batch_shards(mesh)
    epochs = e.steps * e.batch / data.num_train
    optimizer = f"{e.optim.get('name', 'sgd')}, lr {e.optim['lr']:g} {e.optim.get('schedule', 'cosine')}"
    rows = {
        "work dir": str(workdir),
        "data": "\n           ".join([data.describe, *_data_notes(built)]),
        "model": f"{built.options['name']}{variant}: {tree.size(params):,} parameters, {built.count_macs():,} MACs per {data.noun}",
        "mesh": f"{len(devices)} x {devices[0].device_kind}: "
        + " x ".join(f"{k} {v}" for k, v in mesh.shape.items()),
        "batch": f"{e.batch} = {examples_per_device} a device"
        + (f", in {e.accumulate} parts" if e.accumulate > 1 else ""),
        "training": f"{e.steps:,} steps ({epochs:.1f} epochs), {optimizer}, {e.dtype}",
    }
    if built.phase.label:
        last_step = built.phase.end
        rows["phase"] = (
            f"{built.phase.label}: to step {last_step:,} of {built.whole.steps:,}"
        )
    if e.objective is not None:
        rows["objective"] = " + ".join(
            f"{term.weight:g} {term.name}" if term.weight != 1 else term.name
            for term in built.objective.terms
        )
    if methods := _method_names(e):
        rows["methods"] = methods
    if warning := _unfinished_schedules(built):
        rows["warning"] = warning
    if built.init_network is not None:
        rows["begins with"] = built.init_network.description
    if built.teachers:
        rows["learns from"] = ", ".join(teacher.location for teacher in built.teachers)
    return "\n".join(f"{k:<10} {v}" for k, v in rows.items())


def _data_notes(built: Built) -> list[str]:
    """Returns notes on the data: files left out, changed sizes and channels, and classes without examples."""
    notes = list(getattr(built.data, "notes", ()))
    classes, names = built.options.get("num_classes"), built.data.label_names
    if names and isinstance(classes, int) and classes > len(names):
        notes.append(
            f"the network has {classes:,} classes: {classes - len(names):,} have no examples"
        )
    return notes


def _method_names(e) -> str:
    """Returns the methods of each plug point by their names in the config; "" if there are none."""
    listed = []
    for plug_point in ("update", "forward", "gradients", "exchange"):
        sections = getattr(e, plug_point) or ()
        sections = (sections,) if isinstance(sections, Mapping) else sections
        names = [s["name"] for s in sections if isinstance(s, Mapping)]
        listed += [f"{plug_point} {', '.join(names)}"] if names else []
    return " · ".join(listed)


def _unfinished_schedules(built: Built) -> str:
    """Returns a warning if the run ends before the schedules of some methods have taken full effect; otherwise ""."""
    steps, plugs = built.experiment.steps, built.plugs
    scheduled = {"config.update": plugs.update, **plugs.forwards}
    late = [f"{k} at step {m.until}" for k, m in scheduled.items() if m.until >= steps]
    if not late or built.phase.end < built.whole.steps:
        return ""
    return f"the run ends after {steps} steps, before schedules of methods take full effect: {', '.join(late)}"


def describe_memory(compiled) -> str:
    """Returns XLA's estimate of the memory that a compiled training step needs on each device, in MiB."""
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
