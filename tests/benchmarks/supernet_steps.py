"""What a training step on a sub-network costs, `python tests/benchmarks/supernet_steps.py`.

Times a forward and backward pass of the largest, a middle and the smallest network of a space, each run by compiled pieces on
slices of the largest network's weights, and of the largest one as one compiled program. The programs take turns. The smallest
one should take at most twice its share of the largest one's MACs.
"""

import argparse
import statistics
import time

import workload


def main() -> None:
    """Prints a row for each network: share of MACs, share of time, ms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ofa_mobilenet_v3")
    parser.add_argument("--variant", default="w1.0")
    parser.add_argument("--stem_strides", type=int, default=2)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    workload.allocator("keep")
    import jax
    import jax.numpy as jnp
    import numpy as np

    from squeeze_jax.cost import count
    from squeeze_jax.jobs import _plugs
    from squeeze_jax.methods import Passes
    from squeeze_jax.nas.family import Family
    from squeeze_jax.nas.pieces import Runner, Sums
    from squeeze_jax.train import forward

    example = jax.ShapeDtypeStruct((args.batch, args.size, args.size, 3), jnp.float32)
    options = dict(name=args.model, variant=args.variant, num_classes=10)
    options |= dict(stem_strides=args.stem_strides)
    family = Family(options, _plugs.plain(example))
    holder = family.holder()
    x = np.random.default_rng(0).normal(size=example.shape).astype(np.float32)
    variables = jax.jit(holder.init)(jax.random.key(0), x)
    params, key = variables["params"], jax.random.key(0)
    stats = {"batch_stats": variables["batch_stats"], "extra": {}}

    def run_module(model, params, stats, x, key):
        network = forward.make(model, None)
        (y, endpoints), changed = forward.run(
            network, {"params": params, **stats}, x, train=True, key=key
        )
        return y, endpoints, stats | changed

    runner = Runner(Passes(None, None, None, run_module, None, named=False))
    ones = jnp.ones((args.batch, 10))

    def pieces_step(net):
        result = runner.run(net.pieces, params, stats, {}, x, key)
        sums = Sums()
        sums.add_whole({})
        runner.pull(result, ones, {}, sums)
        return jax.block_until_ready((result.logits, sums._parts))

    @jax.jit
    def whole(params):
        return jax.grad(lambda p: jnp.sum(run_module(holder, p, stats, x, key)[0]))(
            params
        )

    space = family.space
    middle = jax.tree.map(lambda n: (n - 1) // 2, space.sizes)
    networks = {
        "largest": family.network(space.largest()),
        "middle": family.network(middle),
        "smallest": family.network(space.smallest()),
    }
    macs = {
        name: count.macs(net.apply, family.shapes(net), example).total
        for name, net in networks.items()
    }
    steps = {name: (lambda net=net: pieces_step(net)) for name, net in networks.items()}
    steps["largest, one program"] = lambda: jax.block_until_ready(whole(params))
    macs["largest, one program"] = macs["largest"]
    for name, step in steps.items():
        begin = time.perf_counter()
        step()
        print(f"{name}: first step {time.perf_counter() - begin:.1f} s", flush=True)
    seconds = {name: [] for name in steps}
    for _ in range(args.rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    print(f"\n{'network':<22} {'ms':>8} {'of time':>8} {'of MACs':>8}")
    for name, times in seconds.items():
        ratio = statistics.median(
            t / largest for t, largest in zip(times, seconds["largest"], strict=True)
        )
        share = macs[name] / macs["largest"]
        ms = 1000 * statistics.median(times)
        print(f"{name:<22} {ms:8.1f} {ratio:8.1%} {share:8.1%}")


if __name__ == "__main__":
    main()
