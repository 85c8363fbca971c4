"""Exports the trained network to files for devices, and checks that each agrees with the live model.

The live model is the trained network as JAX runs it.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np

from squeeze_jax import registry, stop
from squeeze_jax.errors import Reported, UserError
from squeeze_jax.export import build, listing, process
from squeeze_jax.export.runnable import load_format, name_outputs
from squeeze_jax.jobs import _classes, _settings, evaluate
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.ranges import Distinct, Part, Range, Share
from squeeze_jax.report import units
from squeeze_jax.train import forward
from squeeze_jax.train.state import State

EXAMPLES = False  # only integer formats need the data's examples


Examples = Annotated[int, Range(1, 100_000)]  # all of them are in memory at once


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.export`.

    Attributes:
      formats: the formats to write, each once: names of --list=formats.
      calibration: number of training examples for measuring the value ranges of integer formats; 1 to 100,000.
      check: number of test examples on which each file must agree with the live model; 1 to 100,000.
      tolerance: largest allowed difference between a float file's logits and the live model's, as a fraction of the
        largest logit; above 0.
      int8_agreement: smallest allowed fraction of the check examples on which an integer file predicts the live model's top
        class; in [0, 1].
    """

    formats: Annotated[tuple[str, ...], Distinct()] = (
        "stablehlo",
        "tflite",
        "tflite_int8",
    )
    calibration: Examples = 256
    check: Examples = 128
    tolerance: Part = 1e-4
    int8_agreement: Share = 0.95


def check(settings: Settings, built: Built) -> None:
    """Raises a UserError if `config.export.formats` names an unknown format."""
    del built
    for key in settings.formats:
        registry.load("squeeze_jax.export.formats", key, "export format")


class Rejected(Reported):
    """Some formats were rejected; the files of the others are written."""

    status = 4


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Writes the files of `config.export.formats` to `workdir/export`, and prints how closely each agrees.

    Raises:
      UserError: the command line names files, there is no checkpoint, or there are several processes.
      Rejected: a file does not agree with the live model, or cannot be made; the others are written.
    """
    if inputs:
        raise UserError(f"the job export takes no files: {inputs[0]}")
    raise_rejected(write_files(built, workdir))


def raise_rejected(rejected: Sequence[str]) -> None:
    """Raises `Rejected` if any format was rejected."""
    if rejected:
        raise Rejected(
            f"{', '.join(rejected)} rejected, see above; the other files are written"
        )


def write_files(built: Built, workdir: pathlib.Path) -> list[str]:
    """Writes the files, see `run`; returns the formats that were rejected."""
    check_single_process("export")
    state = evaluate.trained_state(built, workdir)
    settings = _settings.job_settings(built, Settings)
    check = check_examples(built, settings.check)
    training = built.data.train(built.experiment.batch, built.experiment.seed)
    calibration = collect_examples(built, training, settings.calibration)
    _check_calibration(built, settings)
    folder, step, rejected = workdir / "export", int(state.step), []
    outputs = built.options.get("num_classes")
    classes = _classes.output_names(built.data.label_names, outputs)

    @functools.cache
    def make_exporter(integer: bool) -> build.Exporter:
        return build.Exporter(
            inference_function(built, state, integer=integer),
            built.data.exported,
            ranges=getattr(built.data, "ranges", None),
            calibration=calibration,
            check=check,
            endpoints_fn=inference_function(
                built, state, endpoints=True, integer=integer
            ),
            tolerance=settings.tolerance,
            int8_agreement=settings.int8_agreement,
            agreement=built.metric.agreement,
            classes=classes,
        )

    has_rounding = any(f.integer for f in built.network.forwards.values())
    for key in settings.formats:
        stop.check()
        # Only methods that round activations make the function of an integer file another one.
        exporter = make_exporter(has_rounding and load_format(key).INTEGER)
        try:
            file = exporter.write(key, folder)
        except (build.Disagreement, process.Crash) as error:
            print(f"rejected   {error}", flush=True)
            listing.record(folder, key, {"step": step, "rejected": str(error)})
            rejected.append(key)
            continue
        entry = dataclasses.asdict(file) | {"path": file.path.name, "step": step}
        entry["classes"] = list(classes)
        listing.record(folder, key, entry, file.path)
        print(
            f"exported   {file.path} · {units.size(file.bytes)} · largest difference {file.max_difference:.2g} ·"
            f" agreement {file.agreement:.1%}",
            flush=True,
        )
    return rejected


def _check_calibration(built: Built, settings: Settings) -> None:
    """Raises a UserError for an integer format if random examples replace the run's own."""
    data = built.experiment.data
    tables = (data.get("train"), data.get("eval"))
    without_texts = data.get("name") == "texts" and tables == (None, None)
    without_images = data.get("source", {}).get("name") == "absent"
    if not without_texts and not without_images:
        return
    for key in settings.formats:
        if load_format(key).INTEGER:
            raise UserError(
                f"the format {key} needs the run's {built.data.noun}s, to measure ranges and to compare answers: restore"
                " them, or leave the format out of config.export.formats"
            )


