"""Convolutions of published networks: ours, stock Flax and PyTorch in one run, `python tests/benchmarks/convolutions.py`.

Each of the three is a process of its own and all others are stopped while it measures; see turns.py. A round measures one
convolution by each, the order reversed every other round; a ratio is of one round, and the median over the rounds counts.
Forward is y = x * k, jitted; "both" is y with the gradients for x and k. Means are geometric.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import turns
import workload


class Case(NamedTuple):
    """size x size images (or, one-dimensional, sequences) of `channels`, convolved to `features`."""

    network: str
    size: int
    channels: int
    kernel: int
    features: int
    groups: int = 1
    strides: int = 1
    dilation: int = 1
    axes: int = 2

    @property
    def kind(self) -> str:
        if self.groups > 1 and self.groups == self.channels:
            return "depthwise"
        if self.kernel == 1:
            return "grouped pointwise" if self.groups > 1 else "pointwise"
        return "grouped" if self.groups > 1 else "dense"

    @property
    def name(self) -> str:
        parts = [f"{self.size}{f'x{self.size}' * (self.axes - 1)}x{self.channels}"]
        if self.features != self.channels:
            parts.append(f"to {self.features}")
        parts.append(f"k{self.kernel}")
        if self.groups > 1 and self.kind != "depthwise":
            parts.append(f"g{self.groups}")
        if self.strides > 1:
            parts.append(f"s{self.strides}")
        if self.dilation > 1:
            parts.append(f"d{self.dilation}")
        return " ".join(parts)

    @property
    def padding(self) -> int:
        return self.dilation * (self.kernel // 2)

    def arrays(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        x = (batch, *(self.size,) * self.axes, self.channels)
        k = (*(self.kernel,) * self.axes, self.channels // self.groups, self.features)
        return rng.normal(size=x).astype("f4"), rng.normal(size=k).astype("f4")


def depthwise(network, size, channels, kernel, strides=1, dilation=1) -> Case:
    return Case(network, size, channels, kernel, channels, channels, strides, dilation)


def sequences(network, *rows) -> list[Case]:
    """Rows are (length, channels, kernel, features, groups, strides, dilation); the last three may be left out."""
    return [Case(network, *row, axes=1) for row in rows]


GRID = (
    depthwise("MobileNetV2", 112, 32, 3),
    depthwise("MobileNetV2", 112, 96, 3, strides=2),
    depthwise("MobileNetV2", 56, 144, 3),
    depthwise("MobileNetV2", 28, 192, 3),
    depthwise("MobileNetV2", 14, 576, 3, strides=2),
    depthwise("MobileNetV2", 7, 960, 3),
    depthwise("MobileNetV3", 56, 72, 5, strides=2),
    depthwise("MobileNetV3", 28, 120, 5),
    depthwise("MobileNetV3", 7, 960, 5),
    depthwise("EfficientNet", 14, 480, 5),
    depthwise("EfficientNet", 28, 240, 3, strides=2),
    depthwise("ShuffleNet", 28, 60, 3),
    depthwise("SqueezeNAS", 32, 192, 3, dilation=2),
    depthwise("DeepLab", 33, 480, 3, dilation=2),
    depthwise("DeepLab", 33, 480, 3, dilation=4),
    depthwise("ConvNeXt", 28, 96, 7),
    Case("ResNeXt", 56, 128, 3, 128, groups=32),
    Case("ResNeXt", 28, 256, 3, 256, groups=32),
    Case("ResNeXt", 28, 512, 3, 512, groups=32, strides=2),
    Case("AlexNet", 27, 96, 5, 256, groups=2),
    Case("AlexNet", 13, 384, 3, 384, groups=2),
    Case("SqueezeNAS", 32, 128, 3, 128, groups=8, dilation=2),
    Case("ShuffleNet", 28, 240, 1, 60, groups=3),
    Case("ShuffleNet", 14, 120, 1, 480, groups=3),
    Case("ShuffleNet", 7, 960, 1, 240, groups=3),
    Case("SqueezeBERT", 128, 768, 1, 768, groups=4, axes=1),
    Case("SqueezeBERT", 128, 768, 1, 3072, groups=4, axes=1),
    Case("SqueezeBERT", 128, 3072, 1, 768, groups=4, axes=1),
    Case("MobileNetV2", 56, 24, 1, 144),
    Case("MobileNetV2", 14, 576, 1, 96),
    Case("MobileNetV2", 7, 320, 1, 1280),
    Case("ResNet", 56, 256, 1, 512, strides=2),
    Case("MobileNetV2", 224, 3, 3, 32, strides=2),
    Case("ResNet", 56, 64, 3, 64),
    Case("ResNet", 28, 128, 3, 128),
    Case("ResNet", 14, 256, 3, 256),
    Case("ResNet", 7, 512, 3, 512),
    Case("DeepLab", 33, 128, 3, 128, dilation=4),
    *sequences("TextCNN", (64, 128, 3, 128), (128, 256, 3, 256), (100, 128, 7, 64)),
    *sequences("TCN", (256, 64, 5, 64), (1024, 32, 3, 32), (60, 40, 5, 100)),
    *sequences("Conv-TasNet", (1000, 128, 3, 128), (512, 8, 9, 16), (1024, 8, 3, 16)),
    *sequences(
        "wav2vec", (4000, 16, 9, 32), (2000, 64, 3, 64, 1, 2), (512, 512, 3, 512)
    ),
    *sequences("TCN", (256, 64, 5, 64, 1, 1, 8), (4000, 16, 3, 16, 1, 1, 2)),
    *sequences("grouped", (256, 64, 5, 64, 4), (128, 256, 3, 256, 8)),
    *sequences("depthwise", (256, 64, 3, 64, 64), (1000, 128, 3, 128, 128, 1, 4)),
)


def _jax(turn, convolve, cases, args) -> None:
    import jax
    import jax.numpy as jnp

    for case, batch in cases:
        x, k = jax.device_put(case.arrays(batch))
        forward = jax.jit(lambda x, k, case=case: convolve(case, x, k))
        y = jnp.ones_like(forward(x, k))

        @jax.jit
        def both(x, k, y, case=case):
            out, pull = jax.vjp(lambda x, k: convolve(case, x, k), x, k)
            return out, pull(y)

        forward.lower(x, k).compile()
        _measure(
            turn,
            args,
            lambda x=x, k=k, forward=forward: jax.block_until_ready(forward(x, k)),
            lambda x=x, k=k, y=y, both=both: jax.block_until_ready(both(x, k, y)),
        )


def ours(turn, cases, args) -> None:
    """Says (forward, both) in seconds at each turn."""
    workload.allocator("keep")
    from squeeze_jax.nn.conv import conv

    def convolve(case, x, k):
        return conv(
            x,
            k,
            strides=case.strides,
            padding=case.padding,
            groups=case.groups,
            dilation=case.dilation,
        )

    _jax(turn, convolve, cases, args)


def stock(turn, cases, args) -> None:
    """As `ours`, what `flax.linen.Conv` calls."""
    workload.allocator("keep")
    import flax.linen as nn

    def convolve(case, x, k):
        layer = nn.Conv(
            case.features,
            (case.kernel,) * case.axes,
            strides=case.strides,
            padding=case.padding,
            feature_group_count=case.groups,
            kernel_dilation=case.dilation,
            use_bias=False,
        )
        return layer.apply({"params": {"kernel": k}}, x)

    _jax(turn, convolve, cases, args)


def pytorch(turn, cases, args) -> None:
    """As `ours`, in the faster of PyTorch's two memory layouts."""
    workload.allocator("keep")
    import torch

    torch.set_num_threads(workload.cores())

    def prepared(case, batch, layout):
        x, k = map(torch.tensor, case.arrays(batch))
        x, k = x.movedim(-1, 1), k.movedim((-1, -2), (0, 1))
        if case.axes == 1:
            layout = torch.contiguous_format
        x, k = (a.contiguous(memory_format=layout).requires_grad_() for a in (x, k))
        convolve = getattr(torch.nn.functional, f"conv{case.axes}d")

        def run():
            return convolve(
                x, k, None, case.strides, case.padding, case.dilation, case.groups
            )

        y = torch.ones_like(run())

        def forward():
            with torch.no_grad():
                run()

        def both():
            torch.autograd.grad(run(), (x, k), y)

        return forward, both

    for case, batch in cases:
        layouts = (torch.contiguous_format, torch.channels_last)
        tried = [prepared(case, batch, layout) for layout in layouts]
        for pair in tried:
            turns.once(pair[1])
        _measure(turn, args, *min(tried, key=lambda pair: turns.once(pair[1])))


