"""Latency of each layer, measured inside the compiled network as it runs on JAX's default device.

JAX's profiler records when each operation of the compiled program ran, and the program's text tells which layer an
operation came from. The time of a run is divided among the layers so that the shares add up to the whole:

  * Shares are wall time, not thread time: while n operations run at once, each is charged an n-th of that time.
  * A fusion is one operation and belongs to the layer with most of its arithmetic, see `cost.hlo`: a normalisation or
    activation that XLA fuses into a convolution counts in the convolution's layer.
  * Time outside all layers is reported: operations without a name, such as copies that the compiler adds, and the time
    when no operation ran, which goes to calling, scheduling and waiting for threads.
  * Shares are means over the middle half of the recorded runs, ranked by their time. Means add up, and the middle half
    excludes runs that something else on the machine disturbed.

A module's weights are arguments, as in a network that JAX trains. Passing them takes one or two microseconds per array
before the first operation, while no operation runs. Exported files contain their weights; `export.runtime` and
`export.operators` measure those files.

Recording takes time, some µs per operation, which is noticeable in small networks. So the latency of the whole network is
also measured without recording. Where XLA replays a recorded graph (on NVIDIA GPUs), its kernels may have no names;
`XLA_FLAGS=--xla_gpu_enable_command_buffer=` makes them run one by one.
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

RUN = "squeeze_jax.cost.profile run"  # event that marks a run in the trace


class Profile(NamedTuple):
    """The time of a run, divided among layers: `by_layer`, `unnamed_ms` and `idle_ms` add up to `traced_ms`.

    Attributes:
      by_layer: {layer: ms} of the layers that took time, in order of use, each without the layers inside it.
      unnamed_ms: time in operations that belong to no layer.
      idle_ms: time when no operation ran.
      traced_ms: time of a recorded run.
      latency: dict(p50, p90, p99, spread) in ms of runs that were not recorded, see `timing.percentiles`.
    """

    by_layer: dict[str, float]
    unnamed_ms: float
    idle_ms: float
    traced_ms: float
    latency: dict[str, float]

    @property
    def elsewhere_ms(self) -> float:
        """The time outside all layers."""
        return self.unnamed_ms + self.idle_ms


class Interval(NamedTuple):
    """One execution of an operation: start and end in ns on the trace's clock."""

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
    """Compiles `fn(*args, **kwargs)` and measures the latency of the whole and of each layer.

    Args:
      fn: a function of arrays. For a Linen module the forward pass is measured; if it returns a tuple, such as (logits,
        endpoints), only the first element is computed. Layers are named as the module's parameters are. Layers of a plain
        function are named after the modules that it calls, and "" is the function outside them.
      *args: pytrees of arrays; for a module the arguments after the variables.
      variables: variables of a module; newly initialised ones by default.
      runs: timed runs of the whole, at least 1.
      traced: recorded runs, at least 1.
      warmup: runs before the timed runs, and again before the recorded runs.
      **kwargs: arrays are inputs; other arguments, such as `train=False`, are static.

    Raises:
      UserError: too few runs, another trace is being recorded, or JAX's profiler records no operations on this device.
    """
    if runs < 1 or traced < 1:
        raise UserError(
            f"runs = {runs} and traced = {traced}: at least one run of each is needed"
        )
    layers = _layers_in_order(program.trace(fn, *args, first_output=True, **kwargs))
    compiled, inputs = _compile(fn, args, kwargs, variables, layers)
    root = program.root(fn) if isinstance(fn, nn.Module) else ""
    module, operations = hlo.operations(compiled.as_text(), layers, root)

    def once():
        return jax.block_until_ready(compiled(*inputs))

    for _ in range(warmup):
        once()
    latency = timing.percentiles(timing.times(once, runs))
    windows, intervals = _record(once, traced, warmup, module)
    run_shares = [
        _divide_among_layers(window, _trim_to_readers(ran, operations), operations)
        for window, ran in _by_run(windows, intervals)
    ]
    shares = _middle_half_mean(run_shares)
    total = sum(shares.values())
    idle, unnamed = shares.pop(_IDLE, 0.0), shares.pop(None, 0.0)
    by_layer = {k: shares[k] for k in dict.fromkeys([*layers, *shares]) if k in shares}
    return Profile(by_layer, unnamed, idle, total, latency)


def _compile(fn, args, kwargs, variables, layers):
    """Compiles a function or module.

    Args:
      fn, args, kwargs, variables: as for `measure`.
      layers: layers of the traced program.

    Returns:
      (compiled function of (weights, arrays), (weights, arrays)). Weights are a module's variables or state, or the arrays
      that a function without arguments closes over; a function with arguments has none.
    """
    shapes, run, arrays = call.split_for_compilation(fn, args, kwargs)
    if not isinstance(fn, nn.Module):
        variables = shapes  # arrays and not shapes here
    elif shapes and variables is None:

        def init(key):
            return call.init_variables(fn, key, args, kwargs)

        # Initialization runs once: on a CPU, optimizing its program takes longer than running it.
        quick = {"xla_backend_optimization_level": 0}
        options = quick if jax.default_backend() == "cpu" else {}
        key = jax.random.key(0)
        variables = jax.jit(init).lower(key).compile(options)(key)

    def profiled(variables, inputs):
        return run(variables, inputs)

    # JAX's cache on disk ignores layer names, so a cached program may carry another network's layer names. The cache's key
    # includes the function's name, which therefore depends on the layer names here.
    names = repr((list(layers), list(tree.flatten(shapes))))
    profiled.__name__ = f"profiled_{zlib.crc32(names.encode()):08x}"
    inputs = jax.device_put((variables or {}, arrays))
    return jax.jit(profiled).lower(*inputs).compile(), inputs


