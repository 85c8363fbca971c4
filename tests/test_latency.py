"""Timing: percentiles by hand, waiting for results, and alternation."""

import gc
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from squeeze_jax.cost import latency
from squeeze_jax.errors import UserError


def test_percentiles_by_hand():
    found = latency.percentiles(range(1, 102))  # 1 ... 101: percentile q is 1 + q
    assert found == dict(p50=51, p90=91, p99=100, spread=(91 - 11) / 51)
    with pytest.raises(ValueError, match="no times"):
        latency.percentiles([])


def test_measure_waits_for_the_result():
    """1000 · 1000 · 1000 multiply-adds eight times take long; dispatching them takes some 20 µs."""

    def fn(x):
        for _ in range(8):
            x = x @ x
        return x, {"sum": x.sum()}

    found = latency.measure(fn, jnp.full((1000, 1000), 1e-3), runs=5, warmup=1)
    assert set(found) == {"p50", "p90", "p99", "spread"}
    assert 0.15 < found["p50"] <= found["p90"] <= found["p99"]
    small = latency.measure(lambda x: x + 1, np.ones(4, np.float32), runs=50)
    assert 0 < small["p50"] < found["p50"]


def test_measure_compiles_before_timing():
    traces = []

    def fn(x):
        traces.append(x)
        return x * 2

    latency.measure(fn, jnp.ones(3), runs=3, warmup=0)
    assert len(traces) == 1
    assert isinstance(traces[0], jax.core.Tracer)
    with pytest.raises(
        UserError, match="runs = 0 should be a whole number, at least 1"
    ):
        latency.measure(fn, jnp.ones(3), runs=0)


def test_alternate_order_and_ratio():
    calls = []

    def sleeping(name, seconds):
        def thunk():
            calls.append(name)
            time.sleep(seconds)

        return thunk

    found = latency.alternate(
        {"slow": sleeping("slow", 0.03), "fast": sleeping("fast", 0.01)}, rounds=4
    )
    warm, rounds = calls[:2], calls[2:]
    assert warm == ["slow", "fast"]
    assert rounds == ["slow", "fast", "fast", "slow"] * 2
    assert list(found) == ["slow", "fast"]
    assert found["slow"].ratio == 1
    assert 1.5 < found["fast"].ratio < 3.5  # about 3
    assert len(found["fast"].times_ms) == 4
    assert found["slow"].median_ms >= 30
    assert found["fast"].median_ms == np.median(found["fast"].times_ms) >= 10


def test_alternate_takes_the_median_of_ratios(monkeypatch):
    """Rounds of (first, second) = (2, 1), (30, 10), (4, 4), (6, 2), (8, 1) ms: ratios 2, 3, 1, 3, 8, their median 3."""
    times = {"a": iter([2, 30, 4, 6, 8]), "b": iter([1, 10, 4, 2, 1])}
    monkeypatch.setattr(latency, "_times", lambda thunk, runs: [next(times[thunk()])])
    found = latency.alternate({"a": lambda: "a", "b": lambda: "b"}, rounds=5, warmup=0)
    assert found["a"] == (6, 1, (2, 30, 4, 6, 8))
    assert found["b"] == (2, 3, (1, 10, 4, 2, 1))


def test_garbage_collector_is_left_as_it_was():
    seen = []
    latency.alternate({"x": lambda: seen.append(gc.isenabled())}, rounds=1, warmup=0)
    assert seen == [False]
    assert gc.isenabled()


@pytest.mark.parametrize("arguments", [({}, 3), ({"a": lambda: 0}, 0)])
def test_alternate_without_work(arguments):
    with pytest.raises(
        UserError, match=r"give a dict of functions|rounds = 0 should be"
    ):
        latency.alternate(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(warmup=-1), "warmup = -1 should be a whole number, at least 0"),
        (dict(runs=0), "runs = 0 should be a whole number, at least 1"),
        (dict(runs=2.5), "runs = 2.5 should be"),
    ],
)
def test_counts_of_runs_are_checked(arguments, message):
    with pytest.raises(UserError, match=message):
        latency.measure(jnp.sin, jnp.ones(3), **arguments)


def test_what_is_no_function_is_named():
    for wrong, message in ((nn.Dense(3), "give its apply"), (3, "3 is no function")):
        with pytest.raises(UserError, match=message):
            latency.measure(wrong, jnp.ones(3))
    with pytest.raises(UserError, match="give a dict of functions"):
        latency.alternate([lambda: 1])
