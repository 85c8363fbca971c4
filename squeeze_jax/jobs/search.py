"""Searches a trained space for the best network within limits on its costs, and extracts it as a work directory.

The job scores some networks on held-out training examples and fits a predictor of the score to them. An evolution finds the best
predicted networks within the limits, which are then scored too. The best of these is extracted: train it further and export it with
--job=main and its own work directory.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Literal

import jax
import numpy as np

from squeeze_jax import files, stop
from squeeze_jax.cost import latency_table
from squeeze_jax.errors import UserError
from squeeze_jax.jobs import (
    _experiment,
    _scores,
    _settings,
    _space,
    _workdir,
    evaluate,
    extract,
)
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.jobs.latency_table import sample_networks
from squeeze_jax.nas import encode, limits, predict_mlp
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.evolve import evolve
from squeeze_jax.nas.limits import Cost, Limits
from squeeze_jax.nas.pareto import Front, pareto
from squeeze_jax.nas.space import Arch
from squeeze_jax.ranges import Bits, Count, Part, PathStr, Positive, Whole
from squeeze_jax.report import front as picture
from squeeze_jax.report import record
from squeeze_jax.report.table import align

LEAST = 10  # scored networks to fit a predictor
SHOWN = 12  # rows of the printed front
POOL = 100_000  # random networks that random search ranks by the predictor


@dataclasses.dataclass(frozen=True)
class CostSettings:
    """The keys of an entry of `config.search.front`.

    Attributes:
      cost: "latency" in ms, "macs", "parameters", "bytes" of the weights, or "memory": the peak bytes of activations.
      table: for "latency": a file of --job=latency_table, or its name in the work directory's `latency` folder, such as
        "tflite_1".
      bits: for "bytes" and "memory": bits of a weight or of an activation.
    """

    cost: Literal[limits.KINDS]
    table: str | None = None
    bits: Bits = 8


@dataclasses.dataclass(frozen=True)
class LimitSettings(CostSettings):
    """The keys of an entry of `config.search.limits`; see also `CostSettings`.

    Attributes:
      at_most: the largest allowed value: milliseconds, a number or bytes.
      share: the largest allowed value as a share of the largest network's cost, in (0, 1]; set this key or `at_most`.
    """

    at_most: Positive | None = None
    share: Part | None = None


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of `config.search`.

    Attributes:
      to: the new work directory of the best network; None for the folder `found` in this one.
      limits: limits that the network has to meet together: dicts such as {"cost": "latency", "table": "tflite_1", "at_most":
        8.0} or {"cost": "memory", "at_most": 256e3}; see `CostSettings`.
      front: costs that are traded off against the score in the printed front, dicts such as {"cost": "macs"}; () for the
        costs with limits, and MACs if there are none.
      method: "evolution" of architectures within the limits, or "random": the best predicted of 100,000 random ones.
      samples: number of networks that are scored to fit the predictor; at least 10.
      candidates: number of best predicted networks that are scored before one is chosen; at least 1.
      population, generations: of the evolution.
      rate: probability that a mutation changes a position, in (0, 1].
      calibration: training examples for each network's normalisation statistics; at least 1.
      examples: largest number of examples for a score; at least 1.
      steps: training steps of the found network in its work directory; None for those of this run's last phase.
      log: a file `search/scored.jsonl` of another search of this space, whose scores are used too.
    """

    to: PathStr | None = None
    limits: tuple[dict, ...] = ()
    front: tuple[dict, ...] = ()
    method: Literal["evolution", "random"] = "evolution"
    samples: Count = 100
    candidates: Count = 10
    population: Count = 100
    generations: Whole = 30
    rate: Part = 0.1
    calibration: Count = 2048
    examples: Count = 10_000
    steps: Count | None = None
    log: PathStr | None = None


def check(settings: Settings, built: Built) -> None:
    """Raises a UserError for a limit or a cost with a wrong key or value, and for too few samples."""
    del built
    if settings.samples < LEAST:
        raise UserError(
            f"config.search.samples = {settings.samples} should be at least {LEAST}: the predictor of scores is fitted to them"
        )
    for key, kind in ("limits", LimitSettings), ("front", CostSettings):
        for number, section in enumerate(getattr(settings, key)):
            where = f"config.search.{key}[{number}]"
            entry = _settings.build_settings(kind, section, where)
            if entry.cost == "latency" and not entry.table:
                raise UserError(
                    f'{where}: a latency needs a table, such as table="tflite_1"; --job=latency_table writes it'
                )
            if entry.cost != "latency" and entry.table:
                raise UserError(f"{where}: {entry.cost} needs no table: leave it out")
            if kind is LimitSettings and (entry.at_most is None) == (
                entry.share is None
            ):
                raise UserError(
                    f"{where} needs one of the keys at_most and share, such as at_most=8.0"
                )


