"""Trains the experiment with several seeds and reports the scores of all, their median and the best.

Small tasks' scores vary with the seed by more than most methods gain; published results of GLUE are the best or the median of
five to ten (Devlin et al., arXiv 1810.04805, section 4.1).
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

RUN = "ignores"  # it begins runs of its own


def run(built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()) -> None:
    """Trains in `workdir/seed-N` for each N of `config.seeds`, goes on where it stopped, and writes `seeds.json`.

    Raises:
      UserError: no seeds; all else as the job fit.
      loop.Interrupted: stopped by a signal, and saved.
    """
    if inputs:
        raise UserError(f"the job seeds takes no files: {inputs[0]}")
    seeds = built.experiment.seeds
    if len(seeds) < 2:
        raise UserError(
            f"config.seeds = {seeds} names no seeds to compare: give some, such as (0, 1, 2, 3, 4)"
        )
    fit.ready(built)
    found = {}
    with fit.Compiled() as compiled:
        for seed in seeds:
            if jax.process_count() == 1:
                stop.check()
            experiment = dataclasses.replace(built.whole, seed=seed)
            one = built.with_seed(seed)
            folder = _of(workdir, seed)
            _workdir.begin(folder, _workdir.canonical(experiment.config()))
            trained = fit.to_the_end(one, folder, compiled)
            if trained.whole.phases:  # the best may be of another phase than the last
                trained = _experiment.opened(folder, experiment.config())
            state = evaluate.trained(trained, folder)
            found[seed] = compiled.evaluate(trained, state)
    if jax.process_index() == 0:
        headline = built.metric.headline
        best = built.metric.better(headline)
        print(f"\n{report(found, headline, best)}\n")
        written = summary(found, headline, best)
        path = files.write(workdir / "seeds.json", json.dumps(written, indent=2) + "\n")
        print(f"written    {path}; the best is {_of(workdir, written['best'])}")


def _of(workdir: pathlib.Path, seed: int) -> pathlib.Path:
    return workdir / f"seed-{seed}"


def summary(
    found: Mapping[int, Mapping[str, float]], headline: str, best: Callable = max
) -> dict:
    """Returns scores by seed, their medians, means and deviations, and the best seed.

    Args:
      found: scores by name, by seed.
      headline: the score that seeds are compared by; a seed where it is not finite is not the best if another is.
      best: `max` or `min`.
    """
    finite = [seed for seed in found if math.isfinite(found[seed][headline])]
    names = next(iter(found.values()))
    columns = {name: [scores[name] for scores in found.values()] for name in names}
    return {
        "seeds": {str(seed): scores for seed, scores in found.items()},
        "median": {k: _if_finite(statistics.median, c) for k, c in columns.items()},
        "mean": {k: _if_finite(statistics.fmean, c) for k, c in columns.items()},
        "deviation": {k: _if_finite(statistics.stdev, c) for k, c in columns.items()},
        "best": best(finite or found, key=lambda seed: found[seed][headline]),
    }


def _if_finite(statistic: Callable, values: Sequence[float]) -> float:
    """A statistic of values; NaN if one of them is not finite, as of a run that diverged."""
    return statistic(values) if all(map(math.isfinite, values)) else math.nan


def report(
    found: Mapping[int, Mapping[str, float]], headline: str, best: Callable = max
) -> str:
    """A table: a row a seed, then the medians and the best."""
    whole = summary(found, headline, best)
    names = list(next(iter(found.values())))
    rows = {f"seed {seed}": scores for seed, scores in found.items()}
    rows |= {"median": whole["median"], "mean": whole["mean"]}
    rows |= {"standard deviation": whole["deviation"]}
    rows |= {f"best, seed {whole['best']}": found[whole["best"]]}
    lines = [["", *(name.removeprefix("eval_").replace("_", " ") for name in names)]]
    lines += [
        [name, *(f"{scores[key]:.4f}" for key in names)]
        for name, scores in rows.items()
    ]
    return table.align(lines)
