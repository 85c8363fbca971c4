"""Latency layer by layer, measured inside the compiled network as it runs on JAX's default device.

JAX's profiler records when each operation of the compiled program ran, and the program's text says which layer an
operation came from. The time of a run is divided among them so that the parts add up to the whole:

  * Wall time, not thread time: while n operations run at once, each is charged an n-th of that time.
  * A fusion is one operation and belongs to the layer with most of the arithmetic in it, see `cost.hlo`: a
    normalisation or an activation that XLA joins to a convolution counts there.
  * What is no layer's is stated: operations without a name, such as copies that the compiler adds, and the time when
    none ran: calling, scheduling, waiting for threads.
  * The parts are of the middle half of the traced runs, by their time: a mean, so that they add up, without the runs
    that something else on the machine disturbed.

A module's weights are arguments, as in a network that JAX trains: handing them over takes a microsecond or two an array,
before the first operation, where no operation runs. Exported files have them inside; `export.runtime` and
`export.operators` measure those.

Recording takes time, some µs an operation, which small networks notice; so the whole is also measured without it. Where
XLA replays a recorded graph (on NVIDIA GPUs) its kernels may come without names: `XLA_FLAGS=
--xla_gpu_enable_command_buffer=` has them run one by one.
"""

import bisect
import tempfile
import warnings
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.profiler import ProfileData, ProfileOptions, TraceAnnotation

from squeeze_jax import tree
from squeeze_jax.cost import call, hlo, program, timing
from squeeze_jax.errors import UserError

RUN = "squeeze_jax.cost.profile run"  # how a run is marked in the trace


class Profile(NamedTuple):
    """Where the time of a run goes; `by_layer`, `unnamed_ms` and `idle_ms` add up to `traced_ms`.

    Attributes:
      by_layer: ms of each layer that took any, in order of use, without the layers in it.
      unnamed_ms: of operations that belong to no layer.
      idle_ms: while no operation ran.
      traced_ms: a run while it was recorded.
      latency: dict(p50, p90, p99, spread) of runs that were not recorded, as in `timing.percentiles`.
    """

    by_layer: dict[str, float]
    unnamed_ms: float
    idle_ms: float
    traced_ms: float
    latency: dict[str, float]

    @property
    def elsewhere_ms(self) -> float:
        """What no layer is charged."""
        return self.unnamed_ms + self.idle_ms


class Interval(NamedTuple):
    """An operation as it ran: ns on the trace's clock."""

    start: float
    end: float
    operation: str


def measure(
    fn: Callable | nn.Module,
    *args: Any,
    variables: Any = None,
    runs: int = 100,
    traced: int = 40,
    warmup: int = 10,
    **kwargs: Any,
) -> Profile:
    """Compiles `fn(*args, **kwargs)` and measures it, as a whole and layer by layer.

    Args:
      fn: a function of arrays. Of a Linen module it is the forward pass, of a tuple that this returns the first
        alone, without a network's endpoints; layers are named as its parameters are. Of another function they are
        named by the modules in it, and "" is what it does outside of them.
      *args: pytrees of arrays; for a module what follows the variables.
      variables: of a module; freshly initialised ones by default.
      runs: timed runs of the whole, at least 1.
      traced: recorded runs, at least 1.
      warmup: runs before each of the two.
      **kwargs: arrays are inputs, others are static, such as `train=False`.

    Raises:
      UserError: too few runs; or nothing was recorded, as where JAX's profiler cannot on this device, or records for
        somebody else.
    """
    if runs < 1 or traced < 1:
        raise UserError(
            f"runs = {runs} and traced = {traced}: at least one run of each is needed"
        )
    paths = _paths(program.trace(fn, *args, first=True, **kwargs))
    compiled, given = _compiled(fn, args, kwargs, variables, paths)
    root = program.root(fn) if isinstance(fn, nn.Module) else ""
    module, operations = hlo.operations(compiled.as_text(), paths, root)

    def once():
        return jax.block_until_ready(compiled(*given))

    for _ in range(warmup):
        once()
    whole = timing.percentiles(timing.times(once, runs))
    windows, intervals = _recorded(once, traced, warmup, module)
    parts = [
        _divided(window, _settled(inside, operations), operations)
        for window, inside in _by_run(windows, intervals)
    ]
    shares = _middle(parts)
    total = sum(shares.values())
    idle, unnamed = shares.pop(_IDLE, 0.0), shares.pop(None, 0.0)
    by_layer = {k: shares[k] for k in dict.fromkeys([*paths, *shares]) if k in shares}
    return Profile(by_layer, unnamed, idle, total, whole)


def _compiled(fn, args, kwargs, variables, paths):
    """The compiled program of (variables, args), and these two: of a function that is no module the first is empty."""
    shapes, run, arrays = call.measured(fn, args, kwargs)
    if not isinstance(fn, nn.Module):
        variables = shapes  # arrays: an NNX module's state, or what a function without arguments closes over
    elif shapes and variables is None:

        def init(key):
            return call.initialised(fn, key, args, kwargs)

        # It runs once: on the CPU, optimizing it would take longer than all it computes.
        quick = {"xla_backend_optimization_level": 0}
        options = quick if jax.default_backend() == "cpu" else {}
        key = jax.random.key(0)
        variables = jax.jit(init).lower(key).compile(options)(key)

    def profiled(variables, inputs):
        return run(variables, inputs)

    # A program from the cache on disk has the names of layers of the one that was compiled first. The key of the cache
    # leaves names out but for the function's own.
    names = repr((list(paths), list(tree.flatten(shapes))))
    profiled.__name__ = f"profiled_{zlib.crc32(names.encode()):08x}"
    given = jax.device_put((variables or {}, arrays))
    return jax.jit(profiled).lower(*given).compile(), given