def _layers_in_order(traced: program.Program) -> dict[str, None]:
    """Returns the layers of a program as the keys of a dict, in order of use."""
    layers = {}
    for op in traced.operations:
        layers[op.layer] = None
        for body in op.bodies:
            layers |= _layers_in_order(body)
    return layers


def _record(
    once: Callable, runs: int, warmup: int, module: str
) -> tuple[list[tuple[float, float]], list[Interval]]:
    """Records runs with JAX's profiler.

    Args:
      once: runs the compiled function once.
      runs: number of recorded runs.
      warmup: runs before them, with the profiler on.
      module: name of the compiled program.

    Returns:
      ((start, end) of each run in ns, the program's operations that ran during the recording), both in order.

    Raises:
      UserError: another trace is being recorded, or the profiler records no operations on this device.
    """

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
            for _ in range(warmup):  # not marked as runs: the profiler's own warm-up
                once()
            timing.times(run, runs)
        finally:
            jax.profiler.stop_trace()
        (path,) = Path(folder).rglob("*.xplane.pb")
        with warnings.catch_warnings():
            # From Python 3.12 on, a type of ProfileData warns; if warnings are errors, this would end the process.
            warnings.simplefilter("ignore", DeprecationWarning)
            windows, intervals = _read_events(ProfileData.from_file(str(path)), module)
    if len(windows) != runs or not intervals:
        raise UserError(
            f"JAX's profiler recorded no operations on this device ({jax.default_backend()}): measure only the whole, with"
            " latency.measure"
        )
    return windows, intervals


def _read_events(trace: ProfileData, module: str):
    """Returns ((start, end) of each marked run, intervals of the program's operations), both in order.

    Operations on a CPU are among the host's events; they count if no device has events of its own.
    """
    windows, devices, host = [], [], []
    for plane in trace.planes:
        ends, events = {}, []
        for line in plane.lines:
            for event in line.events:
                start, end, stats = event.start_ns, event.end_ns, dict(event.stats)
                if event.name == RUN:
                    windows.append((start, end))
                elif event.name.startswith("end: "):
                    ends[stats.get("_c")] = start
                elif "hlo_op" in stats and stats.get("hlo_module") == module:
                    events.append((start, end, stats["hlo_op"], stats.get("_p")))
        # An operation that passes work to other threads returns at once; another event follows when the work is done.
        spans = [
            Interval(start, max(end, ends.get(key, 0)), name)
            for start, end, name, key in events
        ]
        (devices if plane.name.startswith("/device:") else host).extend(spans)
    return sorted(windows), sorted(devices or host)


def _by_run(windows, intervals):
    """Yields each run's (start, end) with the intervals that began between its start and the next run's start."""
    starts = [interval.start for interval in intervals]
    next_starts = [start for start, _ in windows[1:]] + [float("inf")]
    for window, next_start in zip(windows, next_starts, strict=True):
        first = bisect.bisect_left(starts, window[0])
        yield window, intervals[first : bisect.bisect_left(starts, next_start)]


def _trim_to_readers(
    intervals: Sequence[Interval], operations: dict[str, hlo.Operation]
) -> list[Interval]:
    """Returns the intervals, each cut where an operation that reads its result begins.

    The end of work on other threads may be recorded late, after the operations that waited for it have begun.
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


_IDLE = object()  # key of the time when no operation ran


def _divide_among_layers(window, intervals, operations) -> dict[Any, float]:
    """Divides a run's time among layers and returns {layer: ms}.

    The key None holds the time of operations without a layer, _IDLE the time when no operation ran. While several operations
    run, each is charged an equal share. A container, such as a loop, is charged only while no operation runs inside it.

    Args:
      window: (start, end) of the run in ns.
      intervals: operations that began in the run.
      operations: {name: operation} of the compiled program.
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
    shares, before = {_IDLE: 0.0}, window[0]
    for time, step, layer, container in [*changes, (window[1], 0, None, False)]:
        active = running[False] or running[True] or {_IDLE: 1}
        running_count = sum(active.values())
        for key, count in active.items():
            share_ms = 1e-6 * (time - before) * count / running_count
            shares[key] = shares.get(key, 0.0) + share_ms
        before = time
        group = running[container]
        group[layer] = group.get(layer, 0) + step
        if not group[layer]:
            del group[layer]
    return shares


def _middle_half_mean(run_shares: Sequence[dict[Any, float]]) -> dict[Any, float]:
    """Returns the mean {layer: ms} over the middle half of the runs, ranked by total time."""
    ranked = sorted(run_shares, key=lambda shares: sum(shares.values()))
    kept = ranked[len(ranked) // 4 : len(ranked) - len(ranked) // 4]
    keys = dict.fromkeys(key for shares in kept for key in shares)
    return {k: float(np.mean([shares.get(k, 0.0) for shares in kept])) for k in keys}
