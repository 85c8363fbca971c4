"""Trains the experiment with several seeds, and reports the scores of each seed and the best.

On small tasks, scores vary with the seed by more than most methods gain. Published results of GLUE are the best or the
median of five to ten seeds (Devlin et al., arXiv 1810.04805, section 4.1).
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence

import jax

from squeeze_jax import files, stop
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import _experiment, _workdir, evaluate, fit
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.report import table

RUN = "ignores"  # this job starts runs in folders below the work directory


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Trains in `workdir/seed-N` for each seed N of `config.seeds`, and writes `workdir/seeds.json`.

    A run that was stopped is continued.

    Raises:
      UserError: the command line names files, `config.seeds` has less than two seeds, the folder of a seed cannot be used (no
        seed has trained then), or see the job fit.
      loop.Interrupted: a signal stopped the run; everything that was trained is saved.
    """
    if inputs:
        raise UserError(f"the job seeds takes no files: {inputs[0]}")
    seeds = built.experiment.seeds
    if len(seeds) < 2:
        raise UserError(
            f"config.seeds = {seeds} names no seeds to compare: give some, such as (0, 1, 2, 3, 4)"
        )
    configs = {
        seed: _workdir.canonical(dataclasses.replace(built.whole, seed=seed).config())
        for seed in seeds
    }
    for seed, config in configs.items():  # all folders, before the first seed trains
        _workdir.check(_seed_folder(workdir, seed), config)
    fit.ready(built)
    scores_by_seed = {}
    with fit.CompiledPhases() as compiled:
        for seed in seeds:
            if jax.process_count() == 1:
                stop.check()
            experiment = dataclasses.replace(built.whole, seed=seed)
            seed_built = built.with_seed(seed)
            folder = _seed_folder(workdir, seed)
            _workdir.begin(folder, configs[seed])
            trained = fit.train_phases(seed_built, folder, compiled)
            if trained.whole.phases:  # the trained network may be from an earlier phase
                trained = _experiment.build_trained(folder, experiment.config())
            state = evaluate.trained_state(trained, folder)
            scores_by_seed[seed] = compiled.evaluate(trained, state)
    if jax.process_index() == 0:
        headline = built.metric.headline
        best = built.metric.better(headline)
        print(f"\n{report(scores_by_seed, headline, best)}\n")
        written = summary(scores_by_seed, headline, best)
        path = files.write(workdir / "seeds.json", json.dumps(written, indent=2) + "\n")
        print(
            f"written    {path}; the best is {_seed_folder(workdir, written['best'])}"
        )


def _seed_folder(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    return workdir / f"seed-{seed}"


def summary(
    scores_by_seed: Mapping[int, Mapping[str, float]],
    headline: str,
    best: Callable = max,
) -> dict:
    """Returns the contents of `seeds.json`.

    Args:
      scores_by_seed: {seed: {score: value}}.
      headline: the score by which seeds are compared; a seed whose value is not finite is the best only if all are.
      best: `max` or `min`, which chooses the best of several values.

    Returns:
      {"seeds": {seed: scores}, "median": scores, "mean": scores, "deviation": scores, "best": seed}; deviations are sample
      standard deviations.
    """
    finite = [
        seed
        for seed, scores in scores_by_seed.items()
        if math.isfinite(scores[headline])
    ]
    names = next(iter(scores_by_seed.values()))
    columns = {
        name: [scores[name] for scores in scores_by_seed.values()] for name in names
    }
    return {
        "seeds": {str(seed): scores for seed, scores in scores_by_seed.items()},
        "median": {k: _if_finite(statistics.median, c) for k, c in columns.items()},
        "mean": {k: _if_finite(statistics.fmean, c) for k, c in columns.items()},
        "deviation": {k: _if_finite(statistics.stdev, c) for k, c in columns.items()},
        "best": best(
            finite or scores_by_seed, key=lambda seed: scores_by_seed[seed][headline]
        ),
    }


def _if_finite(statistic: Callable, values: Sequence[float]) -> float:
    """Returns a statistic of values; NaN if one of them is not finite, such as the loss of a run that diverged."""
    return statistic(values) if all(map(math.isfinite, values)) else math.nan


def report(
    scores_by_seed: Mapping[int, Mapping[str, float]],
    headline: str,
    best: Callable = max,
) -> str:
    """Returns a table with one row per seed, then rows for median, mean, standard deviation and the best seed.

    For the arguments see `summary`.
    """
    statistics_of_seeds = summary(scores_by_seed, headline, best)
    best_seed = statistics_of_seeds["best"]
    names = list(next(iter(scores_by_seed.values())))
    rows = {f"seed {seed}": scores for seed, scores in scores_by_seed.items()}
    rows |= {key: statistics_of_seeds[key] for key in ("median", "mean")}
    rows |= {"standard deviation": statistics_of_seeds["deviation"]}
    rows |= {f"best, seed {best_seed}": scores_by_seed[best_seed]}
    lines = [["", *(name.removeprefix("eval_").replace("_", " ") for name in names)]]
    lines += [
        [name, *(f"{scores[key]:.4f}" for key in names)]
        for name, scores in rows.items()
    ]
    return table.align(lines)
