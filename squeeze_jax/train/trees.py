"""Packs any pytree of arrays into a `State`, so that `Checkpoints` saves and restores it.

The pytree may be a dict, a TrainState of Flax, or the state of an NNX module.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError, shortened
from squeeze_jax.train.state import State


def pack(pytree: Any, step: int) -> State:
    """Returns a `State` whose params are the leaves of a pytree, by their paths.

    Saves random keys of `jax.random` as their key data, and leaves empty arrays out.

    Args:
      pytree: arrays, numbers and random keys, or `jax.ShapeDtypeStruct`s of them.
      step: the step of the state.

    Raises:
      UserError: a leaf is none of these, or there is nothing to save.
    """
    leaves = {}
    for name, leaf in _leaves_by_path(pytree).items():
        if isinstance(leaf, bool | int | float | complex | np.generic):
            leaf = np.asarray(leaf)
        if (
            not hasattr(leaf, "dtype")
            or not hasattr(leaf, "shape")
            or (isinstance(leaf, np.ndarray) and not _is_numeric(leaf.dtype))
        ):
            advice = (
                "; leave the function out, in a Flax dataclass by flax.struct.field(pytree_node=False)"
                if callable(leaf)
                else ""
            )
            raise UserError(
                f"{name} is {shortened(repr(leaf), 60)}: a checkpoint holds arrays, numbers and random keys{advice}"
            )
        if _is_key(leaf):
            is_shape = isinstance(leaf, jax.ShapeDtypeStruct)
            data = jax.random.key_data
            leaf = jax.eval_shape(data, leaf) if is_shape else data(leaf)
        if isinstance(leaf, np.ndarray):
            leaf = np.asarray(leaf, leaf.dtype.newbyteorder("="), order="C")
            leaf = jnp.asarray(_as_at_most_32_bits(leaf))
        if leaf.size:
            leaves[name] = leaf
    if not leaves:
        raise UserError("there are no arrays to save: give a pytree of arrays")
    return State(jnp.asarray(step, jnp.int32), {"tree": leaves}, {}, ())


def dtypes(pytree: Any) -> dict[str, str]:
    """Returns {path: dtype} of a pytree's leaves, such as {"['a']": "float32"}."""
    return {
        name: str(leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype)
        for name, leaf in _leaves_by_path(pytree).items()
    }


def check_dtypes(saved: Mapping[str, str] | None, like: Any) -> None:
    """Raises a UserError if a leaf of a template has another dtype than the saved one.

    Args:
      saved: see `dtypes`; None for a checkpoint of an earlier version, which has none.
      like: the template.
    """
    for name, dtype in dtypes(like).items() if saved else ():
        if saved.get(name, dtype) != dtype:
            raise UserError(
                f"the checkpoint has {name} in {saved[name]}, the template in {dtype}: give a template of the saved dtype, and"
                " convert what is restored"
            )


def unpack(state: State, like: Any) -> Any:
    """Returns the pytree that `pack` packed.

    Args:
      state: the state, with restored arrays.
      like: a pytree with the structure of the packed one. Each leaf of the result has the type of the leaf in `like`:
        Python number, numpy array, JAX array or random key.
    """
    arrays = state.params["tree"]

    def restore(name, template):
        if name not in arrays:
            return template  # an empty array, which is not saved
        if _is_key(template):
            is_array = isinstance(template, jax.Array)
            impl = jax.random.key_impl(template) if is_array else None
            return jax.random.wrap_key_data(arrays[name], impl=impl)
        on_host = bool | int | float | complex | np.generic | np.ndarray
        if not isinstance(template, on_host):
            return arrays[name]
        shape, dtype = np.shape(template), np.asarray(template).dtype
        value = np.ascontiguousarray(arrays[name])
        native = dtype.newbyteorder("=")
        if value.dtype != native:
            value = value.view(native)
        value = value.astype(dtype).reshape(shape)
        if isinstance(template, np.ndarray):
            return value
        return value[()] if isinstance(template, np.generic) else value.item()

    leaves = [restore(name, leaf) for name, leaf in _leaves_by_path(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def to_json(value: Any, where: str = "config") -> Any:
    """Converts settings to what JSON holds: numpy numbers to Python numbers, tuples to lists, keys to strings.

    Args:
      value: a number, string, None, list, tuple or dict of these.
      where: the name of the value in an error.

    Raises:
      UserError: JSON cannot hold the value; the message names its key.
    """
    if isinstance(value, Mapping):
        return {str(k): to_json(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v, f"{where}.{i}") for i, v in enumerate(value)]
    if isinstance(value, np.generic) or (
        hasattr(value, "dtype") and getattr(value, "ndim", None) == 0
    ):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{where} = {shortened(repr(value), 60)} cannot be saved with a checkpoint: give numbers, strings, lists and dicts"
    )


def _leaves_by_path(pytree: Any) -> dict[str, Any]:
    """Returns the leaves by their key paths, such as "['a'][0]"; a pytree that is one leaf has the name "value"."""
    paths = jax.tree_util.tree_leaves_with_path(pytree)
    return {jax.tree_util.keystr(path) or "value": leaf for path, leaf in paths}


def _as_at_most_32_bits(array: np.ndarray) -> np.ndarray:
    """Views numbers of 64 bits or more as uint32, because JAX would round them to 32 bits; returns others unchanged."""
    return array.reshape(-1).view(np.uint32) if array.dtype.itemsize > 4 else array


def _is_numeric(dtype: np.dtype) -> bool:
    """Returns whether a dtype is of numbers or bools; those of ml_dtypes, such as bfloat16, have the kind "V" without fields."""
    return dtype.kind in "biufc" or (dtype.kind == "V" and dtype.fields is None)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
