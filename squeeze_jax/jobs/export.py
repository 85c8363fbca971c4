"""Exports the trained network to files for devices; each runs again and must agree with the live model."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np

from squeeze_jax import export, registry, stop
from squeeze_jax.errors import Reported, UserError
from squeeze_jax.export import listing, process
from squeeze_jax.export.runnable import load_format, name_outputs
from squeeze_jax.jobs import _settings, evaluate
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.ranges import Count, Distinct, Positive, Share
from squeeze_jax.report import units
from squeeze_jax.train import forward
from squeeze_jax.train.state import State

EXAMPLES = False  # of the data are needed by integer formats alone


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.export`.

    Attributes:
      formats: names of files in `export/formats`.
      calibration: training examples that the ranges of integer formats are measured on.
      check: test examples on which each file must agree with the live model.
      tolerance: largest difference of a float file's logits, relative to the largest logit.
      int8_agreement: share of check examples whose top class an integer file must share, 0..1.
    """

    formats: Annotated[tuple[str, ...], Distinct()] = (
        "stablehlo",
        "tflite",
        "tflite_int8",
    )
    calibration: Count = 256
    check: Count = 128
    tolerance: Positive = 1e-4
    int8_agreement: Share = 0.95


def check(settings: Settings, built: Built) -> None:
    """Raises a UserError for an unknown format."""
    del built
    for key in settings.formats:
        registry.load("squeeze_jax.export.formats", key, "export format")


class Rejected(Reported):
    """Some files were rejected, the others are written."""

    status = 4


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Writes the files of `config.export.formats` to `workdir/export` and prints how closely each agrees.

    Raises:
      UserError: there is no checkpoint, or several processes.
      Rejected: a file does not compute what the live model computes, or could not be made; the others are written.
    """
    if inputs:
        raise UserError(f"the job export takes no files: {inputs[0]}")
    report(write(built, workdir))


def report(rejected: Sequence[str]) -> None:
    """Raises `Rejected` where a format was rejected."""
    if rejected:
        raise Rejected(
            f"{', '.join(rejected)} rejected, see above; the other files are written"
        )


def write(built: Built, workdir: pathlib.Path) -> list[str]:
    """Writes the files, see `run`; returns the formats that were rejected."""
    alone("export")
    state = evaluate.trained(built, workdir)
    settings = _settings.of(built, Settings)
    check = examples(built, built.data.eval(settings.check), settings.check)
    training = built.data.train(built.experiment.batch, built.experiment.seed)
    calibration = examples(built, training, settings.calibration)
    _check_calibration(built, settings)
    folder, step, rejected = workdir / "export", int(state.step), []
    for key in settings.formats:
        stop.check()
        integer = load_format(key).INTEGER
        try:
            (file,) = export.make(
                live(built, state, integer=integer),
                built.data.exported,
                folder,
                formats=(key,),
                ranges=getattr(built.data, "ranges", None),
                calibration=calibration,
                check=check,
                endpoints_fn=live(built, state, endpoints=True, integer=integer),
                tolerance=settings.tolerance,
                int8_agreement=settings.int8_agreement,
                agreement=built.metric.agreement,
                classes=built.data.label_names,
            )
        except (export.Disagreement, process.Crash) as error:
            print(f"rejected   {error}", flush=True)
            listing.record(folder, key, {"step": step, "rejected": str(error)})
            rejected.append(key)
            continue
        entry = dataclasses.asdict(file) | {"path": file.path.name, "step": step}
        entry["classes"] = list(built.data.label_names)
        listing.record(folder, key, entry, file.path)
        print(
            f"exported   {file.path} · {units.size(file.bytes)} · largest difference {file.max_difference:.2g} ·"
            f" agreement {file.agreement:.1%}",
            flush=True,
        )
    return rejected


def _check_calibration(built: Built, settings: Settings) -> None:
    """Raises a UserError for an integer format where noise stands in for the images, see `data/sources/absent.py`."""
    if built.experiment.data.get("source", {}).get("name") != "absent":
        return
    for key in settings.formats:
        if load_format(key).INTEGER:
            raise UserError(
                f"the format {key} needs the run's images, to measure ranges and to compare answers: restore them, or leave"
                " the format out of config.export.formats"
            )


def live(built: Built, state: State, *, endpoints: bool = False, integer: bool = False):
    """The trained network as it is exported: {name of `data.exported`: [b, ...]} → logits, or its named stages.

    Its weights are on the host.

    Args:
      built, state: the experiment and the trained network.
      endpoints: the stages instead of the logits.
      integer: for files of integers, which round activations by themselves.
    """
    network, variables = on_host(built, state)
    if integer:
        kept = {k: f for k, f in network.forwards.items() if not f.integer}
        network = network._replace(forwards=kept)

    def fn(batch):
        (logits, stages), _ = forward.run(network, variables, built.data.inputs(batch))
        return stages | name_outputs(logits) if endpoints else logits

    return fn


def on_host(built: Built, state: State) -> tuple[forward.Network, dict]:
    """Returns the trained network with its weights as it runs with them: numpy, float32 whatever the training used."""
    network = built.network._replace(dtype="float32")
    network, variables = forward.folded(network, jax.device_get(state.variables()))
    return network, jax.device_get(variables)


def find(
    workdir: pathlib.Path, formats: Sequence[str], step: int
) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Returns the exported files of these formats, and why the others were rejected, by format.

    Raises:
      UserError: one is missing, damaged, or of another step than the trained network.
    """
    folder = workdir / "export"
    known, paths, rejected = listing.read(folder), [], {}
    again = f"run --job=export --workdir={workdir} first"
    if known is None:
        raise UserError(f"{folder / listing.NAME} is damaged; {again}")
    for key in formats:
        entry = known.get(key, {})
        if entry.get("step") == step and "rejected" in entry:
            rejected[key] = entry["rejected"]
            continue
        if "path" not in entry or not (folder / entry["path"]).exists():
            raise UserError(f"no exported file of format {key} in {folder}; {again}")
        path = folder / entry["path"]
        if entry["step"] != step:
            raise UserError(
                f"{path} is of step {entry['step']}, the trained network of step {step}; {again}"
            )
        listing.verify(path)
        paths.append(path)
    return paths, rejected


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
