"""What everything around the arithmetic costs: `python tests/benchmarks/overhead.py`.

The whole training job (input pipeline, placing, dispatch, metrics, log files, a checkpoint every 100 steps) against its
own compiled step called again and again on one batch that stays in memory. The two take turns, a block of steps each, as
processes of which one is stopped; see turns.py. The overhead of a block is its time over that of the bare block next to
it, less one. Blocks that log, that save, and that come after a save (which is still being written) are few, so medians
are taken over blocks of a kind, and the kinds are weighted by how often they occur.

Beside that stands the time that the loop's own thread spends in each part, in ms a step. It adds up to no more than an
upper bound: while the loop waits for input or dispatches, the arithmetic of the steps before goes on. What other threads
do (decoding, writing checkpoints) takes cores from the arithmetic and shows in the overhead alone.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import statistics
import tempfile
import time

import numpy as np
import turns
import workload

CACHED = dict(crop="pad", flip=True)  # decoded once, then kept
PHOTOS = dict(crop="random_resized", flip=True)  # decoded for every step
SMALL = dict(stem_strides=1, norm=True, bypass="simple", conv10_relu=False)
CASES = {  # network, size, batch, config.data, more of config.model
    "squeezenet": ("squeezenet", 64, 64, PHOTOS, {}),
    "mobilenet_v2": ("mobilenet_v2", 64, 64, PHOTOS, {}),
    "resnet18": ("resnet18", 64, 64, PHOTOS, {}),
    "squeezenet_cifar": ("squeezenet", 32, 128, CACHED, SMALL),
}
IMAGES = {
    64: 512,
    32: 1280,
}  # files to generate; the small ones are all decoded in the warm-up
LOG_EVERY, SAVE_EVERY = 50, 100
PARTS = ("input", "put", "dispatch", "means", "log", "save")


def build(case: str, folder: str, batch: int):
    network, size, usual, view, more = CASES[case]
    source = dict(name="folder", root=f"{folder}/{size}")
    return workload.build(
        network,
        batch or usual,
        dict(source=source, size=size, **view),
        model=workload.NETWORKS[network][0] | more,
        log_every=LOG_EVERY,
        save_every=SAVE_EVERY,
    )


def clocks() -> np.ndarray:
    """Seconds on the wall, and of all cores by this process."""
    return np.array([time.perf_counter(), time.process_time()])


def bare(turn, case: str, folder: str, args: argparse.Namespace) -> None:
    """Says what a block of the step alone took, as `clocks`, at each turn."""
    workload.allocator(args.malloc)
    import jax

    from squeeze_jax.jobs import fit

    built = build(case, folder, args.batch)
    step, state = workload.step(built), built.create()
    key, batches = workload.key(built), built.data.train(built.experiment.batch, seed=0)
    resident = fit.put_batch(next(batches), built)
    batches.close()
    turn(True)
    while True:
        begin = clocks()
        for _ in range(args.block):
            state, _ = step(state, resident, key)
        jax.block_until_ready(state)
        turn(clocks() - begin)


def whole(
    turn, case: str, folder: str, args: argparse.Namespace, prepared: bool = False
) -> None:
    """Says what a block of the whole job took, as (`clocks`, {part: seconds}), at each turn."""
    workload.allocator(args.malloc)
    import jax

    from squeeze_jax.data import pipeline
    from squeeze_jax.jobs import _experiment, fit
    from squeeze_jax.train import loop

    spent = collections.Counter()

    def timed(owner, name, part, wait=lambda *a: None):
        """Replaces a function by one that adds its time to `part`, after waiting for arithmetic it would wait for."""
        function = getattr(owner, name)

        def clocked(*args, **kwargs):
            wait(*args)
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter() - begin

        setattr(owner, name, clocked)

    timed(pipeline.Batches, "__next__", "input")
    timed(fit, "put", "put")
    timed(loop, "_means", "means", lambda metrics, *_: jax.block_until_ready(metrics))
    timed(fit.Log, "train", "log")
    timed(
        fit.Checkpoints,
        "save",
        "save",
        lambda self, state, *_: jax.block_until_ready(state),
    )
    built = build(case, folder, args.batch)
    compiled = workload.step(built)
    count, begin = 0, clocks()

    class Step:
        """The compiled step, which ends a block before every `args.block`-th call."""

        memory_analysis = compiled.memory_analysis

        def __call__(self, state, batch, key):
            nonlocal count, begin
            if count % args.block == 0:
                jax.block_until_ready(state)
                word = (clocks() - begin, dict(spent))
                turn(word if count else first_save)
                spent.clear()
                begin = clocks()
            count += 1
            start = time.perf_counter()
            out = compiled(state, batch, key)
            spent["dispatch"] += time.perf_counter() - start
            return out

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        # What a run does once, such as compiling checksums, has happened when the blocks begin.
        short = _experiment.build(dataclasses.replace(built.whole, steps=1))
        fit.compile_step = lambda *_: compiled
        fit.run(short, workdir(folder, "short"))
        first_save = spent["save"]
        if prepared:  # after the evaluation that the short run ends with
            pipeline.Batches.__next__ = _always_first(pipeline.Batches.__next__)
        fit.compile_step = lambda *_: Step()
        fit.run(built, workdir(folder, case))


def _always_first(following):
    """An iterator's `__next__` that stops what prepares further batches and repeats the first."""
    first = []

    def again(batches):
        if not first:
            first.append(following(batches))
            batches.close()
        return first[0]

    return again


