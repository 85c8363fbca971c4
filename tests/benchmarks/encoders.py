"""Language encoders: ours, stock XLA convolutions and transformers on PyTorch, `python tests/benchmarks/encoders.py`.

A step is forward, backward and SGD with momentum of a classifier of sequences, in float32 on all cores, with the dropout
that the networks were published with (--dropout=0 for none). "native" is our network with every convolution left to XLA.
transformers computes attention as it does by default, fused. With --inference it is the forward pass alone, without
dropout. All candidates are processes that take turns; see turns.py. The median over rounds of the ratios of one round
counts; between networks too, as they alternate as well.
"""

import argparse
import contextlib
import json
import statistics
from pathlib import Path

import numpy as np
import turns
import workload

NETWORKS = {"bert": "base", "squeezebert": "base"}  # of each the variant
VOCABULARY = 30522
MOMENTUM, LR = 0.9, 1e-4


def tokens(args) -> np.ndarray:
    shape = (args.batch, args.length)
    return np.random.default_rng(0).integers(1, VOCABULARY, shape, np.int32)


def ours(turn, network, args, lowering="auto") -> None:
    """Says {"parameters"}, then seconds of a step at each turn."""
    workload.allocator("keep")
    import jax
    import jax.numpy as jnp
    import optax

    from squeeze_jax import models, tree
    from squeeze_jax.nn import conv

    rates = dict(dropout=args.dropout, attention_dropout=args.dropout)
    net = models.make(
        network, variant=NETWORKS[network], task="classification", **rates
    )
    x = {"tokens": jnp.asarray(tokens(args))}
    labels = jax.nn.one_hot(jnp.arange(args.batch) % 2, 2)
    params = jax.jit(lambda key: net.init(key, x))(jax.random.key(0))["params"]
    tx = optax.sgd(LR, momentum=MOMENTUM)

    def step(carried, key):
        params, state = carried

        def loss(params):
            rngs = {"dropout": key}
            logits, _ = net.apply({"params": params}, x, train=True, rngs=rngs)
            return optax.softmax_cross_entropy(logits, labels).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def forward(params, tokens):
        return net.apply({"params": params}, {"tokens": tokens})[0]

    native = conv.lowering("native")
    with native if lowering == "native" else contextlib.nullcontext():
        carried, key = (params, tx.init(params)), jax.random.key(1)
        compiled = (
            jax.jit(forward).lower(params, x["tokens"]).compile()
            if args.inference
            else jax.jit(step, donate_argnums=0).lower(carried, key).compile()
        )
    parameters = tree.size(params)

    def run():
        nonlocal carried
        if args.inference:
            jax.block_until_ready(compiled(params, x["tokens"]))
        else:
            carried = jax.block_until_ready(compiled(carried, key))

    run()
    turn(dict(parameters=parameters))
    _rounds(turn, run, args)


def pytorch(turn, network, args) -> None:
    """As `ours`."""
    workload.allocator("keep")
    import peer
    import torch

    peer.torchvision()  # which transformers imports
    import transformers

    torch.set_num_threads(workload.cores())
    config = {
        "bert": transformers.BertConfig,
        "squeezebert": transformers.SqueezeBertConfig,
    }[network](
        num_labels=2,
        vocab_size=VOCABULARY,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.dropout,
        **({"embedding_size": 768} if network == "squeezebert" else {}),
    )
    net = transformers.AutoModelForSequenceClassification.from_config(config)
    x = torch.tensor(tokens(args)).long()
    labels = torch.arange(args.batch) % 2
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, fused=True)

    def step():
        optimizer.zero_grad()
        net(x, labels=labels).loss.backward()
        optimizer.step()

    def forward():
        with torch.inference_mode():
            net(x)

    run = forward if args.inference else step
    net.train(not args.inference)
    run()
    turn(dict(parameters=peer.parameters(net)))
    _rounds(turn, run, args)


def _rounds(turn, run, args) -> None:
    while True:
        turns.once(run)  # caches are the others' after their turns
        turn(statistics.median(turns.once(run) for _ in range(args.steps)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128, help="of a sequence, tokens")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--inference", action="store_true")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=("native", "PyTorch")
    )
    parser.add_argument("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    load = workload.load()
    candidates = {}
    for network in args.models:
        candidates[network, "ours"] = (ours, (network, args))
        candidates[network, "native"] = (ours, (network, args, "native"))
        candidates[network, "PyTorch"] = (pytorch, (network, args))
    candidates = {k: c for k, c in candidates.items() if k[1] not in args.without}
    times = {key: [] for key in candidates}
    with turns.Turns(candidates) as players:
        for network in args.models:
            said = {k: r for k, r in players.ready.items() if k[0] == network}
            if len({r["parameters"] for r in said.values()}) > 1:
                raise RuntimeError(f"the networks differ: {said}")
        for i in range(args.rounds):
            for key in list(candidates)[:: -1 if i % 2 else 1]:
                times[key].append(players.take(key))
    times = {key: np.array(t) for key, t in times.items()}
    rows = []
    for network in args.models:
        mine = times[network, "ours"]
        peers = {k[1]: t for k, t in times.items() if k[0] == network}
        faster = {n: float(np.median(t / mine)) for n, t in peers.items()}
        ms = {n: 1e3 * float(np.median(t)) for n, t in peers.items()}
        rows.append(dict(network=network, ms=ms, faster_than=faster))
        print(
            f"{network:12} "
            + ", ".join(f"{n} {t:.1f} ms" for n, t in ms.items())
            + "; ours is faster than "
            + ", ".join(f"{n} {f:.2f}x" for n, f in faster.items() if n != "ours")
        )
    if len(args.models) == 2:
        one, two = args.models
        for name in dict.fromkeys(key[1] for key in candidates):
            ratio = float(np.median(times[one, name] / times[two, name]))
            print(f"{name:8} {two} is faster than {one} {ratio:.2f}x")
    origin = workload.origin(load)
    print(workload.say(origin))
    if args.out:
        args.out.write_text(json.dumps({"rows": rows} | origin, indent=2) + "\n")


if __name__ == "__main__":
    main()
