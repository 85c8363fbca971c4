"""Searches a trained space for the best network within limits on its costs, and extracts it as a work directory.

The job scores some networks on held-out training examples and fits a predictor of the score to them. An evolution finds the best
predicted networks within the limits, which are then scored too. Other methods choose all networks that are scored without a
predictor. The best of the scored networks is extracted: train it further and export it with --job=main and its own work directory.
"""

import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import numpy as np

from squeeze_jax import files
from squeeze_jax.cost import latency_table
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _experiment,
    _found,
    _scores,
    _search_predictor,
    _settings,
    _space,
    _workdir,
    evaluate,
    extract,
)
from squeeze_jax.jobs import latency_table as latency_tables
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.jobs._search_log import Log, progress
from squeeze_jax.jobs._search_problem import (
    Problem,
    check_costs,
    check_counted,
    table_path,
)
from squeeze_jax.jobs._search_report import report
from squeeze_jax.nas import random_search, regularised_evolution
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.evolve import evolve
from squeeze_jax.nas.pareto import Front, pareto
from squeeze_jax.nas.space import Arch, spread_networks
from squeeze_jax.ranges import Count, Fraction, Part, PathStr, Whole
from squeeze_jax.report import record

LEAST = 10  # scored networks to fit a predictor
FITTED = "fitted.json"  # in the folder `search`, while candidates are scored
QUERIES = ("regularised_evolution", "random_search")  # methods without a predictor
POOL = 100_000  # random networks that random search ranks by the predictor


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.search`.

    Attributes:
      to: the new work directory of the best network; None for the folder `found` in this one.
      limits: limits that the network has to meet together: dicts such as {"cost": "latency", "table": "tflite_1", "at_most":
        8.0} or {"cost": "memory", "at_most": 256e3}; see `_search_problem.LimitSettings`.
      front: costs that are traded off against the score in the printed front, dicts such as {"cost": "macs"}; () for the
        costs with limits, and MACs if there are none.
      method: "evolution" of architectures within the limits or "random", the best of 100,000 random ones, by predicted
        scores; or "regularised_evolution" or "random_search", which score samples + candidates networks within the limits
        and use no predictor.
      predictor: "mlp" on one-hot choices, "graph" for graph convolutions over the chain of a network's pieces, or "two_stage",
        in which a classifier first rejects bad networks.
      rejected: the share of the scored networks that the classifier of "two_stage" learns to reject, in (0, 1).
      samples: number of networks that are scored to fit the predictor; at least 10.
      candidates: number of best predicted networks that are scored before one is chosen; at least 1.
      population, generations: of the evolution; a population of "regularised_evolution" is at most a fifth of its networks.
      rate: probability that a mutation changes a position, in (0, 1].
      calibration: training examples for each network's normalisation statistics; at least 1.
      examples: largest number of examples for a score; at least 1.
      score: the score that is predicted and compared, such as "eval_loss", which tells networks apart that are right on the
        same few examples; "" for the one by which the task compares networks, such as accuracy.
      steps: number of training steps in the found network's config; None takes the number of this run's last phase.
      log: a file `search/scored.jsonl` of another search of this space, whose scores are used too.
    """

    to: PathStr | None = None
    limits: tuple[dict, ...] = ()
    front: tuple[dict, ...] = ()
    method: Literal["evolution", "random", *QUERIES] = "evolution"
    predictor: Literal[*_search_predictor.METHODS] = "mlp"
    rejected: Fraction = 0.25
    samples: Count = 100
    candidates: Count = 10
    population: Count = 100
    generations: Whole = 30
    rate: Part = 0.1
    calibration: Count = 2048
    examples: Count = 10_000
    score: str = ""
    steps: Count | None = None
    log: PathStr | None = None


def check(settings: Settings, built: Built) -> None:
    """Raises a UserError for a limit or a cost with a wrong key or value, too few samples, or a network without a space."""
    _space.family(built)
    if settings.samples < LEAST:
        raise UserError(
            f"config.search.samples = {settings.samples} should be at least {LEAST}: the predictor of scores is fitted to them"
        )
    check_costs(settings.limits, settings.front)
    if settings.score:
        _experiment.check_score(built, settings.score, "config.search.score")


def check_before_training(built: Built, workdir: pathlib.Path) -> None:
    """Checks what a search needs that does not depend on the trained weights.

    Latency tables have to exist, unless the config's section "latency_table" will write them.

    Raises:
      UserError: a table or the other search's log does not exist, no network meets the limits on counted costs, or the folder
        of the found network is of another search.
    """
    settings = _settings.job_settings(built, Settings)
    _check_log(settings)
    check_counted(built, settings.limits)
    found = found_directory(built, workdir)
    if _workdir.is_trained(found):
        config = built.whole.config()
        _found.check_same_search(found, dataclasses.asdict(settings), config)
    planned, folder = (), None
    if "latency_table" in built.whole.jobs:
        tables = built.whole.jobs["latency_table"]
        planned, folder = latency_tables.names(tables), tables.device_folder
    for section in (*settings.limits, *settings.front):
        name = section.get("table")
        if not name or (name in planned and folder is None):
            continue
        path = table_path(workdir, name)
        if folder is not None and not path.exists():
            raise UserError(
                f"there is no latency table {name!r}: config.latency_table.device_folder times another device, whose tables"
                f" have its name, such as Pixel_8_{name}: leave the key out, or run --job=latency_table first"
            )
        latency_table.read(path)


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Raises a UserError if the network has no elastic options, or the new work directory holds a run."""
    if inputs:
        raise UserError(f"the job search takes no files: {inputs[0]}")
    settings = _settings.job_settings(built, Settings)
    _space.family(built)
    _check_log(settings)
    if settings.to is not None:
        check_target(files.path(settings.to))


def _check_log(settings: Settings) -> None:
    """Raises a UserError if there is no file of the log of another search."""
    if settings.log and not files.path(settings.log).is_file():
        raise UserError(
            f"config.search.log = {settings.log!r} is no file: name the search/scored.jsonl of another search"
        )


def check_target(target: pathlib.Path, workdir: pathlib.Path | None = None) -> None:
    """Raises a UserError if a path cannot become the work directory of the found network; see `extract.check_target`."""
    extract.check_target(target, "config.search.to", workdir)


def run(
    built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()
) -> pathlib.Path:
    """Searches, writes `search/` in the work directory and the found network's own work directory, and returns its path.

    Scored networks are logged, so a search that was stopped goes on where it was.

    Raises:
      UserError: see `ready` and `Problem`; or there is no checkpoint.
    """
    ready(built, inputs)
    target = found_directory(built, workdir)
    check_target(target, workdir)
    with _workdir.locked(workdir / "search"):
        return _search(built, workdir, target)


def _search(built: Built, workdir: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """Searches and writes the found network to `target`, which it returns; see `run`."""
    settings = _settings.job_settings(built, Settings)
    problem = Problem(built, workdir, settings.limits, settings.front)
    keys = jax.random.split(jax.random.key(built.experiment.seed), 4)
    state = evaluate.trained_state(built, workdir)
    calibration = min(settings.calibration, built.data.num_train)
    scorer = _scores.Scorer(
        built, problem.trained, state, calibration, settings.examples, settings.score
    )
    other = settings.log and files.path(settings.log)
    log = Log(workdir / "search" / "scored.jsonl", problem, scorer, other)
    start, scored_before = time.monotonic(), len(log.scores)
    if settings.method in QUERIES:
        query(problem, log, keys[0], settings)
    else:
        log.score(samples(problem, keys[0], settings.samples), "samples")
    log.check(LEAST)
    archs, scores = log.arrays(_scores_to_fit(workdir, settings, log))
    predict, rank = _search_predictor.fit(
        problem, archs, scores, keys[1], settings.predictor, settings.rejected
    )
    if settings.method not in QUERIES:
        best = best_predicted(problem, predict, keys[2], settings)
        log.score(spaces.unstack(problem.canonical(best)), "candidates")
    front = trade_offs(problem, predict, keys[3], settings)
    winner = log.best()
    found = report(problem, log, predict, front, winner, rank, scorer)
    new = len(log.scores) - scored_before
    share = scoring_share(problem, log, scorer)
    print(
        f"search     {new} networks scored in {time.monotonic() - start:.0f} s; all {len(log.scores)} cost {share:.1%} of the"
        " arithmetic of the training run"
    )
    small = extract.write(
        built,
        problem.trained,
        state,
        winner[0],
        target,
        calibration,
        settings.steps,
        _found.contents(dataclasses.asdict(settings), _workdir.read(workdir), found),
    )
    (workdir / "search" / FITTED).unlink(missing_ok=True)
    describe_next(target, small)
    return target


def _scores_to_fit(workdir: pathlib.Path, settings: Settings, log: Log) -> int:
    """Returns the number of scores to which the predictor is fitted: those that were known before the first candidate's.

    A search that was stopped among its candidates fits its predictor to the same scores again, so it chooses the same ones.
    """
    path, known = workdir / "search" / FITTED, len(log.scores)
    of = record.to_json({"settings": dataclasses.asdict(settings), "about": log.about})
    try:
        saved = files.read_json(path)
    except (OSError, ValueError):
        saved = None
    if isinstance(saved, dict) and saved.get("of") == of:
        count = saved.get("scores")
        if type(count) is int and LEAST <= count <= known:
            return count
    files.write(path, json.dumps({"of": of, "scores": known}, indent=1) + "\n")
    return known


def found_directory(built: Built, workdir: pathlib.Path) -> pathlib.Path:
    """Returns the work directory of the network that a search in `workdir` finds."""
    settings = _settings.job_settings(built, Settings)
    return files.path(settings.to) if settings.to else workdir / "found"


def samples(problem: Problem, key: jax.Array, count: int) -> list[Arch]:
    """Returns different random architectures: one half from the smallest to the largest, the other uniformly."""
    spread = spread_networks(problem.space, -(-count // 2), key)
    uniform = jax.vmap(lambda k: spaces.sample(problem.space, k))(
        jax.random.split(key, 4 * count)
    )
    archs = [
        arch
        for drawn in (spaces.stack(spread), uniform)
        for arch in spaces.unstack(problem.canonical(drawn))
    ]
    return list({spaces.key_of(a): a for a in archs}.values())[:count]


def query(problem: Problem, log: Log, key: jax.Array, settings: Settings) -> None:
    """Scores the networks that a method without a predictor chooses."""
    queries = settings.samples + settings.candidates
    show, numbers = progress(queries, "networks"), itertools.count(1)

    def score(archs):
        scores = []
        for arch in spaces.unstack(archs):
            scores.append(log.add(arch))
            show(next(numbers))
        return scores

    options = dict(
        queries=queries,
        within=lambda archs: problem.limits.share(archs) <= 1,
        canonical=problem.canonical,
    )
    if settings.method == "random_search":
        random_search.search(key, problem.space, score, **options)
    else:
        options["population"] = min(settings.population, queries // 5)
        regularised_evolution.search(key, problem.space, score, **options)
    if len(log.scores) < LEAST:  # the limits allow few networks
        log.score(samples(problem, key, LEAST), "samples for the front")


def best_predicted(
    problem: Problem, predict: Callable, key: jax.Array, settings: Settings
) -> Arch:
    """Returns the best predicted architectures within the limits, best first, with a leading axis."""
    count = settings.candidates
    if settings.method == "evolution":
        found = evolve(
            key,
            problem.space,
            predict,
            problem.limits.share,
            1.0,
            population=settings.population,
            rate=settings.rate,
            generations=settings.generations,
            canonical=problem.canonical,
        )
        archs = spaces.unstack(found.archs)
    else:
        drawn = jax.vmap(lambda k: spaces.sample(problem.space, k))(
            jax.random.split(key, POOL)
        )
        drawn = problem.canonical(drawn)
        within = np.asarray(problem.limits.share(drawn)) <= 1
        if not within.any():
            raise UserError(
                f"config.search.method: none of {POOL:,} random networks meets the limits: choose 'evolution'"
            )
        rows = np.concatenate(
            [a.reshape(POOL, -1) for a in jax.tree.leaves(drawn)], axis=1
        )
        _, places = np.unique(rows, axis=0, return_index=True)
        places = places[within[places]]
        different = jax.tree.map(lambda a: a[places], drawn)
        order = np.argsort(-np.asarray(predict(different)), kind="stable")[:count]
        archs = spaces.unstack(jax.tree.map(lambda a: a[order], different))
    best = list({spaces.key_of(a): a for a in archs}.values())[:count]
    if len(best) < count:
        print(
            f"candidates {len(best)} different networks within the limits, of {count} that config.search.candidates asks for"
        )
    return spaces.stack(best)


def trade_offs(
    problem: Problem, predict: Callable, key: jax.Array, settings: Settings
) -> Front:
    """Returns the front of predicted score and costs; its values are (-score, cost, ...)."""

    def objectives(archs):
        columns = [-predict(archs), *(c.of(archs) for c in problem.traded)]
        return np.stack([np.asarray(c) for c in columns], axis=1)

    front = pareto(
        key,
        problem.space,
        objectives,
        population=settings.population,
        rate=settings.rate,
        generations=settings.generations,
    )
    archs = problem.canonical(front.archs)  # equal networks once
    places = list(
        {spaces.key_of(a): i for i, a in enumerate(spaces.unstack(archs))}.values()
    )
    return Front(jax.tree.map(lambda a: a[places], archs), front.values[places])


def scoring_share(problem: Problem, log: Log, scorer: _scores.Scorer) -> float:
    """Returns the MACs of all scores over those of the training run, in which a backward pass costs two forward passes."""
    archs, _ = log.arrays()
    scoring = float(problem.macs.of(archs).sum()) * sum(scorer.examples)
    ends = spaces.stack([problem.space.smallest(), problem.space.largest()])
    smallest, largest = map(float, problem.macs.of(ends))
    drawn = jax.vmap(lambda k: spaces.sample(problem.space, k))(
        jax.random.split(jax.random.key(0), 100)
    )
    mean = float(problem.macs.of(drawn).mean())
    whole = _experiment.check(_workdir.read(problem.workdir))
    return scoring / extract.training_macs(whole, smallest, mean, largest)


def describe_next(target: pathlib.Path, small: Built) -> None:
    """Prints how to go on with the found network."""
    print(
        f"next       python run.py --job=main --workdir={target} trains it for {small.experiment.steps:,} steps, exports and"
        " measures it",
        flush=True,
    )
