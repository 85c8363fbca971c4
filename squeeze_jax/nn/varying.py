"""Which mesh axes a value differs along, inside `jax.shard_map`."""

import jax


def axes(x: jax.Array) -> tuple[str, ...]:
    """Returns the manual mesh axes over whose devices `x` may differ; empty outside `jax.shard_map`."""
    kind = jax.typeof(x)
    # The attribute of the type was `vma` before it also told apart unreduced values.
    found = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    return tuple(sorted(found))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Marks `x` as varying over the axes that `other` varies over.

    Done to a small array before it is broadcast, its gradient is summed over devices while it is small again.
    """
    missing = tuple(a for a in axes(other) if a not in axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
