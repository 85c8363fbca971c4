"""Exported encoders against BERT-base, batch 1 on one thread, `python tests/benchmarks/litert_encoders.py`.

All networks have random weights, are exported by this library's own functions, checked against the live network, and then
take turns in one process on one core; the median over rounds of the ratios of one round counts, with their range.
--format is what the others are in, --against that of BERT, so `--format tflite_dynamic --against tflite` compares 8 bits
with float. `--format xla` leaves files out and compiles the networks for this CPU. With --folder the files are kept and
found again.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import workload

from squeeze_jax.cost import timing


def grouped(groups: int, output: int = 1, ffn: int = 0, wide: int = 4, scores: int = 0):
    """SqueezeBERT with so many groups, after attention, in the feed-forward layers (`wide` times as wide), in query and key."""
    each = dict.fromkeys(("query", "key"), scores or groups)
    each |= {"value": groups, "output": output}
    each |= dict.fromkeys(("ffn_in", "ffn_out"), ffn or groups)
    options = {"groups": each, "shuffle": output > 1, "ffn_features": wide * 768}
    return "squeezebert", options


VARIANTS = {  # model and options of models.make
    "bert": ("bert", {}),
    "squeezebert": ("squeezebert", {}),  # the paper's: 4 groups, dense after attention
    "g4-shuffle4": grouped(4, 4),
    "g4-shuffle4-ffn6": grouped(4, 4, 6),
    "g4-shuffle4-ffn12": grouped(4, 4, 12),
    "g4-shuffle4-half": grouped(4, 4, wide=2),
    "g4-shuffle4-half-qk3": grouped(4, 4, wide=2, scores=3),
    "g6": grouped(6),
    "g6-shuffle4": grouped(6, 4),
    "g12": grouped(12),  # one a head
    "g12-shuffle4": grouped(12, 4),
}
FORMATS = ("tflite", "tflite_dynamic", "tflite_int8", "stablehlo")
NAMES = ("tokens", "segments", "attended")


def sentences(n: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens, a quarter of them padding, {name: int32 [n, length]}."""
    rng = np.random.default_rng(0)
    attended = np.broadcast_to(np.arange(length) < length - length // 4, (n, length))
    found = {
        "tokens": rng.integers(1, 30522, (n, length)),
        "segments": rng.integers(0, 2, (n, length)),
        "attended": 1,
    }
    return {k: (v * attended).astype(np.int32) for k, v in found.items()}


def network(variant: str, args):
    """The function that is exported, {name: [b, l]} → logits, and the variables."""
    import jax
    import jax.numpy as jnp

    from squeeze_jax import models, tree

    name, options = VARIANTS[variant]
    net = models.make(name, variant="base", layers=args.layers, **options)
    x = {"tokens": jnp.ones((1, args.sequence), jnp.int32)}
    rng = np.random.default_rng(0)
    variables = tree.map_named(
        lambda name, a: rng.normal(name.endswith("/scale"), 0.02, a.shape).astype("f"),
        jax.eval_shape(net.init, jax.random.key(0), x),
    )

    def apply(variables, batch):
        x = {k: batch[k] for k in NAMES[:2]} | {"attended": batch["attended"] != 0}
        return net.apply(variables, x, train=False)[0]

    return apply, variables


def exported(variant: str, key: str, folder: Path, args) -> Path:
    """The file of a network, made if it is not there."""
    place = folder / f"{variant}-{args.sequence}-{args.layers}"
    found = list(place.glob(f"{key}/model*[teo]"))
    if found:
        return found[0]
    import jax

    from squeeze_jax import export
    from squeeze_jax.nn.conv import lowering

    apply, variables = network(variant, args)

    def fn(batch):
        with lowering("native"):
            return apply(variables, batch)

    x = sentences(2, args.sequence)
    (made,) = export.make(
        fn,
        {k: jax.ShapeDtypeStruct((args.sequence,), np.int32) for k in NAMES},
        place / key,
        formats=(key,),
        calibration=x,
        check=x,
        tolerance=1e-3,
        int8_agreement=0,
    )
    return made.path


def in_litert(files: list[str], args) -> list:
    """A function for each file that runs it once on one thread."""
    from squeeze_jax.export.runnable import open_file

    return [open_file(f, 1).timed(sentences(1, args.sequence)) for f in files]


def in_xla(variants: list[str], args) -> list:
    """A function for each network that runs it once, compiled; its lowerings are those of training on a CPU."""
    import jax

    found = []
    for variant in variants:
        apply, variables = network(variant, args)
        held = jax.device_put(variables)
        x = jax.device_put(sentences(1, args.sequence))
        call = jax.jit(apply).lower(held, x).compile()
        found.append(lambda c=call, v=held, x=x: jax.block_until_ready(c(v, x)))
    return found


def measured(runs: list, args) -> list[list[float]]:
    """Seconds of each in every round: the least of a turn's runs, after one that fills the caches."""
    for run in runs:
        run()
    times = [[] for _ in runs]
    for i in range(args.rounds):
        for j in list(range(len(runs)))[:: -1 if i % 2 else 1]:
            runs[j]()
            times[j].append(1e-3 * min(timing.times(runs[j], args.steps)))
    return times


def child(args) -> None:
    """Measures what stands on the command line, and prints the times."""
    from squeeze_jax.export import runtime

    runtime.pin()
    runs = in_xla if args.format == "xla" else in_litert
    print(json.dumps(measured(runs(args.measure, args), args)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--variants", nargs="+", default=["squeezebert"], choices=VARIANTS
    )
    parser.add_argument("--sequence", type=int, default=128, help="tokens")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--format", default="tflite", choices=(*FORMATS, "xla"))
    parser.add_argument("--against", choices=FORMATS, help="of BERT; --format's")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=3, help="runs of a turn")
    parser.add_argument("--folder", type=Path, help="keeps the files")
    parser.add_argument("--export", action="store_true", help="makes the files alone")
    parser.add_argument("--out", type=Path, help="where to write JSON")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return child(args)
    load = workload.load()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        names = ["bert", *args.variants]
        what = names
        if args.format != "xla":
            formats = [args.against or args.format] + [args.format] * len(args.variants)
            pairs = zip(names, formats, strict=True)
            what = [str(exported(name, key, folder, args)) for name, key in pairs]
        if args.export:
            return None
        command = [sys.executable, __file__, "--measure", *what]
        for key in ("sequence", "layers", "format", "rounds", "steps"):
            command.append(f"--{key}={getattr(args, key)}")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    times = np.array(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for name, own in zip(names, times, strict=True):
        ratio = times[0] / own
        rows.append(
            {
                "network": name,
                "ms": 1e3 * float(np.median(own)),
                "faster_than_bert": float(np.median(ratio)),
                "range": [float(ratio.min()), float(ratio.max())],
            }
        )
        low, high = rows[-1]["range"]
        print(
            f"{name:12} {rows[-1]['ms']:8.2f} ms, faster than BERT {rows[-1]['faster_than_bert']:.2f}x"
            f" ({low:.2f} to {high:.2f})"
        )
    print(f"sequence {args.sequence}, {args.layers} layers, {args.format}", end="")
    print(f" against {args.against}" if args.against else "")
    origin = workload.origin(load)
    print(workload.say(origin))
    if args.out:
        args.out.write_text(json.dumps({"rows": rows} | origin, indent=2) + "\n")
    return None


if __name__ == "__main__":
    main()