def inference_function(
    built: Built, state: State, *, endpoints: bool = False, integer: bool = False
):
    """Returns the function that is exported: from a batch to the trained network's logits or endpoints.

    The batch is {name of `data.exported`: array [b, ...]}. The weights are constants of the function, as numpy arrays.

    Args:
      built: the experiment.
      state: the trained state.
      endpoints: whether the function returns {name: array} with all endpoints and the logits, instead of the logits.
      integer: whether the function is for an integer file, which rounds activations itself; then methods that do the same,
        such as quantization-aware training, are left out.
    """
    network, variables = network_on_host(built, state)
    if integer:
        kept = {k: f for k, f in network.forwards.items() if not f.integer}
        network = network._replace(forwards=kept)

    def fn(batch):
        inputs = built.data.inputs(batch)
        (logits, stages), _ = forward.run(network, variables, inputs)
        return stages | name_outputs(logits) if endpoints else logits

    return fn


def network_on_host(built: Built, state: State) -> tuple[forward.Network, dict]:
    """Returns (the trained network in float32, its variables as numpy arrays).

    Methods that change weights are applied to the variables; methods that change activations stay in the network.
    """
    network = built.network._replace(dtype="float32")
    network, variables = forward.fold_reparametrizations(
        network, jax.device_get(state.variables())
    )
    return network, jax.device_get(variables)


def find_files(
    workdir: pathlib.Path, formats: Sequence[str], step: int
) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Returns (the paths of the exported files, {rejected format: reason}).

    Args:
      workdir: the run's work directory.
      formats: the formats to look for.
      step: the step of the trained network.

    Raises:
      UserError: a file is missing, damaged, or of another step.
    """
    folder = workdir / "export"
    entries, paths, rejected = listing.read(folder), [], {}
    remedy = f"run --job=export --workdir={workdir} first"
    if entries is None:
        raise UserError(f"{folder / listing.NAME} is damaged; {remedy}")
    for key in formats:
        entry = entries.get(key, {})
        if entry.get("step") == step and "rejected" in entry:
            rejected[key] = entry["rejected"]
            continue
        if "path" not in entry or not (folder / entry["path"]).is_file():
            raise UserError(f"no exported file of format {key} in {folder}; {remedy}")
        path = folder / entry["path"]
        if entry["step"] != step:
            raise UserError(
                f"{path} is of step {entry['step']}, the trained network of step {step}; {remedy}"
            )
        listing.verify(path)
        paths.append(path)
    return paths, rejected


def check_examples(built: Built, count: int) -> dict[str, np.ndarray]:
    """Returns the inputs of an exported file for the first test examples, see `collect_examples`; all if there are fewer."""
    batches = built.data.eval(min(count, built.data.num_eval))
    return collect_examples(built, batches, count)


def collect_examples(built: Built, batches, count: int) -> dict[str, np.ndarray]:
    """Returns the inputs of an exported file, {name: array [count, ...]}, for the first examples that are no padding.

    Args:
      built: the experiment.
      batches: a stream of batches.
      count: the number of examples; fewer are returned if the stream ends.
    """
    parts, collected = [], 0
    for batch in batches:
        parts.append(file_inputs(built, batch))
        collected += int(batch["mask"].sum())
        if collected >= count:
            break
    return {k: np.concatenate([part[k] for part in parts])[:count] for k in parts[0]}


def file_inputs(built: Built, batch) -> dict[str, np.ndarray]:
    """Returns the inputs of an exported file for one batch, without its padding examples.

    Shorter sequences are padded with zeros, which the padding mask hides, to the length that the file takes.
    """
    inputs = {}
    for name, spec in built.data.exported.items():
        rows = batch[name][batch["mask"]]
        pads = [(0, n - m) for n, m in zip(spec.shape, rows.shape[1:], strict=True)]
        inputs[name] = np.pad(rows, [(0, 0), *pads])
    return inputs


def check_single_process(job: str) -> None:
    """Raises a UserError if the run has several processes; `job` is the job's name, for the error message."""
    if jax.process_count() > 1:
        raise UserError(
            f"the job {job} runs in one process; leave out --coordinator and --processes"
        )
