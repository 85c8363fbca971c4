"""Runs every exported file on the whole test set in its own runtime, on one thread, and prints one table."""

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
from squeeze_jax.ranges import Count, Whole
from squeeze_jax.report import curves, picture, record, table
from squeeze_jax.train import forward, loop
from squeeze_jax.train.state import State

BATCH = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.benchmark`.

    Attributes:
      runs: timed runs of each file at batch 1.
      warmup: runs before them.
    """

    runs: Count = 200
    warmup: Whole = 20


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Prints the table and writes it to `report.json` and `report.png`.

    Raises:
      UserError: an exported file or the checkpoint is missing.
    """
    if inputs:
        raise UserError(f"the job benchmark takes no files: {inputs[0]}")
    export.alone("benchmark")
    settings = _settings.of(built, Settings)
    state = evaluate.trained(built, workdir)
    formats = _settings.of(built, export.Settings).formats
    paths, rejected = export.find(workdir, formats, int(state.step))
    batches = list(built.data.eval(BATCH))
    count = sum(int(batch["mask"].sum()) for batch in batches)
    given = export.examples(built, batches, count)
    counts = network(built, state)
    counts["score"] = built.metric.headline.removeprefix("eval_").replace("_", " ")
    result = fit.evaluator(built)(state)
    weights = tree.nbytes(export.on_host(built, state)[1])
    rows = [
        table.row(
            "live model (JAX)",
            {"accuracy": headline(built, result), "bytes": weights},
            **counts,
        )
    ]
    for path in paths:
        stop.check()
        print(
            f"measuring  {path} on {count:,} test examples, one thread",
            flush=True,
        )
        measured = runtime.measure(
            path,
            given,
            runs=settings.runs,
            warmup=settings.warmup,
        )
        measured["accuracy"] = score(built, batches, measured["outputs"])
        rows.append(table.row(path.name, measured, **counts))
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


def caption(origin: dict) -> str:
    """What the numbers come from: how they were measured, machine, versions, revision."""
    packages, git = origin["packages"], origin["git"]
    parts = ["files on one thread, batch 1", origin["machine"]["cpu"]]
    parts += [
        f"{k} {packages[k]}" for k in ("jax", "flax", "ai-edge-litert") if k in packages
    ]
    if git:
        parts.append(
            f"git {git['revision'][:10]}" + (" and changes" if git["changed"] else "")
        )
    return " · ".join(parts)


def score(built: Built, batches: Sequence[dict], outputs) -> float:
    """The headline of the evaluation of a file's outputs for all examples of these batches."""

    def step(outputs, some):
        rows, batch = some
        logits = jax.tree.map(lambda x: jnp.asarray(x[rows]), outputs)
        sums, kept = built.metric.measure(logits, batch)
        return sums, kept | {k: batch[k] for k in ("mask", "index") if kept}

    ends = np.cumsum([batch["mask"].sum() for batch in batches])
    some = (
        (
            slice(end - batch["mask"].sum(), end),
            {k: v[batch["mask"]] for k, v in batch.items()},
        )
        for end, batch in zip(ends, batches, strict=True)
    )
    found = loop.evaluate(step, outputs, some, lambda x: x, built.metric.score)
    return headline(built, found)


def headline(built: Built, scores: Mapping[str, float]) -> float:
    """The score that networks are compared by, as a part of 1."""
    return scores[built.metric.headline] / built.metric.scale


def network(built: Built, state: State) -> dict[str, int]:
    """Parameters, and MACs of one example, of the network as exported."""
    example = {
        k: jax.ShapeDtypeStruct((1, *s.shape), s.dtype)
        for k, s in built.data.exported.items()
    }
    return {
        "parameters": tree.size(forward.parameters(state.params)),
        "macs": count.macs(export.live(built, state), example).total,
    }
