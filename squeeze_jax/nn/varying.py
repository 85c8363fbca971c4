"""Helpers for `jax.shard_map`: over which mesh axes the values of an array may differ between devices."""

import jax


def axes(x: jax.Array) -> tuple[str, ...]:
    """Returns the names of the mesh axes along which `x` may differ between devices; empty outside `jax.shard_map`."""
    array_type = jax.typeof(x)
    # Older versions of JAX call the attribute `vma`; newer ones also distinguish unreduced values.
    if hasattr(array_type, "vma"):
        names = array_type.vma
    else:
        names = array_type.manual_axis_type.varying
    return tuple(sorted(names))


def like(x: jax.Array, other: jax.Array) -> jax.Array:
    """Returns `x`, marked as varying over all mesh axes that `other` varies over.

    Call it on a small array before it is broadcast: then its gradient is summed over devices in its small shape.
    """
    missing = tuple(a for a in axes(other) if a not in axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
