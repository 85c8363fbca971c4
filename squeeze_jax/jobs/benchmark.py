"""Measures every exported file on the whole test set, and prints one table.

Each file runs in its own runtime on one thread.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import stop, tree
from squeeze_jax.cost import count
from squeeze_jax.errors import UserError
from squeeze_jax.export import runtime
from squeeze_jax.jobs import _settings, _workdir, evaluate, export, fit
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.ranges import Runs, Warmups
from squeeze_jax.report import curves, picture, record, table
from squeeze_jax.train import forward, loop
from squeeze_jax.train.state import State

BATCH = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.benchmark`.

    Attributes:
      runs: number of timed runs of each file, with one example each; 1 to 1,000,000.
      warmup: number of untimed runs before them; 0 to 1,000,000.
    """

    runs: Runs = 200
    warmup: Warmups = 20


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints a table of accuracy, size and latency, and writes it to `report.json` and `report.png` in the work directory.

    Raises:
      UserError: the command line names files, there are several processes, or an exported file or the checkpoint is missing.
    """
    if inputs:
        raise UserError(f"the job benchmark takes no files: {inputs[0]}")
    export.check_single_process("benchmark")
    settings = _settings.job_settings(built, Settings)
    state = evaluate.trained_state(built, workdir)
    formats = _settings.job_settings(built, export.Settings).formats
    paths, rejected = export.find_files(workdir, formats, int(state.step))
    batches = list(built.data.eval(BATCH))
    num_examples = sum(int(batch["mask"].sum()) for batch in batches)
    examples = export.collect_examples(built, batches, num_examples)
    columns = network_size(built, state)
    columns["score"] = built.metric.headline.removeprefix("eval_").replace("_", " ")
    scores = fit.make_evaluator(built)(state)
    weight_bytes = tree.nbytes(export.network_on_host(built, state)[1])
    rows = [
        table.row(
            "live model (JAX)",
            {"accuracy": headline(built, scores), "bytes": weight_bytes},
            **columns,
        )
    ]
    for path in paths:
        stop.check()
        print(
            f"measuring  {path} on {num_examples:,} test examples, one thread",
            flush=True,
        )
        measured = runtime.measure(
            path,
            examples,
            runs=settings.runs,
            warmup=settings.warmup,
        )
        measured["accuracy"] = score_outputs(built, batches, measured["outputs"])
        rows.append(table.row(path.name, measured, **columns))
    rows += [table.row(f"{key}, rejected", why=why) for key, why in rejected.items()]
    print(f"\n{table.text(rows)}\n")
    for key, why in rejected.items():
        print(f"{key} was rejected: {why}\n")
    config = _workdir.read(workdir)
    data = config["data"].get("source", config["data"])["name"]
    title = f"{built.options['name']} on {data}"
    written = record.write(workdir / "report.json", rows, config=config, title=title)
    metrics = (
        curves.read(workdir / "metrics.jsonl")
        if (workdir / "metrics.jsonl").exists()
        else None
    )
    picture.write(
        workdir / "report.png",
        rows,
        title=title,
        caption=caption(written["provenance"]),
        metrics=metrics,
    )
    print(f"written    {workdir / 'report.json'} and {workdir / 'report.png'}")


def caption(provenance: dict) -> str:
    """Returns the caption of the picture: how the numbers were measured, the machine, package versions, git revision.

    Args:
      provenance: of the report, see `report/record.py`.
    """
    packages, git = provenance["packages"], provenance["git"]
    parts = ["files on one thread, batch 1", provenance["machine"]["cpu"]]
    parts += [
        f"{k} {packages[k]}" for k in ("jax", "flax", "ai-edge-litert") if k in packages
    ]
    if git:
        parts.append(
            f"git {git['revision'][:10]}" + (" and changes" if git["changed"] else "")
        )
    return " · ".join(parts)


def score_outputs(built: Built, batches: Sequence[dict], outputs) -> float:
    """Returns the headline score of a file's outputs.

    Args:
      built: the experiment.
      batches: the evaluation batches, with padding.
      outputs: the file's logits for all examples of the batches without the padding, in the same order.
    """

    def step(outputs, rows_and_batch):
        rows, batch = rows_and_batch
        logits = jax.tree.map(lambda x: jnp.asarray(x[rows]), outputs)
        sums, kept = built.metric.measure(logits, batch)
        return sums, kept | {k: batch[k] for k in ("mask", "index") if kept}

    ends = np.cumsum([batch["mask"].sum() for batch in batches])
    rows_and_batches = (
        (
            slice(end - batch["mask"].sum(), end),
            {k: v[batch["mask"]] for k, v in batch.items()},
        )
        for end, batch in zip(ends, batches, strict=True)
    )
    scores = loop.evaluate(
        step, outputs, rows_and_batches, lambda x: x, built.metric.score
    )
    return headline(built, scores)


def headline(built: Built, scores: Mapping[str, float]) -> float:
    """Returns the score by which networks are compared, as a fraction of 1."""
    return scores[built.metric.headline] / built.metric.scale


def network_size(built: Built, state: State) -> dict[str, int]:
    """Returns the exported network's number of parameters, and its MACs for one example."""
    example = {
        k: jax.ShapeDtypeStruct((1, *s.shape), s.dtype)
        for k, s in built.data.exported.items()
    }
    return {
        "parameters": tree.size(forward.parameters(state.params)),
        "macs": count.macs(export.inference_function(built, state), example).total,
    }
