"""Places arrays on devices: one mesh of three axes, batches over the first two, parameters by rules.

    data    data parallelism: every device holds all parameters
    fsdp    data parallelism too, but each parameter is divided over the axis and gathered when it is used
    tensor  tensor parallelism: parameters are divided over the axis, the batch is not

Jitted functions get their placement only from the `NamedSharding`s of their arguments; the compiler inserts the
communication.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from squeeze_jax import tree
from squeeze_jax.errors import UserError
from squeeze_jax.ranges import Range

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


def make_mesh(
    data: Annotated[int, Range(-1, 65536)] = -1,
    fsdp: Annotated[int, Range(-1, 65536)] = 1,
    tensor: Annotated[int, Range(-1, 65536)] = 1,
    rules: Sequence[tuple[str, str | tuple[str | None, ...] | None]] = (),
) -> Mesh:
    """Arranges all devices of all processes in a mesh.

    Args:
      data: size of the axis of data parallelism. One of the three sizes may be -1, which takes all remaining devices.
      fsdp: size of the axis of data parallelism that also divides the parameters.
      tensor: size of the axis that divides the parameters but not the batch.
      rules: (regular expression over parameter names, value) pairs that divide the parameters; the first match counts. A
        value is a tuple with an axis name or None for each dimension; or one axis name, which divides the largest dimension
        that its size divides; or None for no division. Without rules, "fsdp" divides all parameters. Not used here:
        `shard_state` applies the rules.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    del rules
    sizes, devices = [data, fsdp, tensor], jax.device_count()
    if any(s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise UserError(
            f"config.sharding: axes {sizes} should be positive, at most one of them -1"
        )
    known = math.prod(s for s in sizes if s != -1)
    sizes = [devices // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != devices:
        raise UserError(
            f"config.sharding: data x fsdp x tensor = {' x '.join(map(str, sizes))} does not make the"
            f" {devices} devices there are; set one of them to -1"
        )
    if jax.process_count() > 1 and jax.local_device_count() % sizes[2]:
        raise UserError(
            f"config.sharding.tensor = {sizes[2]} should divide the {jax.local_device_count()} devices of a process:"
            " every process reads whole rows"
        )
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * 3)


def check_batch(batch: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises a UserError unless the global batch size is divisible by the number of batch shards times `accumulate`."""
    parts = batch_shards(mesh) * accumulate
    if batch < 1 or batch % parts:
        near = max(1, round(batch / parts)) * parts
        raise UserError(
            f"config.batch = {batch} is not divisible by {parts} (mesh {dict(mesh.shape)}, accumulate {accumulate});"
            f" the nearest that is: {near}"
        )


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of devices over which a batch is divided."""
    return math.prod(mesh.shape[a] for a in BATCH)


def device_memory() -> tuple[int, str]:
    """Returns the bytes that one device of this process can use, and the device in words.

    The devices of a CPU share the memory of the machine, or of the container that the process runs in.
    """
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"], device.device_kind
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # "max" stands for no limit
        limit = pathlib.Path("/sys/fs/cgroup/memory.max").read_text()
        memory = min(memory, int(limit))
    return memory // jax.local_device_count(), "this machine"


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, P())


def over_batch(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that divides the first axis of an array, the batch axis, over the devices."""
    return NamedSharding(mesh, P(BATCH))


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Places this process's rows [b / processes, ...] as its part of global arrays [b, ...]."""
    sharding = over_batch(mesh)
    return {
        k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()
    }


def shard_state(
    state, mesh: Mesh, rules: Sequence = (), per_device: Sequence[str] = ()
):
    """Returns a tree of `NamedSharding`s for a `State`.

    The value of a rule is one of these:

    - a tuple with an axis name or None for each dimension of the parameter;
    - one axis name, which divides the largest dimension that is divisible by the size of the axis, if there is one;
    - None for a replicated parameter.

    Arrays that the optimizer or the average keeps for a parameter have the sharding of the parameter. The carry of a
    recurrent network and the state of the methods in `per_device` are divided over the batch axes.

    Args:
      state: a `State` of arrays or shapes.
      mesh: a mesh of `make_mesh`.
      rules: (regular expression over parameter names, value) pairs, see `tree`; without rules all get "fsdp".
      per_device: names of the methods whose state has a leading axis over the devices.

    Raises:
      UserError: a rule names an unknown axis, has the wrong length, or does not divide a dimension.
    """
    rules = rules or ((".", "fsdp"),)
    values = tree.apply_rules(
        rules, state.params, default=(), where="config.sharding.rules"
    )
    flat_values = jax.tree.leaves(values, is_leaf=lambda v: not isinstance(v, dict))
    flat = tree.flatten(state.params)
    specs = {
        n: _spec(n, x.shape, v, mesh)
        for (n, x), v in zip(flat.items(), flat_values, strict=True)
    }

    def place(name, leaf):
        field, _, path = name.partition("/")
        if field == "carry" or (field == "extra" and path.split("/")[0] in per_device):
            return over_batch(mesh)
        parameter = tree.owner(name, leaf.shape, flat)
        return (
            replicated(mesh)
            if parameter is None
            else NamedSharding(mesh, specs[parameter])
        )

    return tree.map_named(place, state)


def _spec(name: str, shape: tuple[int, ...], value, mesh: Mesh) -> P:
    """Converts the value of a rule to a PartitionSpec for one parameter; see `shard_state`."""
    axes = (
        [value] if isinstance(value, str) else [a for a in value or () if a is not None]
    )
    for axis in axes:
        if axis not in AXES:
            raise UserError(
                f"config.sharding.rules: unknown axis {axis!r} for {name}; choose from {', '.join(AXES)}"
            )
    if isinstance(value, str):
        size = mesh.shape[value]
        fitting = [i for i, n in enumerate(shape) if n % size == 0]
        if size == 1 or not fitting:
            return P()
        largest = max(fitting, key=lambda i: shape[i])
        return P(*(value if i == largest else None for i in range(len(shape))))
    if value and len(value) != len(shape):
        raise UserError(
            f"config.sharding.rules: {tuple(value)} has {len(value)} entries, {name} has shape {shape}"
        )
    for axis, n in zip(value or (), shape, strict=False):
        if axis is not None and n % mesh.shape[axis]:
            raise UserError(
                f"config.sharding.rules: {name} {shape}: {n} is not divisible by {axis} = {mesh.shape[axis]}"
            )
    return P(*(value or ()))
