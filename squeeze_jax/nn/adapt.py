"""Wraps networks of `flax.nnx` as Linen modules, so that this library can train them, count their costs and export them."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from squeeze_jax.errors import UserError

_Tree = dict[str, Any]


class _Source:
    """An NNX module, split into its graph and its variables.

    It is compared by identity, because Linen needs attributes of modules that can be compared.
    """

    def __init__(self, module: nnx.Module):
        self.graph, *states = nnx.split(module, nnx.Param, nnx.BatchStat, ...)
        self.params, self.stats, self.streams = (
            dict(nnx.to_flat_state(state)) for state in states
        )
        for path, variable in self.streams.items():
            if not isinstance(variable, nnx.RngState):
                name, kind = "/".join(map(str, path)), type(variable).__name__
                raise UserError(
                    f"{name} is an nnx.{kind}: a network may have nnx.Param, nnx.BatchStat and random streams; make it one"
                    " of these, or leave it out"
                )


class FromNNX(nn.Module):
    """A Linen module that runs a network of `flax.nnx`.

    Its collections params and batch_stats hold the NNX module's variables under the names of the module's attributes.
    `init` returns the weights that the NNX module has. The module runs after `module.train()` in training, otherwise after
    `module.eval()`. In training, its random streams are seeded from the rng "dropout".

    Attributes:
      source: the NNX module's parts, as `from_nnx` makes them.
    """

    source: _Source

    @nn.compact
    def __call__(self, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        """Returns the outputs of the NNX module; in training, also updates batch_stats."""
        source = self.source
        params = {
            name: self.param(name, lambda key, tree=tree: tree)
            for name, tree in _nested(source.params).items()
        }
        stats = {
            name: self.variable("batch_stats", name, lambda tree=tree: tree)
            for name, tree in _nested(source.stats).items()
        }
        values = {name: variable.value for name, variable in stats.items()}
        flat = _with_values(source.params, params) | _with_values(source.stats, values)
        streams = {path: v.replace(v[...]) for path, v in source.streams.items()}
        module = nnx.merge(source.graph, nnx.from_flat_state(flat | streams))
        if train:
            module.train()
            tags = {v.tag for v in source.streams.values() if isinstance(v, nnx.RngKey)}
            if tags and self.has_rng("dropout"):
                keys = jax.random.split(self.make_rng("dropout"), len(tags))
                nnx.reseed(module, **dict(zip(sorted(tags), keys, strict=True)))
        else:
            module.eval()
        outputs = module(*args, **kwargs)
        if train and not self.is_initializing():
            new_stats = nnx.to_flat_state(nnx.state(module, nnx.BatchStat))
            new_values = _nested(dict(new_stats))
            for name, variable in stats.items():
                variable.value = new_values[name]
        return outputs


def from_nnx(module: nnx.Module) -> FromNNX:
    """Returns a Linen module that runs a network of `flax.nnx`.

    Raises:
      UserError: The network is not an NNX module, or it has variables other than parameters, batch statistics and random
        streams.
    """
    if not isinstance(module, nnx.Module):
        raise UserError(
            f"{type(module).__name__} is not an nnx.Module: give a network of flax.nnx"
        )
    return FromNNX(_Source(module))


def _nested(flat: dict) -> _Tree:
    """Converts {path: variable} to nested dicts of arrays with strings as keys."""
    tree: _Tree = {}
    for path, variable in flat.items():
        *parents, last = map(str, path)
        subtree = tree
        for name in parents:
            subtree = subtree.setdefault(name, {})
        subtree[last] = variable[...]
    return tree


def _with_values(flat: dict, tree: _Tree) -> dict:
    """Returns {path: variable} with the arrays of nested dicts as values."""
    variables = {}
    for path, variable in flat.items():
        value = tree
        for name in map(str, path):
            value = value[name]
        variables[path] = variable.replace(value)
    return variables
