"""Whole training steps of networks: ours, XLA's own convolutions and PyTorch, `python tests/benchmarks/steps.py`.

A step is forward, backward and SGD with momentum on one batch that stays in memory, in float32 on all cores. "native" is
our network with every convolution and pooling left to XLA, as stock Flax has them. The three are processes that take
turns; see turns.py. Beside times it states how long compilation took and how much memory XLA plans for intermediate
results. The median over rounds of the ratios of one round counts.

With --inference it is one image at a time, forward only.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import peer
import turns
import workload


def ours(turn, network, args, lowering="auto") -> None:
    """Says {"parameters", "compile_s", "memory_mb"}, then seconds of a step at each turn."""
    workload.allocator("keep")
    import contextlib

    import jax
    import jax.numpy as jnp

    from squeeze_jax import tree
    from squeeze_jax.jobs import fit
    from squeeze_jax.nn import conv
    from squeeze_jax.train import forward

    native = conv.lowering("native")
    with native if lowering == "native" else contextlib.nullcontext():
        data = dict(source=dict(name="digits"), size=args.size, channels=3)
        built = workload.build(network, args.batch, data)
        state = built.create()
        rng = np.random.default_rng(0)
        shape = (args.batch, args.size, args.size, 3)
        images = rng.integers(0, 256, shape, np.uint8)
        begin = time.perf_counter()
        if args.inference:
            predict = jax.jit(lambda v, x: forward.run(built.network, v, x)[0][0])
            pixels = jnp.asarray(images[:1], jnp.float32)
            compiled = predict.lower(state.variables(), pixels).compile()
        else:
            compiled = workload.step(built)
        seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis().temp_size_in_bytes
    labels = np.arange(args.batch, dtype=np.int32) % workload.CLASSES
    batch = dict(image=images, label=labels, mask=np.ones(args.batch, bool))
    batch["index"] = np.arange(args.batch)
    batch, key = fit.put_batch(batch, built), workload.key(built)

    def run():
        nonlocal state
        if args.inference:
            return jax.block_until_ready(compiled(state.variables(), pixels))
        state, _ = compiled(state, batch, key)
        jax.block_until_ready(state)

    run()
    parameters = tree.size(state.params)
    turn(dict(parameters=parameters, compile_s=seconds, memory_mb=memory / 2**20))
    _rounds(turn, run, args)


def pytorch(turn, network, args) -> None:
    """As `ours`; in the faster of the two memory layouts."""
    workload.allocator("keep")
    import torch

    torch.set_num_threads(workload.cores())
    tried = [
        _peer(network, args, layout)
        for layout in (torch.contiguous_format, torch.channels_last)
    ]
    for run, _ in tried:
        run()
    run, parameters = min(tried, key=lambda t: min(turns.once(t[0]) for _ in range(2)))
    del tried
    turn(dict(parameters=parameters))
    _rounds(turn, run, args)


def _peer(network, args, layout):
    import torch

    net = peer.network(network, layout)
    x = torch.rand(args.batch, 3, args.size, args.size).to(memory_format=layout)
    parameters = peer.parameters(net)
    if args.inference:
        net.eval()

        def forward():
            with torch.inference_mode():
                net(x[:1])

        return forward, parameters
    labels = torch.arange(args.batch) % workload.CLASSES
    step = peer.trainer(net)
    return lambda: step(x, labels), parameters


def _rounds(turn, run, args) -> None:
    while True:
        turns.once(run)  # caches are the others' after their turns
        turn(statistics.median(turns.once(run) for _ in range(args.steps)))


def compare(network: str, args) -> dict:
    candidates = {
        "ours": (ours, (network, args)),
        "native": (ours, (network, args, "native")),
        "PyTorch": (pytorch, (network, args)),
    }
    for name in args.without:
        del candidates[name]
    if workload.NETWORKS[network][1] is None:
        candidates.pop("PyTorch", None)
    times = {name: [] for name in candidates}
    with turns.Turns(candidates) as players:
        ready = players.ready
        if len({r["parameters"] for r in ready.values()}) > 1:
            raise RuntimeError(f"the networks differ: {ready}")
        for i in range(args.rounds):
            for name in list(candidates)[:: -1 if i % 2 else 1]:
                times[name].append(players.take(name))
    times = {name: np.array(t) for name, t in times.items()}
    faster = {
        n: float(np.median(t / times["ours"])) for n, t in times.items() if n != "ours"
    }
    return dict(
        network=network,
        ms={n: 1e3 * float(np.median(t)) for n, t in times.items()},
        faster_than=faster,
        ready=ready,
    )


def text(row: dict) -> str:
    made = {n: r for n, r in row["ready"].items() if "compile_s" in r}
    return (
        f"{row['network']:18} "
        + ", ".join(f"{n} {ms:.1f} ms" for n, ms in row["ms"].items())
        + "; ours is faster than "
        + ", ".join(f"{n} {r:.2f}x" for n, r in row["faster_than"].items())
        + "; compilation "
        + ", ".join(f"{n} {r['compile_s']:.1f} s" for n, r in made.items())
        + "; memory "
        + ", ".join(f"{n} {r['memory_mb']:.0f} MiB" for n, r in made.items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(workload.NETWORKS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=96, help="of images, pixels")
    parser.add_argument("--inference", action="store_true")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=("native", "PyTorch")
    )
    parser.add_argument("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    load, rows = workload.load(), []
    for network in args.models:
        rows.append(compare(network, args))
        print(text(rows[-1]), flush=True)
    origin = workload.origin(load)
    print(workload.say(origin))
    if args.out:
        args.out.write_text(json.dumps({"rows": rows} | origin, indent=2) + "\n")


if __name__ == "__main__":
    main()
