"""Writes the trained encoder as a folder that `transformers` loads.

The folder holds config.json, model.safetensors and the tokenizer's files.
"""

import pathlib
import shutil
import tempfile
from collections.abc import Sequence

import jax
import numpy as np

from squeeze_jax import files, models
from squeeze_jax.data import tokens
from squeeze_jax.errors import UserError
from squeeze_jax.export.parity import Disagreement, Verdict, compare
from squeeze_jax.export.runnable import name_outputs
from squeeze_jax.jobs import _classes, _settings, evaluate, export
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.report import units
from squeeze_jax.train import forward

FOLDER = "huggingface"


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Writes the folder `workdir/huggingface`, after checking that the files, read again, agree with the live model.

    Raises:
      UserError: the command line names files, there is no checkpoint, the model reads no text, `transformers` has no class
        for it, or the folder cannot be written.
      export.Disagreement: the files do not agree with the live model; an existing folder stays as it was.
    """
    if inputs:
        raise UserError(f"the job huggingface takes no files: {inputs[0]}")
    export.check_single_process("huggingface")
    if built.data.reads != "tokens":
        raise UserError(
            f"{built.options['name']} reads {built.data.reads}, and folders of transformers are for encoders of text:"
            " --job=export writes other files"
        )
    state = evaluate.trained_state(built, workdir)
    network, variables = export.network_on_host(built, state)
    _check_plain(network)
    folder = workdir / FOLDER
    try:
        fresh = pathlib.Path(tempfile.mkdtemp(prefix=f".{FOLDER}-", dir=workdir))
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}") from None
    try:
        models.save(fresh, built.model, variables, config=_label_config(built))
        tokens.save(built.data.tokenizer, fresh)
        verdict = _compare_outputs(built, variables, fresh)
        if not verdict.agrees:
            rejected = folder.with_suffix(".rejected")
            shutil.rmtree(rejected, ignore_errors=True)
            fresh.rename(rejected)
            raise Disagreement(FOLDER, verdict, None)
        folder.mkdir(exist_ok=True)
        written = []
        for path in fresh.iterdir():
            files.move(path, folder / path.name)
            written.append(folder / path.name)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    size = units.size(sum(path.stat().st_size for path in written))
    print(f"written    {folder} · {size} · largest difference {verdict.difference:.2g}")


def _check_plain(network) -> None:
    """Raises a UserError if methods change the network's activations, because a folder holds weights only."""
    if network.forwards:
        raise UserError(
            f"a folder of transformers holds weights alone, and {', '.join(network.forwards)} changes activations too:"
            " --job=export writes files that have it"
        )


def _label_config(built):
    """Returns the entries of config.json that tell what a classifier's outputs mean; {} if the model does not classify."""
    names, entries = built.data.label_names, {}
    if built.model.task == "classification":
        entries["problem_type"] = _classes.problem_type(built.data)
    if names and built.model.task in ("classification", "tokens"):
        outputs = built.options.get("num_classes")
        entries["id2label"] = dict(enumerate(_classes.output_names(names, outputs)))
    return entries


def _compare_outputs(built, variables, folder) -> Verdict:
    """Compares the folder's outputs with the live model's on the first `config.export.check` test examples.

    Args:
      built: the experiment.
      variables: of the trained network.
      folder: the written folder.
    """
    settings = _settings.job_settings(built, export.Settings)
    count = settings.check
    examples = export.check_examples(built, count)
    folder_net, folder_variables = models.load(folder, task=built.model.task)

    def outputs(net, variables):
        network = forward.Network(net)

        def call(x):
            (logits, _), _ = forward.run(network, variables, built.data.inputs(x))
            return name_outputs(logits)

        with jax.default_matmul_precision("highest"):
            return {k: np.asarray(v) for k, v in jax.jit(call)(examples).items()}

    return compare(
        outputs(built.model, variables),
        outputs(folder_net, folder_variables),
        integer=False,
        tolerance=settings.tolerance,
        int8_agreement=settings.int8_agreement,
        agreement=built.metric.agreement,
    )
