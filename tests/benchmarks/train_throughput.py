"""Training images/s of this library against PyTorch, input pipeline included: `python tests/benchmarks/train_throughput.py`.

Both read the same generated JPEG files, decode them with Pillow, crop a random share and resize, flip, normalise, and
train the same network by SGD with momentum on all cores in float32. Ours is the step that run.py compiles, fed as its loop
feeds it. PyTorch's are torchvision's models and transforms, a DataLoader and the fused optimizer; before the comparison
every combination of channels_last or not and of 0 or more worker processes is tried, and the fastest is what we are
compared with. Both keep freed memory for the next step (--malloc=plain: neither does), which run.py does by itself and
PyTorch's tuning guide asks its users to do.

The two take turns, a block of steps each, the order reversed every other round. A ratio is that of one round's two blocks,
and the median over the rounds is stated, as a slow spell of the machine hits both alike. The two are processes stopped
while they wait, so that idle pools do not spin and nothing is decoded at the other's expense; see turns.py.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import peer
import turns
import workload


def ours(turn, network: str, folder: str, args: argparse.Namespace) -> None:
    """Says {"parameters", "setting"}, then the images/s of a block at each turn."""
    workload.allocator(args.malloc)
    import jax

    from squeeze_jax import tree
    from squeeze_jax.jobs import fit

    built = workload.build(
        network,
        args.batch,
        dict(
            source=dict(name="folder", root=folder),
            size=args.size,
            crop="random_resized",
            flip=True,
            cache_mb=0,  # as PyTorch does, ours decodes each image again for each crop
        ),
    )
    step, state = workload.step(built), built.create()
    key, batches = workload.key(built), built.data.train(args.batch, seed=0)
    parameters = tree.size(state.params)
    turn({"parameters": parameters, "setting": f"{built.data.threads} threads"})

    def run(count):
        nonlocal state
        for _ in range(count):
            state, _ = step(state, fit.put_batch(next(batches), built), key)
        jax.block_until_ready(state)

    _blocks(turn, run, args)


def theirs(turn, network: str, folder: str, args: argparse.Namespace) -> None:
    """As `ours`; first tries what is fastest on this machine."""
    workload.allocator(args.malloc)
    import torch

    torch.set_num_threads(workload.cores())
    settings = itertools.product(
        (torch.contiguous_format, torch.channels_last),
        sorted({0, 1, max(1, workload.cores() - 1)}),
    )
    tried = {}
    for layout, workers in settings:
        run = _peer(network, folder, args, layout, workers)
        run(2)
        begin = time.perf_counter()
        run(2 * workers + 4)  # so that those prepared beforehand weigh little
        tried[layout, workers] = (time.perf_counter() - begin) / (2 * workers + 4)
        del run  # ends its worker processes
    layout, workers = min(tried, key=tried.get)
    run = _peer(network, folder, args, layout, workers)
    run(2)
    name = str(layout).removeprefix("torch.")
    turn({"parameters": run.parameters, "setting": f"{name}, {workers} workers"})
    _blocks(turn, run, args)


def _blocks(turn, run, args: argparse.Namespace) -> None:
    while True:
        run(1)  # caches are the other's after its turn
        begin = time.perf_counter()
        run(args.steps)
        turn(args.steps * args.batch / (time.perf_counter() - begin))


def _peer(network, folder, args, layout, workers):
    """A function that trains PyTorch's network for a number of steps."""
    import torch

    peer.torchvision()
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    transform = v2.Compose(
        [v2.RandomResizedCrop(args.size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    )
    data = ImageFolder(f"{folder}/train", transform)
    endless = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**9)
    loader = iter(
        torch.utils.data.DataLoader(
            data,
            args.batch,
            sampler=endless,
            num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )
    )
    net = peer.network(network, layout)
    step = peer.trainer(net)
    mean = torch.tensor(workload.MEAN).view(3, 1, 1)
    std = torch.tensor(workload.STD).view(3, 1, 1)

    def run(steps):
        for _ in range(steps):
            images, labels = next(loader)
            # Uint8 up to here and normalised as a batch: faster than image by image.
            images = images.to(torch.float32, memory_format=layout)
            images = images.div_(255).sub_(mean).div_(std)
            step(images, labels)

    run.parameters = peer.parameters(net)
    return run


def compare(network: str, folder: str, args: argparse.Namespace) -> dict:
    """Alternates blocks of both; returns medians, ratios and settings."""
    arguments = (network, folder, args)
    speeds = {"ours": [], "theirs": []}
    candidates = {"ours": (ours, arguments), "theirs": (theirs, arguments)}
    with turns.Turns(candidates) as players:
        ready = players.ready
        if ready["ours"]["parameters"] != ready["theirs"]["parameters"]:
            raise RuntimeError(f"the networks differ: {ready}")
        for i in range(args.rounds):
            for name in list(speeds)[:: -1 if i % 2 else 1]:
                speeds[name].append(players.take(name))
    ratios = [a / b for a, b in zip(*speeds.values(), strict=True)]
    return {
        "network": network,
        "parameters": ready["ours"]["parameters"],
        "ours": statistics.median(speeds["ours"]),
        "theirs": statistics.median(speeds["theirs"]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "setting": {name: ready[name]["setting"] for name in speeds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["squeezenet", "mobilenet_v2", "resnet18"]
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5, help="of a block")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--size", type=int, default=64, help="of images, pixels")
    parser.add_argument("--images", type=int, default=2048, help="files to generate")
    parser.add_argument(
        "--malloc",
        choices=("keep", "plain"),
        default="keep",
        help="whether both keep freed memory for the next step",
    )
    parser.add_argument("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    load = workload.load()
    rows = []
    print(f"{'network':14} {'ours':>9} {'PyTorch':>9}   images/s   ratio (least, most)")
    with tempfile.TemporaryDirectory() as folder:
        workload.photographs(Path(folder), args.images, side=args.size * 3 // 2)
        for network in args.models:
            row = compare(network, folder, args)
            rows.append(row)
            low, high = min(row["ratios"]), max(row["ratios"])
            print(
                f"{network:14} {row['ours']:9.1f} {row['theirs']:9.1f}   {'':8}"
                f"   {row['ratio']:.2f} ({low:.2f}, {high:.2f})   PyTorch: {row['setting']['theirs']}"
            )
    origin = workload.origin(load)
    print(workload.say(origin))
    if args.out:
        record = {"rows": rows, "arguments": vars(args) | {"out": str(args.out)}}
        args.out.write_text(json.dumps(record | origin, indent=2) + "\n")


if __name__ == "__main__":
    main()
