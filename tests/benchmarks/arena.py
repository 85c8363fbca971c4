"""Predicted peak memory against the arena of TensorFlow Lite Micro, `python tests/benchmarks/arena.py`.

Needs `pip install tflite-micro==0.dev20261023182759`. Exports networks of a space, from the smallest to the largest, in int8 with
random weights. TensorFlow Lite Micro plans each one's memory. The head of its arena holds the activations, which the cost
"memory" of a search predicts; the tail holds what the runtime keeps about the file.
"""

import argparse
import os
import pathlib
import re
import tempfile


def main() -> None:
    """Prints a row for each network: predicted peak, head and tail of the arena, in bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ofa_mobilenet_v3")
    parser.add_argument("--variant", default="cifar")
    parser.add_argument("--stem_strides", type=int, default=1)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--networks", type=int, default=8)
    args = parser.parse_args()
    import jax
    import jax.numpy as jnp
    import numpy as np

    from squeeze_jax.cost.latency_table import rank_correlation
    from squeeze_jax.export import several
    from squeeze_jax.export.runnable import Spec
    from squeeze_jax.jobs import _piece_files, _plugs
    from squeeze_jax.nas import costs, limits
    from squeeze_jax.nas import space as spaces
    from squeeze_jax.nas.family import Family

    shape = (args.size, args.size, args.channels)
    image = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    options = dict(name=args.model, variant=args.variant, num_classes=10)
    options |= dict(stem_strides=args.stem_strides)
    family = Family(options, _plugs.plain(image))
    memory = limits.cost("memory", costs.Pieces(family, image))
    archs = spaces.spread_networks(family.space, args.networks, jax.random.key(0))
    predicted = np.asarray(memory.of(spaces.stack(archs)))
    specs = {"image": Spec(shape, np.dtype("float32"))}
    jobs = []
    for number, arch in enumerate(archs):
        model = family.network(arch)
        variables = _piece_files.random_variables(family.shapes(model))

        def network(x, model=model, variables=variables):
            return model.apply(variables, x["image"])[0]

        examples = _piece_files.random_examples(specs, 8)
        jobs.append(several.Job(str(number), network, specs, examples))
    rows = []
    print(f"{'predicted':>10} {'head':>10} {'tail':>10} {'head / predicted':>18}")
    with tempfile.TemporaryDirectory() as folder:
        several.convert(jobs, pathlib.Path(folder), "tflite_int8")
        for job, peak in zip(jobs, predicted, strict=True):
            head, tail = arena(pathlib.Path(folder, f"{job.name}.tflite").read_bytes())
            rows.append((peak, head))
            print(f"{peak:10,.0f} {head:10,} {tail:10,} {head / peak:18.3f}")
    rank = rank_correlation(*np.asarray(rows, float).T)
    print(f"rank correlation {rank:.3f}")


def arena(content: bytes) -> tuple[int, int]:
    """Returns (bytes of the head, bytes of the tail) of the arena that a file needs in TensorFlow Lite Micro."""
    from tflite_micro.python.tflite_micro import runtime

    recording = runtime.InterpreterConfig.kAllocationRecording
    interpreter = runtime.Interpreter.from_bytes(content, intrepreter_config=recording)
    with tempfile.TemporaryFile() as printed:
        kept = os.dup(1), os.dup(2)
        os.dup2(printed.fileno(), 1)
        os.dup2(printed.fileno(), 2)
        try:
            interpreter.print_allocations()
        finally:
            os.dup2(kept[0], 1)
            os.dup2(kept[1], 2)
        printed.seek(0)
        text = printed.read().decode()
    found = (re.search(rf"Arena allocation {part} (\d+)", text) for part in ("head", "tail"))  # fmt: skip
    return tuple(int(match[1]) for match in found)


if __name__ == "__main__":
    main()