class Search:
    """A search in a space."""

    def __init__(self, built: Built, workdir: pathlib.Path):
        """Reads the latency tables, and checks that the limits can be met.

        Args:
          built: the experiment in the phase of the trained network.
          workdir: its work directory.

        Raises:
          UserError: a table is missing or of another space, or no network meets the limits.
        """
        self.settings = _settings.job_settings(built, Settings)
        check(self.settings, built)
        self.built, self.workdir = built, workdir
        self.trained = _space.trained(built, workdir)
        self.space = self.trained.networks.space
        self.pieces = _space.pieces(built, self.trained.networks)
        entries = [LimitSettings(**section) for section in self.settings.limits]
        limited = [self._cost(e) for e in entries]
        largest = one(self.space.largest())
        at_most = [
            e.at_most or e.share * float(c.of(largest)[0])
            for e, c in zip(entries, limited, strict=True)
        ]
        self.limits = Limits(limited, at_most)
        traded = [self._cost(CostSettings(**s)) for s in self.settings.front]
        self.traded = traded or self.limits.costs or [limits.cost("macs", self.pieces)]
        self.macs = limits.cost("macs", self.pieces)
        self._canonical = _vectorised(encode.canonical, self)
        self.features = _vectorised(encode.one_hot, self)
        self.keys = jax.random.split(jax.random.key(built.experiment.seed), 4)
        self._check_limits()

    def _cost(self, entry: CostSettings) -> Cost:
        if entry.cost != "latency":
            return limits.cost(entry.cost, self.pieces, bits=entry.bits)
        path = self.workdir / "latency" / f"{entry.table}.json"
        if not path.exists():
            path = files.path(entry.table)
        table = latency_table.read(path)
        return limits.cost("latency", self.pieces, table=table, path=str(path))

    def _check_limits(self) -> None:
        """Raises a UserError if no network that was found meets the limits."""
        if not self.limits.costs:
            return
        arch = limits.nearest(self.space, self.limits)
        if float(self.limits.share(one(arch))[0]) > 1:
            raise UserError(
                f"config.search.limits: no network of the space meets them; the nearest has {self.limits.describe(arch)}: raise"
                " at_most"
            )

    def canonical(self, archs: Arch) -> Arch:
        """Returns architectures with 0 in positions without effect, as numpy arrays."""
        return jax.device_get(self._canonical(archs))

    def samples(self) -> list[Arch]:
        """Returns different random architectures: one half from the smallest to the largest, the other uniformly."""
        count = self.settings.samples
        spread = sample_networks(self.space, -(-count // 2), self.built.experiment.seed)
        uniform = jax.vmap(lambda k: spaces.sample(self.space, k))(
            jax.random.split(self.keys[0], 4 * count)
        )
        archs = rows(self.canonical(stacked(spread))) + rows(self.canonical(uniform))
        return list({key_of(a): a for a in archs}.values())[:count]


def _vectorised(make, search: Search):
    """Returns a function of `encode` for the space of a search, for architectures with a leading axis."""
    return jax.jit(jax.vmap(make(search.space, search.pieces.columns)))


def ready(built: Built, inputs: Sequence[str] = ()) -> None:
    """Raises a UserError if the network has no elastic options, or the new work directory holds a run."""
    if inputs:
        raise UserError(f"the job search takes no files: {inputs[0]}")
    settings = _settings.job_settings(built, Settings)
    _space.family(built)
    if settings.to is not None:
        _check_target(files.path(settings.to))


def run(
    built: Built, workdir: pathlib.Path, inputs: Sequence[str] = ()
) -> pathlib.Path:
    """Searches, writes `search/` in the work directory and the found network's own work directory, and returns its path.

    Scored networks are logged, so a search that was stopped goes on where it was.

    Raises:
      UserError: see `ready` and `Search`; or there is no checkpoint.
    """
    ready(built, inputs)
    settings = _settings.job_settings(built, Settings)
    target = found_directory(built, workdir)
    _check_target(target)
    search = Search(built, workdir)
    state = evaluate.trained_state(built, workdir)
    calibration = min(settings.calibration, built.data.num_train)
    scorer = _scores.Scorer(
        built, search.trained, state, calibration, settings.examples
    )
    log = Log(workdir / "search" / "scored.jsonl", search, scorer)
    start, scored_before = time.monotonic(), len(log.scores)
    log.score(search.samples(), "samples")
    predict, rank = fit_predictor(search, log)
    found = best_predicted(search, predict)
    log.score(rows(search.canonical(found)), "candidates")
    front = trade_offs(search, predict)
    winner, score = log.best()
    report(search, log, predict, front, winner, score, rank)
    new = len(log.scores) - scored_before
    share = scoring_share(search, log, scorer)
    print(
        f"search     {new} networks scored in {time.monotonic() - start:.0f} s; all {len(log.scores)} cost {share:.1%} of the"
        " arithmetic of the training run"
    )
    small = extract.write(
        built, search.trained, state, winner, target, calibration, settings.steps
    )
    describe_next(target, small)
    return target


def found_directory(built: Built, workdir: pathlib.Path) -> pathlib.Path:
    """Returns the work directory of the network that a search in `workdir` finds."""
    settings = _settings.job_settings(built, Settings)
    return files.path(settings.to) if settings.to else workdir / "found"


def describe_latencies(workdir: pathlib.Path, found: pathlib.Path) -> str:
    """Returns the predicted latencies of the found network beside those of its exported files; "" if none is comparable.

    Args:
      workdir: of the search.
      found: work directory of the found network, which the job benchmark has measured.
    """
    costs_of_found = record.read(workdir / "search" / "front.json")["found"]["costs"]
    measured = {row["model"]: row for row in record.read(found / "report.json")["rows"]}
    lines = []
    for path in sorted((workdir / "latency").glob("*.json")):
        table = latency_table.read(path)
        predicted = costs_of_found.get(table.name)
        row = measured.get(
            {"tflite": "model.tflite", "tflite_int8": "model_int8.tflite"}.get(
                table.about["format"]
            )
        )
        if predicted and row and table.about["threads"] == 1:
            p50 = row["latency_ms"]["p50"]
            lines.append(
                f"latency    {table.name}: {predicted:.4f} ms predicted, {p50:.4f} ms measured on this machine"
            )
    return "\n".join(lines)


def _check_target(target: pathlib.Path) -> None:
    if any((target / "checkpoints").glob("[0-9]*")):
        raise UserError(
            f"{target} holds a run already: choose another work directory with config.search.to, or delete it"
        )


class Log:
    """The networks that were scored, in a file of JSON lines: {"options", "score"}.

    Attributes:
      scores: {key of an architecture: (architecture, score)}.
    """

    def __init__(self, path: pathlib.Path, search: Search, scorer: _scores.Scorer):
        """Reads the log of this search and that of `config.search.log`."""
        self._path, self._search, self._scorer = path, search, scorer
        calibration, examples = scorer.examples
        self._about = {
            "step": int(scorer.step),
            "calibration": calibration,
            "examples": examples,
        }
        self.scores: dict[tuple, tuple[Arch, float]] = {}
        other = search.settings.log
        if other is not None:
            self._read(files.path(other), strict=True)
        if path.exists():
            self._read(path, strict=False)

    def _read(self, path: pathlib.Path, strict: bool) -> None:
        """Reads a log's scores; those of another checkpoint or other examples are left out, or an error."""
        try:
            lines = files.read_file(path).decode().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the log {path}: {error}") from None
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                options, score = row["options"], float(row["score"])
                about = {k: row[k] for k in self._about}
            except (ValueError, KeyError, TypeError):
                if number == len(lines) and not strict:
                    continue  # it was stopped while it wrote the line
                raise UserError(
                    f"{path}: line {number} is no scored network: delete the line, or leave config.search.log out"
                ) from None
            if about != self._about and not strict:
                continue
            arch = self._search.space.arch({k: tuple(v) for k, v in options.items()})
            arch = one_of(self._search.canonical(one(arch)))
            self.scores[key_of(arch)] = arch, score

    def score(self, archs: Sequence[Arch], what: str) -> None:
        """Scores those architectures that have no score yet, and logs each at once."""
        new = {key_of(a): a for a in archs if key_of(a) not in self.scores}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        begin = shown = time.monotonic()
        for number, (key, arch) in enumerate(new.items(), 1):
            stop.check()
            score = self._scorer(arch)
            self.scores[key] = arch, score
            options = {k: list(v) for k, v in self._search.space.options(arch).items()}
            row = {"options": options, "score": score, **self._about}
            with open(self._path, "a") as file:
                file.write(json.dumps(row) + "\n")
            now = time.monotonic()
            if now - shown > 10 or number == len(new):
                shown = now
                left = (now - begin) / number * (len(new) - number)
                print(
                    f"scored     {number} of {len(new)} {what}, {left:.0f} s left",
                    flush=True,
                )

    def best(self) -> tuple[Arch, float]:
        """Returns the network with the highest score among those that meet the limits."""
        archs, scores = self.arrays()
        share = np.asarray(self._search.limits.share(archs))
        best = int(np.where(share <= 1, scores, -np.inf).argmax())
        return jax.tree.map(lambda a: a[best], archs), float(scores[best])

    def arrays(self) -> tuple[Arch, np.ndarray]:
        """Returns (architectures with a leading axis, scores [n])."""
        archs, scores = zip(*self.scores.values(), strict=True)
        return stacked(archs), np.asarray(scores)


def fit_predictor(search: Search, log: Log):
    """Returns (architectures → predicted scores [n], rank correlation on networks that were held out).

    A fifth of the scored networks is held out for the correlation; then all are used.
    """
    archs, scores = log.arrays()
    features = search.features(archs)
    order = np.random.default_rng(0).permutation(len(scores))
    held, kept = np.split(order, [len(scores) // 5])
    checked = predict_mlp.fit(search.keys[1], features[kept], scores[kept])
    guessed = predict_mlp.predict(checked, features[held])
    rank = latency_table.rank_correlation(np.asarray(guessed), scores[held])
    fitted = predict_mlp.fit(search.keys[1], features, scores)
    print(
        f"predictor  fitted to {len(scores)} networks; rank correlation {rank:.2f} on {len(held)} that were held out",
        flush=True,
    )
    return (lambda archs: predict_mlp.predict(fitted, search.features(archs))), rank


def best_predicted(search: Search, predict) -> Arch:
    """Returns the best predicted architectures within the limits, best first, with a leading axis."""
    settings, count = search.settings, search.settings.candidates
    if settings.method == "evolution":
        found = evolve(
            search.keys[2],
            search.space,
            predict,
            search.limits.share,
            1.0,
            population=settings.population,
            rate=settings.rate,
            generations=settings.generations,
        )
        archs = rows(search.canonical(found.archs))
    else:
        drawn = jax.vmap(lambda k: spaces.sample(search.space, k))(
            jax.random.split(search.keys[2], POOL)
        )
        within = np.asarray(search.limits.share(drawn)) <= 1
        if not within.any():
            raise UserError(
                f"config.search.method: none of {POOL:,} random networks meets the limits: choose 'evolution'"
            )
        order = np.argsort(-np.where(within, np.asarray(predict(drawn)), -np.inf))
        order = order[: min(10 * count, int(within.sum()))]
        archs = rows(search.canonical(jax.tree.map(lambda a: a[order], drawn)))
    different = list({key_of(a): a for a in archs}.values())
    return stacked(different[:count])


def trade_offs(search: Search, predict) -> Front:
    """Returns the front of predicted score and costs; its values are (-score, cost, ...)."""

    def objectives(archs):
        columns = [-predict(archs), *(c.of(archs) for c in search.traded)]
        return np.stack([np.asarray(c) for c in columns], axis=1)

    front = pareto(
        search.keys[3],
        search.space,
        objectives,
        population=search.settings.population,
        rate=search.settings.rate,
        generations=search.settings.generations,
    )
    archs = search.canonical(front.archs)  # equal networks once
    places = list({key_of(a): i for i, a in enumerate(rows(archs))}.values())
    return Front(jax.tree.map(lambda a: a[places], archs), front.values[places])


def scoring_share(search: Search, log: Log, scorer: _scores.Scorer) -> float:
    """Returns the MACs of all scores over those of the training run, in which a backward pass costs two forward passes."""
    archs, _ = log.arrays()
    scoring = float(search.macs.of(archs).sum()) * sum(scorer.examples)
    ends = stacked([search.space.smallest(), search.space.largest()])
    smallest, largest = map(float, search.macs.of(ends))
    drawn = jax.vmap(lambda k: spaces.sample(search.space, k))(
        jax.random.split(search.keys[0], 100)
    )
    mean = float(search.macs.of(drawn).mean())
    whole = _experiment.check(_workdir.read(search.workdir))
    return scoring / extract.training_macs(whole, smallest, mean, largest)


def report(search, log, predict, front, winner, score, rank) -> None:
    """Prints the front and the best network, and writes `search/front.json` and `search/front.png`."""
    cost = search.traded[0]
    name = search.built.metric.headline.removeprefix("eval_").replace("_", " ")
    values = front.values[np.argsort(front.values[:, 1], kind="stable")]
    places = np.unique(np.linspace(0, len(values) - 1, SHOWN).round().astype(int))
    heading = [f"predicted {name}", *(c.name for c in search.traded)]
    cells = [
        [f"{-row[0]:.4f}", *(f"{v:.5g}" for v in row[1:])] for row in values[places]
    ]
    print(f"front      {len(values)} trade-offs\n{align([heading, *cells])}")
    predicted = float(np.asarray(predict(one(winner)))[0])
    elastic = search.space.options(winner)
    print(f"found      {_space.describe(elastic)}")
    print(f"           {name} {score:.4f} measured, {predicted:.4f} predicted")
    if search.limits.costs:
        print(f"           {search.limits.describe(winner)}")
    archs, scores = log.arrays()
    limit = search.limits.at_most[0] if search.traded is search.limits.costs else None
    active = one_of(_vectorised(encode.effects, search)(one(winner)))
    choices = [
        picture.Choices(
            option,
            [v if on else None for v, on in zip(elastic[option], mask, strict=True)],
            search.space.choices[option],
        )
        for option, mask in zip(elastic, active, strict=True)
    ]
    folder = search.workdir / "search"
    picture.write(
        folder / "front.png",
        picture.Series("front, predicted", values[:, 1], -values[:, 0]),
        [picture.Series("scored networks", np.asarray(cost.of(archs)), scores)],
        limit,
        (float(cost.of(one(winner))[0]), score),
        choices,
        title=f"{search.built.options['name']}: {name} and {cost.name}",
        labels={
            "cost": f"{cost.name}{', ' if cost.unit else ''}{cost.unit}",
            "score": name,
        },
        caption=f"{len(scores)} networks scored; rank correlation of the predictor {rank:.2f}",
    )
    table = [
        {
            "options": search.space.options(arch),
            "predicted_score": -row[0],
            **{c.name: v for c, v in zip(search.traded, row[1:], strict=True)},
        }
        for arch, row in zip(rows(front.archs), front.values, strict=True)
    ]
    found = {
        "options": elastic,
        "score": score,
        "predicted_score": predicted,
        "costs": {
            c.name: float(c.of(one(winner))[0])
            for c in [*search.limits.costs, *search.traded, search.macs]
        },
    }
    config = search.built.whole.config()
    record.write(folder / "front.json", table, config=config, found=found)
    print(f"written    {folder / 'front.json'} and {folder / 'front.png'}", flush=True)


def describe_next(target: pathlib.Path, small: Built) -> None:
    """Prints how to go on with the found network."""
    print(
        f"next       python run.py --job=main --workdir={target} trains it for {small.experiment.steps:,} steps, exports and"
        " measures it",
        flush=True,
    )


def stacked(archs: Sequence[Arch]) -> Arch:
    """Returns architectures with a leading axis."""
    return jax.tree.map(lambda *fields: np.stack(fields), *archs)


def rows(archs: Arch) -> list[Arch]:
    """Returns the architectures along a leading axis."""
    count = len(jax.tree.leaves(archs)[0])
    archs = jax.device_get(archs)
    return [jax.tree.map(lambda a, i=i: np.asarray(a[i]), archs) for i in range(count)]


def one(arch: Arch) -> Arch:
    """Returns an architecture with a leading axis of length 1."""
    return jax.tree.map(lambda a: np.asarray(a)[None], arch)


def one_of(archs: Arch) -> Arch:
    """Returns the first architecture along a leading axis."""
    return jax.tree.map(lambda a: np.asarray(a)[0], archs)


def key_of(arch: Arch) -> tuple:
    """Returns an architecture as a tuple, which can be hashed."""
    return tuple(np.concatenate([np.ravel(field) for field in arch]).tolist())
