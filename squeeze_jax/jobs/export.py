"""Exports the trained network to files for devices; each runs again and must agree with the live model."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from squeeze_jax import export, files
from squeeze_jax.errors import UserError
from squeeze_jax.export.runnable import named
from squeeze_jax.jobs import evaluate
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.nn.conv import lowering
from squeeze_jax.report import units
from squeeze_jax.train.state import State


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Writes the files of `config.export.formats` to `workdir/export` and prints how closely each agrees.

    Raises:
      UserError: there is no checkpoint, or several processes.
      export.Disagreement: a file does not compute what the live model computes.
    """
    if inputs:
        raise UserError(f"the job export takes no files: {inputs[0]}")
    alone("export")
    state = evaluate.trained(built, workdir)
    check = examples(built, built.data.eval(built.export.check), built.export.check)
    training = built.data.train(built.experiment.batch, built.experiment.seed)
    calibration = examples(built, training, built.export.calibration)
    for key in built.export.formats:
        (file,) = export.make(
            live(built, state),
            built.data.exported,
            workdir / "export",
            formats=(key,),
            calibration=calibration,
            check=check,
            endpoints_fn=live(built, state, endpoints=True),
            tolerance=built.export.tolerance,
            int8_agreement=built.export.int8_agreement,
        )
        note(workdir, file, int(state.step))
        print(
            f"exported   {file.path} · {units.size(file.bytes)} · largest difference {file.max_difference:.2g} ·"
            f" agreement {file.agreement:.1%}",
            flush=True,
        )


def live(built: Built, state: State, *, endpoints: bool = False):
    """The trained network as it is exported: {name of `data.exported`: [b, ...]} → logits, or its named stages.

    Its convolutions are the native operations whatever the training used, and its weights are on the host.
    """
    variables = host_variables(built, state)

    def fn(batch):
        with lowering("native"):
            logits, stages = built.model.apply(
                variables, built.data.inputs(batch), train=False
            )
        return stages | named(logits) if endpoints else logits

    return fn


def host_variables(built: Built, state: State) -> dict:
    """The trained network's variables as they are computed with, numpy."""
    variables = jax.device_get(state.variables())
    for reparametrize in built.weights:
        variables["params"] = jax.device_get(reparametrize(variables["params"]))
    return variables


def note(workdir: pathlib.Path, file: export.Exported, step: int) -> None:
    """Adds a file to `export/files.json`: of which step it is, and how closely it agrees."""
    path = workdir / "export" / "files.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[file.format] = dataclasses.asdict(file) | {
        "path": file.path.name,
        "step": step,
    }
    files.write(path, json.dumps(known, indent=2) + "\n")


def find(
    workdir: pathlib.Path, formats: Sequence[str], step: int
) -> list[pathlib.Path]:
    """The exported files of these formats.

    Raises:
      UserError: one is missing, or of another step than the trained network.
    """
    path = workdir / "export" / "files.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    again = f"run --job=export --workdir={workdir} first"
    for key in formats:
        if key not in known or not (path.parent / known[key]["path"]).exists():
            raise UserError(
                f"no exported file of format {key} in {path.parent}; {again}"
            )
        if known[key]["step"] != step:
            raise UserError(
                f"{path.parent / known[key]['path']} is of step {known[key]['step']}, the trained network of step {step};"
                f" {again}"
            )
    return [path.parent / known[key]["path"] for key in formats]


def examples(built: Built, batches, count: int) -> dict[str, np.ndarray]:
    """What an exported file takes of the first `count` examples of a stream that are no padding."""
    taken, have = [], 0
    for batch in batches:
        taken.append(taken_by_file(built, batch))
        have += int(batch["mask"].sum())
        if have >= count:
            break
    return {k: np.concatenate([t[k] for t in taken])[:count] for k in taken[0]}


def taken_by_file(built: Built, batch) -> dict[str, np.ndarray]:
    """What an exported file takes of a batch's examples: shorter sequences are padded, with what nobody attends to."""
    found = {}
    for name, spec in built.data.exported.items():
        rows = batch[name][batch["mask"]]
        pads = [(0, n - m) for n, m in zip(spec.shape, rows.shape[1:], strict=True)]
        found[name] = np.pad(rows, [(0, 0), *pads])
    return found


def alone(job: str) -> None:
    """Raises a UserError in one of several processes: files are made and measured by one."""
    if jax.process_count() > 1:
        raise UserError(
            f"the job {job} runs in one process; leave out --coordinator and --processes"
        )
