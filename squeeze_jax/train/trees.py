"""Any pytree of arrays as a `State`, so that `Checkpoints` saves and restores it: a dict, a TrainState, the state of an NNX module."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax.errors import UserError, shortened
from squeeze_jax.train.state import State


def packed(whole: Any, step: int) -> State:
    """Returns a state whose params are the leaves of a pytree by their paths.

    Keys of `jax.random` are saved as their numbers. Empty arrays hold nothing, and are left out.

    Args:
      whole: a pytree of arrays, numbers and random keys, or of `jax.ShapeDtypeStruct`s.
      step: under which it is saved.

    Raises:
      UserError: a leaf that is none of these, or nothing to save.
    """
    leaves = {}
    for name, leaf in _named(whole).items():
        if isinstance(leaf, bool | int | float | complex | np.generic):
            leaf = np.asarray(leaf)
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            raise UserError(
                f"{name} is {shortened(repr(leaf), 60)}: a checkpoint holds arrays, numbers and random keys"
            )
        if _is_key(leaf):
            shapes = isinstance(leaf, jax.ShapeDtypeStruct)
            data = jax.random.key_data
            leaf = jax.eval_shape(data, leaf) if shapes else data(leaf)
        if isinstance(leaf, np.ndarray):
            leaf = jnp.asarray(_words(leaf))
        if leaf.size:
            leaves[name] = leaf
    if not leaves:
        raise UserError("there are no arrays to save: give a pytree of arrays")
    return State(jnp.asarray(step, jnp.int32), {"tree": leaves}, {}, ())


def unpacked(state: State, like: Any) -> Any:
    """Returns the pytree of a packed state, with the structure and the kinds of leaves of `like`."""
    arrays = state.params["tree"]

    def leaf(name, old):
        if name not in arrays:
            return old  # empty
        if _is_key(old):
            kind = jax.random.key_impl(old) if isinstance(old, jax.Array) else None
            return jax.random.wrap_key_data(arrays[name], impl=kind)
        if not isinstance(old, bool | int | float | complex | np.generic | np.ndarray):
            return arrays[name]
        kind = np.asarray(old)
        value = np.ascontiguousarray(arrays[name])
        if value.dtype != kind.dtype:
            value = value.view(kind.dtype)
        value = value.reshape(kind.shape)
        if isinstance(old, np.ndarray):
            return value
        return value[()] if isinstance(old, np.generic) else value.item()

    leaves = [leaf(name, old) for name, old in _named(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def plain(value: Any, where: str = "config") -> Any:
    """Returns what JSON holds of settings: numbers of numpy as Python's, tuples as lists.

    Raises:
      UserError: a value that JSON has nothing for; names the key.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v, f"{where}.{i}") for i, v in enumerate(value)]
    if isinstance(value, np.generic) or (
        hasattr(value, "dtype") and getattr(value, "ndim", None) == 0
    ):
        return value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(
        f"{where} = {shortened(repr(value), 60)} cannot be saved with a checkpoint: give numbers, strings, lists and dicts"
    )


def _named(whole: Any) -> dict[str, Any]:
    paths = jax.tree_util.tree_leaves_with_path(whole)
    return {jax.tree_util.keystr(path) or "value": leaf for path, leaf in paths}


def _words(array: np.ndarray) -> np.ndarray:
    """Returns numbers of 64 bits and more, which JAX would round, as words of 32."""
    return array.reshape(-1).view(np.uint32) if array.dtype.itemsize > 4 else array


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
