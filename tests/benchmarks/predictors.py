"""Accuracy predictors against tables of trained networks, `python tests/benchmarks/predictors.py --data DIR`.

The tables are NAS-Bench-201 (validation accuracies on CIFAR-10 after 12 epochs) and NAS-Bench-Macro. For each number of samples it
prints the rank correlation of the predictions with the scores of the other architectures, and what a search with as many samples
and `--top` further queries finds, against random search and regularised evolution. Regret is the largest score of the table minus
the score that was found, in percentage points. "evolution" is the number of queries after which regularised evolution's mean
regret is as small, and "ratio" that number divided by the predictor's number of queries.
"""

import argparse
import csv
import gzip
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import workload  # noqa: F401, the path of the project

import squeeze_jax
from squeeze_jax.nas import (
    encode,
    predict_graph,
    predict_mlp,
    predict_two_stage,
    random_search,
    regularised_evolution,
    search_predicted,
)
from squeeze_jax.nas import space as spaces

OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # in the order of the file
POPULATIONS = ((100, 10), (25, 5))  # of evolution, with its tournament
REJECTED = 0.2  # share of the samples below the threshold of the two stages


class Table(NamedTuple):
    """All architectures of a benchmark.

    Attributes:
      space: the space, with one option.
      choices: [n, positions].
      rows: row of each architecture, with an axis for each position.
      scores: [n], in percent.
      graphs: adjacency and nodes.
    """

    space: spaces.Space
    choices: np.ndarray
    rows: np.ndarray
    scores: np.ndarray
    graphs: tuple[np.ndarray, np.ndarray]

    def places(self, archs) -> np.ndarray:
        """Returns the rows of architectures."""
        return self.rows[tuple(np.asarray(archs[0]).T)]

    def score(self, archs) -> np.ndarray:
        """Returns the scores of architectures."""
        return self.scores[self.places(archs)]


def nas_bench_201(data: Path) -> Table:
    """Returns the table; scores are validation accuracies on CIFAR-10."""
    path = data / "nas" / "nasbench201_acc12ep_and_latency.csv.gz"
    with gzip.open(path, "rt") as file:
        rows = list(csv.DictReader(file))
    cells = [row["cellstr"].replace("+", "").split("|") for row in rows]
    choices = np.asarray(
        [[OPERATIONS.index(op.split("~")[0]) for op in cell if op] for cell in cells]
    )
    space = spaces.from_choices({"edge": (tuple(range(len(OPERATIONS))),) * 6})
    scores = np.asarray([float(row["cifar10-val"]) for row in rows])
    return Table(space, choices, rows_of(space, choices), scores, cell_graphs(choices))


