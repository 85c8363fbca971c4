"""Where arrays live: one mesh of three axes, batches over the first two, parameters by rules.

    data    replicated data parallel: every device holds all parameters
    fsdp    data parallel too, but each parameter is divided over the axis and gathered when used
    tensor  parameters divided over the axis while the batch is not

Everything below `jax.jit` is told only through `NamedSharding`s; the compiler inserts the communication.
"""

import math
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
    """Arranges all devices of all processes.

    Args:
      data, fsdp, tensor: sizes of the axes; one may be -1 for all devices that are left.
      rules: for `shard_state`; taken here so that one config section serves both.

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
    """Raises a UserError unless the global batch divides evenly over the mesh and the accumulated parts."""
    parts = batch_shards(mesh) * accumulate
    if batch < 1 or batch % parts:
        near = max(1, round(batch / parts)) * parts
        raise UserError(
            f"config.batch = {batch} is not divisible by {parts} (mesh {dict(mesh.shape)}, accumulate {accumulate});"
            f" the nearest that is: {near}"
        )


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of devices that a batch is divided over."""
    return math.prod(mesh.shape[a] for a in BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def over_batch(mesh: Mesh) -> NamedSharding:
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
    """Returns a tree of NamedShardings for a `State` (of shapes or arrays).

    A rule's value is a tuple of axis names or None, one for each dimension; or one axis name, which then takes the
    largest dimension it divides; or None for a replicated parameter. Without rules an fsdp axis takes everything.
    What the optimizer or the average keeps for a parameter lies where the parameter lies. A recurrent network's carry,
    and the state of the methods that `per_device` names, lie over the batch's axes.

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
        whole, _, rest = name.partition("/")
        if whole == "carry" or (whole == "extra" and rest.split("/")[0] in per_device):
            return over_batch(mesh)
        parameter = tree.owner(name, leaf.shape, flat)
        return (
            replicated(mesh)
            if parameter is None
            else NamedSharding(mesh, specs[parameter])
        )

    return tree.map_named(place, state)


def _spec(name: str, shape: tuple[int, ...], value, mesh: Mesh) -> P:
    """A rule's value as a PartitionSpec for one parameter."""
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
        where = max(fitting, key=lambda i: shape[i])
        return P(*(value if i == where else None for i in range(len(shape))))
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