def workdir(folder: str, name: str) -> pathlib.Path:
    return pathlib.Path(tempfile.mkdtemp(prefix=name, dir=folder))


def kind(block: int, steps: int) -> str:
    """What happens in a block, counted from 0, besides its steps."""
    first, last = block * steps, (block + 1) * steps
    if last % SAVE_EVERY == 0:
        return "save"
    if last % LOG_EVERY == 0:
        return "log"
    return "after" if block and first % SAVE_EVERY == 0 else "plain"


def measure(case: str, folder: str, args: argparse.Namespace) -> dict:
    """Alternates blocks of both, from the first step to the block after the last checkpoint."""
    cycle = SAVE_EVERY // args.block
    arguments = (case, folder, args)
    candidates = {
        "bare": (bare, arguments),
        "loop": (whole, (*arguments, True)),
        "whole": (whole, arguments),
    }
    ratios = {name: collections.defaultdict(list) for name in ("loop", "whole")}
    alone, spent = [], []
    with turns.Turns(candidates) as players:
        for block in range(args.cycles * cycle + 1):
            said = {}
            for name in list(candidates)[:: -1 if block % 2 else 1]:
                said[name] = players.take(name)
            if block >= args.warmup:
                alone.append(said["bare"])
                spent.append(said["whole"][1])
                for name, found in ratios.items():
                    clock = said[name][0]
                    found[kind(block, args.block)].append(clock / said["bare"])
    weight = {"plain": cycle - 3, "log": 1, "save": 1, "after": 1}
    medians = {
        name: {k: np.median(r, axis=0) - 1 for k, r in found.items()}
        for name, found in ratios.items()
    }
    total = {
        name: (sum(weight[k] * of[k] for k in weight) / cycle).tolist()
        for name, of in medians.items()
    }
    return {
        "case": case,
        "step_ms": 1e3 * float(np.median(alone, axis=0)[0]) / args.block,
        "overhead": {name: wall for name, (wall, _) in total.items()},
        "overhead_cpu": {name: cpu for name, (_, cpu) in total.items()},
        "overhead_of": {k: float(of[0]) for k, of in medians["whole"].items()},
        "host_ms": {
            part: 1e3 * statistics.median(s[part] for s in spent if part in s)
            for part in PARTS
        },
        "first_save_ms": 1e3 * players.ready["whole"],
        "ratios": {k: np.array(r)[:, 0].tolist() for k, r in ratios["whole"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--cycles", type=int, default=1, help="of 100 steps")
    parser.add_argument("--batch", type=int, default=0, help="instead of the case's")
    parser.add_argument("--block", type=int, default=10, help="steps: 1, 2, 5 or 10")
    parser.add_argument("--warmup", type=int, default=2, help="blocks not counted")
    parser.add_argument(
        "--malloc",
        choices=("keep", "plain"),
        default="keep",
        help="whether both keep freed memory for the next step",
    )
    parser.add_argument("--out", type=pathlib.Path, help="where to write JSON")
    args = parser.parse_args()
    if args.cycles < 1 or args.block not in (1, 2, 5, 10):
        parser.error("--cycles should be at least 1, --block 1, 2, 5 or 10")
    load, rows = workload.load(), []
    with tempfile.TemporaryDirectory() as folder:
        for size in {CASES[c][1] for c in args.cases}:
            workload.photographs(
                pathlib.Path(folder) / str(size), IMAGES[size], size * 3 // 2
            )
        for case in args.cases:
            rows.append(measure(case, folder, args))
            print(text(rows[-1], args.block))
    origin = workload.origin(load)
    print(workload.say(origin))
    if args.out:
        args.out.write_text(json.dumps({"rows": rows} | origin, indent=2) + "\n")


def text(row: dict, block: int) -> str:
    of, host = row["overhead_of"], row["host_ms"]
    kinds = {"plain": "usually", "log": "logging", "save": "saving", "after": "next"}
    each = ", ".join(f"{p} {host[p] / block:.2f}" for p in PARTS[:3])
    events = ", ".join(f"{p} {host[p]:.1f}" for p in PARTS[3:])
    takes = " ".join(
        f"{what} {row['overhead'][name]:+.1%} (CPU time {row['overhead_cpu'][name]:+.1%})"
        for name, what in (("whole", "the whole job"), ("loop", "without input"))
    )
    return (
        f"{row['case']}: {row['step_ms']:.1f} ms a step alone; {takes}\n    blocks: "
        + ", ".join(f"{kinds[k]} {of[k]:+.1%}" for k in kinds)
        + f"\n    the loop's thread, ms a step: {each}; ms each time: {events}"
        f" (the first {row['first_save_ms']:.0f})"
    )


if __name__ == "__main__":
    main()
