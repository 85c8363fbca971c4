"""Evolutionary search: on NAS-Bench-Macro it finds the optimum, and what it returns is within the budget."""

import gzip
import json

import jax
import numpy as np
import pytest

from squeeze_jax.errors import UserError
from squeeze_jax.nas import space as spaces
from squeeze_jax.nas.evolve import evolve

POSITIONS = 8
SPACE = spaces.from_choices({"block": ((0, 1, 2),) * POSITIONS})


@pytest.fixture(scope="module")
def benchmark(shared):
    """(accuracy, MACs) of all 3**8 networks of NAS-Bench-Macro, each [3, ...] by the choice of each position."""
    with gzip.open(shared / "data" / "nas" / "nas_bench_macro_cifar10.json.gz") as file:
        rows = json.load(file)
    shape = (3,) * POSITIONS
    accuracy, macs = np.zeros(shape), np.zeros(shape)
    for digits, row in rows.items():
        place = tuple(map(int, digits))
        accuracy[place], macs[place] = row["mean_acc"], row["flops"]
    return accuracy, macs


def lookup(table):
    return lambda archs: table[tuple(np.asarray(archs.block).T)]


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all", "half of the MACs"])
def test_it_finds_the_optimum_more_often_than_random_search(benchmark, share):
    """Random search with q different queries finds one optimum among n with the probability q / n."""
    accuracy, macs = benchmark
    budget = share * macs.max()
    within = macs <= budget
    optimum = accuracy[within].max()
    runs = [
        evolve(
            jax.random.key(seed),
            SPACE,
            lookup(accuracy),
            lookup(macs),
            float(budget),
            population=30,
            rate=0.2,
            generations=20,
        )
        for seed in range(10)
    ]
    assert all(run.cost <= budget for run in runs)
    assert all(run.cost == macs[tuple(run.arch.block)] for run in runs)
    assert all(run.score == accuracy[tuple(run.arch.block)] for run in runs)
    assert all(np.all(np.diff(run.history) >= 0) for run in runs)
    assert all(run.queries <= 30 * 21 for run in runs)
    random = np.mean([run.queries for run in runs]) / within.sum()
    assert np.mean([run.score == optimum for run in runs]) > max(0.5, 3 * random)


def test_the_same_key_gives_the_same_architecture(benchmark):
    accuracy, macs = benchmark
    first, second = (
        evolve(
            jax.random.key(1),
            SPACE,
            lookup(accuracy),
            lookup(macs),
            float(macs.max()),
            population=10,
            generations=2,
        )
        for _ in range(2)
    )
    np.testing.assert_array_equal(first.arch.block, second.arch.block)
    assert first.score == second.score


def test_a_budget_that_only_the_smallest_fits_is_met():
    """Costs are the sums of the choices; the budget is 1, and random architectures cost 8 on average."""

    def cost(archs):
        return np.asarray(archs.block).sum(-1)

    best = evolve(jax.random.key(0), SPACE, cost, cost, 1.0, population=20)
    assert best.cost == 1
    assert sorted(best.arch.block)[-2:] == [0, 1]


def test_positions_without_effect_make_no_copies_of_a_network():
    """Only two of eight positions have an effect: there are nine networks, and each is scored once."""

    def score(archs):
        return np.asarray(archs.block)[:, :2].sum(-1)

    def canonical(archs):
        block = np.asarray(archs.block).copy()
        block[:, 2:] = 0
        return archs._replace(block=block)

    options = dict(population=20, generations=10, canonical=canonical)
    found = evolve(jax.random.key(0), SPACE, score, score, 9.0, **options)
    assert found.queries == 9
    assert len(np.unique(found.archs.block, axis=0)) == 9


def test_an_impossible_budget_names_the_lowest_cost():
    def cost(archs):
        return np.asarray(archs.block).sum(-1) + 2.5

    with pytest.raises(UserError, match=r"costs at most 2: the lowest cost .* is 2\.5"):
        evolve(jax.random.key(0), SPACE, cost, cost, 2.0, population=20)
