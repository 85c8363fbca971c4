"""What a search tells the user: the front, the best network, and its predicted and measured latencies."""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from squeeze_jax.cost import latency_table
from squeeze_jax.jobs import _found, _space
from squeeze_jax.jobs._scores import Scorer
from squeeze_jax.jobs._search_log import Log
from squeeze_jax.jobs._search_problem import Problem
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.pareto import Front
from squeeze_jax.nas.space import Arch
from squeeze_jax.report import front as picture
from squeeze_jax.report import record
from squeeze_jax.report.table import align

SHOWN = 12  # rows of the printed front
# {format of a latency table: the file that --job=benchmark measures}
FILES = {"tflite": "model.tflite", "tflite_int8": "model_int8.tflite"}


def report(
    problem: Problem,
    log: Log,
    predict: Callable,
    front: Front,
    winner: tuple[Arch, float],
    rank: float,
    scorer: Scorer,
) -> dict[str, Any]:
    """Prints the front and the best network, and writes `search/front.json` and `search/front.png`.

    Args:
      problem: the search.
      log: the scored networks.
      predict: architectures with a leading axis → predicted scores.
      front: the trade-offs, see `search.trade_offs`.
      winner: the best network and its score.
      rank: rank correlation of the predictor.
      scorer: has the name of the score and its sign.

    Returns:
      The best network's options, scores and costs.
    """
    winner, score = winner
    cost = problem.traded[0]
    name, sign = scorer.name, scorer.sign
    values = front.values[np.argsort(front.values[:, 1], kind="stable")]
    places = np.unique(np.linspace(0, len(values) - 1, SHOWN).round().astype(int))
    heading = [f"predicted {name}", *(c.name for c in problem.traded)]
    cells = [
        [f"{-sign * row[0]:.4f}", *(f"{v:.5g}" for v in row[1:])]
        for row in values[places]
    ]
    print(f"front      {len(values)} trade-offs\n{align([heading, *cells])}")
    predicted = sign * float(np.asarray(predict(spaces.stack([winner])))[0])
    score *= sign
    elastic = problem.space.options(winner)
    print(f"found      {_space.describe(elastic)}")
    print(f"           {name} {score:.4f} measured, {predicted:.4f} predicted")
    if problem.limits.costs:
        print(f"           {problem.limits.describe(winner)}")
    archs, scores = log.arrays()
    limit = (
        problem.limits.at_most[0] if problem.traded is problem.limits.costs else None
    )
    active = problem.active(winner)
    choices = [
        picture.Choices(
            option,
            [v if on else None for v, on in zip(elastic[option], mask, strict=True)],
            problem.space.choices[option],
        )
        for option, mask in zip(elastic, active, strict=True)
    ]
    folder = problem.workdir / "search"
    picture.write(
        folder / "front.png",
        picture.Series("front, predicted", values[:, 1], -sign * values[:, 0]),
        [picture.Series("scored networks", np.asarray(cost.of(archs)), sign * scores)],
        limit,
        (float(cost.of(spaces.stack([winner]))[0]), score),
        choices,
        title=f"{problem.built.options['name']}: {name} and {cost.name}",
        labels={
            "cost": f"{cost.name}{', ' if cost.unit else ''}{cost.unit}",
            "score": name,
        },
        lower_is_better=sign < 0,
        caption=f"{len(scores)} networks scored; rank correlation of the predictor {rank:.2f}",
    )
    table = [
        {
            "options": problem.space.options(arch),
            "predicted_score": -sign * row[0],
            **{c.name: v for c, v in zip(problem.traded, row[1:], strict=True)},
        }
        for arch, row in zip(spaces.unstack(front.archs), front.values, strict=True)
    ]
    found = {
        "options": elastic,
        "score": score,
        "score_name": name,
        "predicted_score": predicted,
        "costs": {
            c.name: float(c.of(spaces.stack([winner]))[0])
            for c in [*problem.limits.costs, *problem.traded, problem.macs]
        },
    }
    config = problem.built.whole.config()
    record.write(folder / "front.json", table, config=config, found=found)
    print(f"written    {folder / 'front.json'} and {folder / 'front.png'}", flush=True)
    return found


def describe_latencies(workdir: pathlib.Path, found: pathlib.Path) -> str:
    """Compares the found network's predicted latency with that of its exported file, in a line for each latency table.

    The function leaves out tables of several threads, and tables of formats that were not exported.

    Args:
      workdir: of the search.
      found: work directory of the found network, which the job benchmark has measured.
    """
    costs_of_found = _found.read(found)["found"]["costs"]
    measured = {row["model"]: row for row in record.read(found / "report.json")["rows"]}
    lines = []
    for path in sorted((workdir / "latency").glob("*.json")):
        table = latency_table.read(path)
        predicted = costs_of_found.get(table.name)
        row = measured.get(FILES.get(table.about["format"]))
        if predicted and row and table.about["threads"] == 1:
            p50 = row["latency_ms"]["p50"]
            lines.append(
                f"latency    {table.name}: {predicted:.4f} ms predicted, {p50:.4f} ms measured on this machine"
            )
    return "\n".join(lines)