def cell_graphs(choices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns adjacency [n, 8, 8] and nodes [n, 8, 7] of cells: input, six operations, output.

    Operations "none", and those that no path from the input to the output passes, are no nodes.
    """
    count = len(choices)
    nodes = np.zeros((count, 8, 7), np.float32)
    nodes[:, 0, 5] = nodes[:, 7, 6] = 1
    nodes[:, 1:7, :5] = np.eye(5)[choices]
    edges = np.zeros((8, 8), np.float32)
    ends = [(None, 0), *EDGES, (3, None)]  # input and output as operations
    for i, (_, head) in enumerate(ends):
        for j, (tail, _) in enumerate(ends):
            edges[i, j] = head is not None and head == tail
    used = np.ones((count, 8), np.float32)
    used[:, 1:7] = choices > 0
    adjacency = edges * used[:, :, None] * used[:, None, :]
    paths = np.eye(8) + adjacency
    for _ in range(2):
        paths = np.minimum(paths @ paths, 1)
    used *= np.minimum(paths[:, 0, :], paths[:, :, 7])
    used[:, [0, 7]] = 1
    adjacency *= used[:, :, None] * used[:, None, :]
    return adjacency.astype(np.float32), nodes * used[..., None]


def nas_bench_macro(data: Path) -> Table:
    """Returns the table; scores are mean test accuracies on CIFAR-10."""
    with gzip.open(data / "nas" / "nas_bench_macro_cifar10.json.gz") as file:
        rows = json.load(file)
    choices = np.asarray([list(map(int, digits)) for digits in rows])
    space = spaces.from_choices({"block": ((0, 1, 2),) * 8})
    archs = space.arch_type(choices)
    graphs = jax.device_get(jax.vmap(encode.chain_of_positions(space))(archs))
    scores = np.asarray([row["mean_acc"] for row in rows.values()])
    return Table(space, choices, rows_of(space, choices), scores, graphs)


def rows_of(space: spaces.Space, choices: np.ndarray) -> np.ndarray:
    """Returns the row of each architecture, with an axis for each position."""
    rows = np.empty(np.concatenate(list(space.sizes)), int)
    rows[tuple(choices.T)] = np.arange(len(choices))
    return rows


def predictors(table: Table, members: int) -> dict:
    """Returns {name: (key, rows of samples, scores) → predictions for the whole table}."""
    features = np.asarray(
        jax.vmap(lambda arch: spaces.one_hot(table.space, arch))(
            table.space.arch_type(table.choices)
        )
    )
    adjacency, nodes = table.graphs

    def mlp(key, rows, scores):
        fitted = predict_mlp.fit(key, features[rows], scores, members=members)
        return predict_mlp.predict(fitted, features)

    def graph(key, rows, scores):
        fitted = predict_graph.fit(
            key, adjacency[rows], nodes[rows], scores, members=members
        )
        return predict_graph.predict(fitted, adjacency, nodes)

    def two_stage(key, rows, scores):
        threshold = float(np.quantile(scores, REJECTED))
        fitted = predict_two_stage.fit(
            key, adjacency[rows], nodes[rows], scores, threshold, members=members
        )
        return predict_two_stage.predict(fitted, adjacency, nodes)

    return {"MLP": mlp, "graph": graph, "two stages": two_stage}


def measure(table: Table, name: str, predictor, samples: int, args) -> dict:
    """Returns means over seeds: rank correlations, and the largest score after each query."""
    from scipy import stats

    kendall, spearman, histories, seconds = [], [], [], []
    for seed in range(args.seeds):
        predictions = []

        def fit(key, archs, scores, predictions=predictions):
            begin = time.perf_counter()
            predictions.append(np.asarray(predictor(key, table.places(archs), scores)))
            seconds.append(time.perf_counter() - begin)
            return lambda others: predictions[0][table.places(others)]

        log = search_predicted.search(
            jax.random.key(seed),
            table.space,
            table.score,
            fit,
            queries=samples + args.top,
            samples=samples,
        )
        held_out = np.ones(len(table.scores), bool)
        held_out[table.places(log.archs)[:samples]] = False
        pair = predictions[0][held_out], table.scores[held_out]
        kendall.append(stats.kendalltau(*pair).statistic)
        spearman.append(stats.spearmanr(*pair).statistic)
        histories.append(log.history)
    return {
        "predictor": name,
        "samples": samples,
        "kendall": float(np.mean(kendall)),
        "kendall_deviation": float(np.std(kendall)),
        "spearman": float(np.mean(spearman)),
        "history": np.mean(histories, 0).tolist(),
        "seconds": float(np.median(seconds)),
    }


def baselines(table: Table, args) -> dict[str, np.ndarray]:
    """Returns {name: mean over seeds of the largest score after each query}."""

    def mean_history(search, **options):
        logs = [
            search(
                jax.random.key(seed),
                table.space,
                table.score,
                queries=args.queries,
                **options,
            )
            for seed in range(args.seeds)
        ]
        # A search that finds no new architecture keeps its best.
        histories = [
            np.pad(log.history, (0, args.queries - len(log.scores)), "edge")
            for log in logs
        ]
        return np.mean(histories, 0)

    histories = {"random": mean_history(random_search.search)}
    for population, tournament in POPULATIONS:
        histories[f"evolution, population {population}"] = mean_history(
            regularised_evolution.search, population=population, tournament=tournament
        )
    return histories


def needed(history: np.ndarray, score: float) -> int | None:
    """Returns the number of queries after which a search's mean score is at least `score`; None if it never is."""
    reached = np.flatnonzero(history >= score - 1e-9)
    return int(reached[0]) + 1 if len(reached) else None


def print_row(table: Table, row: dict, histories: dict, top: int) -> None:
    """Prints a predictor's line of the table."""
    best, score = table.scores.max(), row["history"][-1]
    queries = row["samples"] + top
    evolutions = [h for name, h in histories.items() if name.startswith("evolution")]
    counts = [needed(history, score) for history in evolutions]
    count = min((c for c in counts if c is not None), default=None)
    sign, number = ("", count) if count else ("> ", max(map(len, evolutions)))
    cells = [
        f"{row['predictor']:<11}{row['samples']:>8}",
        f"{row['kendall']:>8.3f} ± {row['kendall_deviation']:.3f}",
        f"{row['spearman']:>10.3f}{row['seconds']:>9.1f}{queries:>9}",
        f"{max(best - score, 0):>8.2f}{best - histories['random'][queries - 1]:>8.2f}",
        f"{sign + str(number):>11}{f'{sign}{number / queries:.1f}':>8}",
    ]
    print("".join(cells), flush=True)


def print_searches(table: Table, histories: dict) -> None:
    """Prints the regret of the searches without a predictor."""
    best, marks = table.scores.max(), (50, 70, 100, 150, 222, 384, 1000, 2000)
    print(f"\n{'regret by queries':<28}" + "".join(f"{q:>8}" for q in marks))
    for name, history in histories.items():
        known = [q for q in marks if q <= len(history)]
        cells = [f"{max(best - history[q - 1], 0):>8.2f}" for q in known]
        print(f"{name:<28}" + "".join(cells), flush=True)


def draw(path: str, results: dict, top: int) -> None:
    """Writes a figure: correlation by samples, and regret by queries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(results), 2, figsize=(11, 4 * len(results)), squeeze=False
    )
    for (name, (table, rows, histories)), (left, right) in zip(
        results.items(), axes, strict=True
    ):
        best = table.scores.max()
        for number, predictor in enumerate(dict.fromkeys(r["predictor"] for r in rows)):
            own = [row for row in rows if row["predictor"] == predictor]
            samples = [row["samples"] for row in own]
            left.errorbar(
                samples,
                [row["kendall"] for row in own],
                [row["kendall_deviation"] for row in own],
                marker="o",
                capsize=3,
                color=f"C{number}",
                label=predictor,
            )
            right.plot(
                [n + top for n in samples],
                [best - row["history"][-1] for row in own],
                "o-",
                color=f"C{number}",
                label=f"{predictor}, {top} queries after the samples",
            )
        for (label, history), style in zip(
            histories.items(), ("-", "--", ":"), strict=True
        ):
            right.plot(
                np.arange(1, len(history) + 1),
                best - history,
                style,
                color="0.3",
                label=label,
            )
        left.set(
            title=name,
            xscale="log",
            xlabel="samples",
            ylabel="Kendall's tau, held-out architectures",
        )
        marks = sorted({row["samples"] for row in rows})
        left.set_xticks(marks, marks)
        left.set_xticks([], minor=True)
        left.legend()
        smallest = min(best - row["history"][-1] for row in rows)
        right.set(
            title=name,
            xscale="log",
            yscale="log",
            xlabel="queries",
            ylabel="regret, percentage points",
            xlim=(20, None),
            ylim=(max(smallest / 2, 1e-3), 2 * (best - histories["random"][19])),
        )
        right.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints a table for each benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, help="folder with nas/")
    parser.add_argument("--tables", default="nas_bench_201,nas_bench_macro")
    parser.add_argument("--samples", default="20,50,100,172,334")
    parser.add_argument("--top", type=int, default=50, help="queries after the samples")
    parser.add_argument("--queries", type=int, default=2000, help="of the baselines")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--members", type=int, default=1)
    parser.add_argument("--figure", help="PNG file to write")
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    results = {}
    for name in args.tables.split(","):
        table = {
            "nas_bench_201": nas_bench_201,
            "nas_bench_macro": nas_bench_macro,
        }[name](args.data)
        print(f"\n{name}: {len(table.scores)} architectures, {args.seeds} seeds")
        histories = baselines(table, args)
        print_searches(table, histories)
        print(
            f"\n{'predictor':<11}{'samples':>8}{'Kendall':>16}{'Spearman':>10}{'seconds':>9}{'queries':>9}{'regret':>8}"
            f"{'random':>8}{'evolution':>11}{'ratio':>8}"
        )
        rows = []
        for predictor_name, predictor in predictors(table, args.members).items():
            for samples in map(int, args.samples.split(",")):
                rows.append(measure(table, predictor_name, predictor, samples, args))
                print_row(table, rows[-1], histories, args.top)
        results[name] = table, rows, histories
    if args.figure:
        draw(args.figure, results, args.top)
    if args.out:
        content = {
            "version": squeeze_jax.__version__,
            "jax": jax.__version__,
            "seeds": args.seeds,
            "tables": {
                name: {
                    "predictors": rows,
                    "searches": {k: h.tolist() for k, h in histories.items()},
                }
                for name, (_, rows, histories) in results.items()
            },
        }
        Path(args.out).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