def _paths(traced: program.Program) -> dict[str, None]:
    """The layers of a program, in order of use."""
    found = {}
    for op in traced.operations:
        found[op.layer] = None
        for body in op.bodies:
            found |= _paths(body)
    return found


def _recorded(
    once: Callable, runs: int, warmup: int, module: str
) -> tuple[list[tuple[float, float]], list[Interval]]:
    """Records runs: (start, end) of each, ns, and the operations of the module that ran meanwhile."""

    def run():
        with TraceAnnotation(RUN):
            once()

    options = ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            jax.profiler.start_trace(folder, profiler_options=options)
        except RuntimeError as error:
            raise UserError(
                f"cannot record while another trace is: stop it first ({error})"
            ) from None
        try:
            for _ in range(warmup):  # not marked: the recorder's own first time
                once()
            timing.times(run, runs)
        finally:
            jax.profiler.stop_trace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        with warnings.catch_warnings():
            # From Python 3.12 on a type of the reader's own makes one, which as an error would end the process.
            warnings.simplefilter("ignore", DeprecationWarning)
            windows, intervals = _events(ProfileData.from_file(str(path)), module)
    if len(windows) != runs or not intervals:
        raise UserError(
            f"JAX's profiler recorded no operations on this device ({jax.default_backend()}): measure the whole alone"
        )
    return windows, intervals


def _events(trace: ProfileData, module: str):
    """The marked runs, and the operations on the devices; on the CPU's they are among the host's events."""
    windows, devices, host = [], [], []
    for plane in trace.planes:
        ends, found = {}, []
        for line in plane.lines:
            for event in line.events:
                start, end, stats = event.start_ns, event.end_ns, dict(event.stats)
                if event.name == RUN:
                    windows.append((start, end))
                elif event.name.startswith("end: "):
                    ends[stats.get("_c")] = start
                elif "hlo_op" in stats and stats.get("hlo_module") == module:
                    found.append((start, end, stats["hlo_op"], stats.get("_p")))
        # An operation that hands work to other threads returns at once; another event follows when that is done.
        spans = [
            Interval(start, max(end, ends.get(key, 0)), name)
            for start, end, name, key in found
        ]
        (devices if plane.name.startswith("/device:") else host).extend(spans)
    return sorted(windows), sorted(devices or host)


def _by_run(windows, intervals):
    """Yields each run's (start, end) with the intervals that began in it."""
    starts = [interval.start for interval in intervals]
    nexts = [start for start, _ in windows[1:]] + [float("inf")]
    for window, following in zip(windows, nexts, strict=True):
        first = bisect.bisect_left(starts, window[0])
        yield window, intervals[first : bisect.bisect_left(starts, following)]


def _settled(
    intervals: Sequence[Interval], operations: dict[str, hlo.Operation]
) -> list[Interval]:
    """Intervals that end where an operation that reads their results begins, at the latest.

    The end of work on other threads may be recorded late, after what it let go on.
    """
    ends = [interval.end for interval in intervals]
    last = {}
    for i, interval in enumerate(intervals):
        for name in operations.get(interval.operation, hlo.Operation()).inputs:
            if name in last:
                ends[last[name]] = min(ends[last[name]], interval.start)
        last[interval.operation] = i
    return [
        interval._replace(end=end)
        for interval, end in zip(intervals, ends, strict=True)
    ]


_IDLE = object()


def _divided(window, intervals, operations) -> dict[Any, float]:
    """Divides a run's time, in ms, among layers, None for operations without, and _IDLE.

    While several operations run each is charged its part; one that others run inside only when none of them does.
    """
    changes = []
    for interval in intervals:
        layer, container = operations.get(interval.operation, hlo.Operation())[:2]
        for time, step in (interval.start, 1), (interval.end, -1):
            changes.append(
                (min(max(time, window[0]), window[1]), step, layer, container)
            )
    changes.sort(key=lambda change: change[0])
    running = {True: {}, False: {}}
    parts, before = {_IDLE: 0.0}, window[0]
    for time, step, layer, container in [*changes, (window[1], 0, None, False)]:
        active = running[False] or running[True] or {_IDLE: 1}
        whole = sum(active.values())
        for each, count in active.items():
            passed = 1e-6 * (time - before) * count / whole
            parts[each] = parts.get(each, 0.0) + passed
        before = time
        group = running[container]
        group[layer] = group.get(layer, 0) + step
        if not group[layer]:
            del group[layer]
    return parts


def _middle(parts: Sequence[dict[Any, float]]) -> dict[Any, float]:
    """The mean of the middle half by total time."""
    ranked = sorted(parts, key=lambda part: sum(part.values()))
    kept = ranked[len(ranked) // 4 : len(ranked) - len(ranked) // 4]
    keys = dict.fromkeys(key for part in kept for key in part)
    return {k: float(np.mean([part.get(k, 0.0) for part in kept])) for k in keys}
