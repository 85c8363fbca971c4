"""Writes pieces of networks and whole networks as TFLite files with random weights, so that any device can time them."""

import json
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from squeeze_jax import files, tree
from squeeze_jax.cost import latency_table
from squeeze_jax.cost.latency_table import Timing
from squeeze_jax.errors import UserError, shown
from squeeze_jax.export import several, time_files
from squeeze_jax.export.runnable import Spec, input_specs, is_tflite
from squeeze_jax.jobs._experiment import Built
from squeeze_jax.nas import costs
from squeeze_jax.nas import space as spaces
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
    """Returns the different pieces of a space, and whole networks. Equal names in two runs mean equal functions."""
    wanted = {}
    for placed in pieces.distinct:
        key = latency_table.key_of(placed.piece.module, placed.example)
        name = f"piece_{_digest(key)}"
        wanted[name] = Target(name, key, placed=placed)
    space = _digest(list(wanted))
    for arch in archs:
        name = f"network_{_digest([space, spaces.key_of(arch)])}"
        wanted[name] = Target(name, arch=arch)
    return list(wanted.values())


def _digest(content: Any) -> str:
    return files.digest(content)[:12]


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
      folder: where they go; files that are there already are kept, unless they are no TFLite files.
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
            path = folder / f"{target.name}.tflite"
            if path.is_file() and is_tflite(path):
                continue
            if os.path.lexists(path):
                print(f"damaged    {path} is no TFLite file: it is converted anew")
                _remove(path)
            fn, specs = function_of(target, networks, built)
            examples = random_examples(specs, EXAMPLES) if "int8" in key else None
            yield several.Job(target.name, fn, specs, examples)

    several.convert(jobs(), folder, key, progress)


def _remove(path: pathlib.Path) -> None:
    """Removes a file or an empty folder; raises a UserError where that is impossible."""
    try:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise UserError(
            f"{path} is no TFLite file, and cannot be removed: {error.strerror}"
        ) from None


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


def read_times(
    path: pathlib.Path, names: set[str], rounds_wanted: int = 1
) -> tuple[dict, dict[str, Timing]]:
    """Reads what `time_files` has written; prints a warning if files have fewer rounds than wanted.

    Args:
      path: its file.
      names: of the targets.
      rounds_wanted: number of rounds of each.

    Returns:
      (header, {name: latency}).

    Raises:
      UserError: the file cannot be read, is none of these, has a wrong value, or lacks a target.
    """
    try:
        lines = files.read_file(path).decode(errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    rounds, counts = {}, {}
    header = _header(path, lines[0] if lines else "")
    for number, line in enumerate(lines[1:], 2):
        try:
            row = files.parse_json(line)
        except ValueError:
            continue  # the script was stopped while it wrote the line
        name, ms, count = _row(path, number, row)
        rounds.setdefault(name, []).append(ms)
        counts[name] = counts.get(name, 0) + count
    if missing := sorted(names - set(rounds)):
        raise UserError(
            f"{path} lacks {len(missing)} of {len(names)} files, such as {missing[0]}: run {SCRIPT} on the device again, it goes"
            " on where it stopped"
        )
    if few := sorted(n for n in names if len(rounds[n]) < rounds_wanted):
        print(
            f"warning    {path} has fewer than {rounds_wanted} rounds of {len(few)} files, such as {few[0]}: run {SCRIPT} on the"
            f" device again with --rounds={rounds_wanted}, it goes on where it stopped"
        )
    timings = {n: latency_table.timing(rounds[n], counts[n]) for n in names}
    return header, timings


def _header(path: pathlib.Path, line: str) -> dict[str, Any]:
    """Returns the first line of a file of times; raises a UserError for another one."""
    try:
        header = files.parse_json(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or "version" not in header:
        raise UserError(
            f"{path} does not begin with the header of {SCRIPT}: delete it, and run {SCRIPT} on the device anew"
        )
    if header["version"] != time_files.VERSION:
        raise UserError(
            f"{path} is of version {shown(header['version'])}: copy {SCRIPT} to the device again and run it anew"
        )
    threads = header.get("threads")
    wrong = [
        key
        for key in ("device", "runtime", "statistic")
        if not isinstance(header.get(key), str) or not header[key].strip()
    ]
    if type(threads) is not int or threads < 0:
        wrong.append("threads")
    if wrong:
        raise UserError(
            f"{path}, line 1: {wrong[0]} = {shown(header.get(wrong[0]))}: delete the file, and run {SCRIPT} on the device anew"
        )
    return header


def _row(path: pathlib.Path, number: int, row: Any) -> tuple[str, float, int]:
    """Returns (name of a target, ms, runs) of a line of times; raises a UserError for another line.

    Args:
      path: the file.
      number: of the line, from 1.
      row: what the line stands for.
    """
    row = row if isinstance(row, dict) else {}
    name, ms, count = row.get("file"), row.get("ms"), row.get("count")
    is_latency = type(ms) in (int, float) and 0 < ms <= sys.float_info.max
    if not isinstance(name, str):
        problem = "it names no file"
    elif not is_latency:
        problem = f"{shown(name)} has ms = {shown(ms)}"
    elif type(count) is not int or count < 1:
        problem = f"{shown(name)} has count = {shown(count)}"
    else:
        return name.removesuffix(".tflite"), float(ms), count
    raise UserError(
        f"{path}, line {number}: {problem}: delete the line, and run {SCRIPT} on the device again, it measures this anew"
    )
