"""Writes pieces of networks and whole networks as TFLite files with random weights, so that any device can time them."""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from squeeze_jax import files, tree
from squeeze_jax.cost import latency_table
from squeeze_jax.cost.latency_table import Timing
from squeeze_jax.errors import UserError
from squeeze_jax.export import several, time_files
from squeeze_jax.export.runnable import Spec, input_specs
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.nas import costs
from squeeze_jax.nas.costs import Placed
from squeeze_jax.nas.family import Family
from squeeze_jax.train import forward

INDEX = "index.json"
SCRIPT = "time_files.py"
EXAMPLES = 2  # random examples for the ranges of integer files


class Target(NamedTuple):
    """Something whose latency is measured.

    Attributes:
      name: of its file.
      key: of a piece, see `latency_table.key_of`; "" for a whole network.
      arch: of a whole network; None for a piece.
      placed: the piece; None for a network.
    """

    name: str
    key: str = ""
    arch: Any = None
    placed: Placed | None = None


def targets(pieces: costs.Pieces, archs: list) -> list[Target]:
    """Returns the different pieces of a space, and whole networks."""
    wanted = {}
    for placed in pieces.distinct:
        key = latency_table.key_of(placed.piece.module, placed.example)
        name = f"piece_{hashlib.sha1(key.encode()).hexdigest()[:12]}"
        wanted[name] = Target(name, key, placed=placed)
    for number, arch in enumerate(archs):
        wanted[name] = Target(name := f"network_{number:03}", arch=arch)
    return list(wanted.values())


def function_of(target: Target, networks: Family, built: Built):
    """Returns (function, inputs) of a piece or network with random weights.

    A network's function includes the preparation of inputs, as exported files do.

    Returns:
      (fn: {input: [1, ...]} → array or mapping of arrays, {input: Spec}).
    """
    if target.placed is None:
        model = networks.network(target.arch)
        variables = random_variables(networks.shapes(model))

        def whole(batch):
            inputs = built.data.inputs(batch)
            return forward.run(model, variables, inputs)[0][0]

        ranges = getattr(built.data, "ranges", None)
        return whole, input_specs(built.data.exported, ranges)
    model, shapes = costs.network_of(target.placed)
    variables = random_variables(shapes)
    leaves, structure = jax.tree.flatten(target.placed.example)

    def piece(arrays):
        x = jax.tree.unflatten(structure, [arrays[f"x{i}"] for i in range(len(leaves))])
        outputs = jax.tree.leaves(model.apply(variables, x)[0])
        return {f"y{i}": y for i, y in enumerate(outputs)}

    specs = {
        f"x{i}": Spec(s.shape[1:], np.dtype(s.dtype)) for i, s in enumerate(leaves)
    }
    return piece, specs


def random_variables(shapes: Any) -> Any:
    """Returns random weights for which activations neither vanish nor grow: times do not depend on them."""
    rng = np.random.default_rng(0)

    def draw(name, s):
        if name.endswith(("/var", "/scale")):
            return rng.uniform(0.5, 1.5, s.shape).astype(np.float32)
        fan_in = max(1, int(np.prod(s.shape[:-1])))
        return (rng.standard_normal(s.shape) / np.sqrt(fan_in)).astype(np.float32)

    return tree.map_named(draw, shapes)


def random_examples(specs: Mapping[str, Spec], count: int) -> dict[str, np.ndarray]:
    """Returns random inputs: integers are 1, and numbers lie in the known range, or are normally distributed."""
    rng = np.random.default_rng(1)

    def draw(spec):
        shape = (count, *spec.shape)
        if spec.dtype.kind not in "f":
            return np.ones(shape, spec.dtype)
        if spec.range:
            return rng.uniform(*spec.range, shape).astype(spec.dtype)
        return rng.standard_normal(shape).astype(spec.dtype)

    return {name: draw(spec) for name, spec in specs.items()}


def write(
    folder: pathlib.Path,
    key: str,
    wanted: list[Target],
    networks: Family,
    built: Built,
    progress: Callable[[int], None],
) -> None:
    """Writes a file for each target, an index, and the script that times them.

    Args:
      folder: where they go; files that are there already are kept.
      key: format, one of `several.FORMATS`.
      wanted: pieces and networks.
      networks: the space.
      built: the experiment.
      progress: called with the number of files that are converted.
    """
    index = {
        t.name: t.key or {k: list(v) for k, v in networks.space.options(t.arch).items()}
        for t in wanted
    }
    check_index(folder, index, key)
    files.write(
        folder / INDEX, json.dumps({"format": key, "targets": index}, indent=1) + "\n"
    )
    shutil.copyfile(time_files.__file__, folder / SCRIPT)

    def jobs():
        for target in wanted:
            if (folder / f"{target.name}.tflite").exists():
                continue
            fn, specs = function_of(target, networks, built)
            examples = random_examples(specs, EXAMPLES) if "int8" in key else None
            yield several.Job(target.name, fn, specs, examples)

    several.convert(jobs(), folder, key, progress)


def check_index(folder: pathlib.Path, index: Mapping[str, Any], key: str) -> None:
    """Raises a UserError if a folder holds files of another space, format or number of networks."""
    try:
        there = files.read_json(folder / INDEX)
    except FileNotFoundError:
        return
    except (OSError, ValueError):
        there = None
    if there != {"format": key, "targets": index}:
        raise UserError(
            f"{folder} holds files of another space, format or number of networks: choose another folder, or delete it"
        )


def read_times(path: pathlib.Path, names: set[str]) -> tuple[dict, dict[str, Timing]]:
    """Reads what `time_files` has written.

    Args:
      path: its file.
      names: of the targets.

    Returns:
      (header, {name: latency}).

    Raises:
      UserError: the file cannot be read, is none of these, or lacks a target.
    """
    rounds, counts = {}, {}
    try:
        header, *lines = files.read_file(path).decode().splitlines()
        header = json.loads(header)
        if header["version"] != time_files.VERSION:
            raise UserError(
                f"{path} is of version {header['version']}: copy {SCRIPT} to the device again and run it anew"
            )
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # the script was stopped while it wrote the line
            name = row["file"].removesuffix(".tflite")
            rounds.setdefault(name, []).append(float(row["ms"]))
            counts[name] = counts.get(name, 0) + int(row["count"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} has no times of {SCRIPT}: {error!r}") from None
    if missing := sorted(names - set(rounds)):
        raise UserError(
            f"{path} lacks {len(missing)} of {len(names)} files, such as {missing[0]}: run {SCRIPT} on the device again, it goes"
            " on where it stopped"
        )
    timings = {n: latency_table.timing(rounds[n], counts[n]) for n in names}
    return header, timings