def _measure(turn, args, forward, both) -> None:
    """Hands over the times of a convolution at as many turns as there are rounds."""
    for run in (forward, both):
        turns.once(run)
    turn("ready")
    times = None
    for _ in range(args.rounds):
        if times is None or max(times) < 1:  # what takes seconds is not disturbed
            times = _timed(forward, args.seconds), _timed(both, args.seconds)
        turn(times)


def _timed(run, seconds: float) -> float:
    """The median of as many runs as fit, after one that fills the caches."""
    times = [turns.once(run)]
    if times[0] > 1:
        return times[0]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        times.append(turns.once(run))
    return statistics.median(times[1:] or times)


def mean(values) -> float:
    return statistics.geometric_mean(values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = sorted({c.kind for c in GRID})
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--axes", nargs="+", type=int, default=[1, 2], choices=[1, 2])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--seconds", type=float, default=0.1, help="of one measurement at least"
    )
    parser.add_argument("--skip-stock", action="store_true", help="it takes longest")
    parser.add_argument("--out", type=Path, help="where to write JSON")
    args = parser.parse_args()
    load = workload.load()
    cases = [
        (c, b)
        for b in args.batches
        for c in GRID
        if c.kind in args.kinds and c.axes in args.axes
    ]
    candidates = {"ours": (ours, (cases, args)), "PyTorch": (pytorch, (cases, args))}
    if not args.skip_stock:
        candidates["stock"] = (stock, (cases, args))
    peers = [name for name in candidates if name != "ours"]
    print(f"{'':44} ours: forward, both    faster than {' | '.join(peers)}")
    rows = []
    with turns.Turns(candidates) as players:
        for case, batch in cases:
            if rows:  # the first was ready when the players were
                for name in candidates:
                    players.take(name)
            times = {name: [] for name in candidates}
            for i in range(args.rounds):
                for name in list(candidates)[:: -1 if i % 2 else 1]:
                    times[name].append(players.take(name))
            times = {name: np.array(t) for name, t in times.items()}
            ratios = {
                n: np.median(times[n] / times["ours"], axis=0).tolist() for n in peers
            }
            ms = (1e3 * np.median(times["ours"], axis=0)).tolist()
            rows.append(
                case._asdict()
                | dict(batch=batch, kind=case.kind, ms=ms, faster_than=ratios)
            )
            print(
                f"{case.kind:18} {batch:3} x {case.name:22} {ms[0]:9.2f} {ms[1]:9.2f} ms  "
                + " | ".join(f"{f:6.2f} {b:6.2f}" for f, b in ratios.values()),
                flush=True,
            )
    print("\ngeometric means: forward, both")
    for kind in args.kinds:
        for peer in peers:
            found = [r["faster_than"][peer] for r in rows if r["kind"] == kind]
            forward, both = (mean(column) for column in zip(*found, strict=True))
            least = min(map(min, found))
            print(
                f"{kind:18} than {peer:8} {forward:7.2f} {both:7.2f}   least {least:.2f}"
            )
    origin = workload.origin(load)
    print(workload.say(origin))
    if args.out:
        args.out.write_text(json.dumps({"rows": rows} | origin, indent=2) + "\n")


if __name__ == "__main__":
    main()
