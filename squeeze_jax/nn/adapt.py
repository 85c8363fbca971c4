"""Networks of `flax.nnx` as Linen modules, so that they train, are counted and become files as others do."""

from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from squeeze_jax.errors import UserError

_Tree = dict[str, Any]


class _Source:
    """An NNX module in parts; compared by identity, since a Linen module's attributes have to be comparable."""

    def __init__(self, module: nnx.Module):
        self.graph, params, stats, rest = nnx.split(
            module, nnx.Param, nnx.BatchStat, ...
        )
        self.params, self.stats = (
            dict(nnx.to_flat_state(part)) for part in (params, stats)
        )
        self.rest = dict(nnx.to_flat_state(rest))
        for path, variable in self.rest.items():
            if not isinstance(variable, nnx.RngState):
                name, kind = "/".join(map(str, path)), type(variable).__name__
                raise UserError(
                    f"{name} is an nnx.{kind}: a network may have nnx.Param, nnx.BatchStat and random streams; make it one"
                    " of these, or leave it out"
                )


class FromNNX(nn.Module):
    """A network of `flax.nnx` with the variables of a Linen one: params and batch_stats, by the names of its attributes.

    Initialization gives the weights that the NNX module has. In training mode it is called after `module.train()`, else
    after `module.eval()`; its random streams come from the rng "dropout".

    Attributes:
      source: made by `from_nnx`.
    """

    source: _Source

    @nn.compact
    def __call__(self, *args: Any, train: bool = False, **kwargs: Any) -> Any:
        """Returns what the NNX module returns."""
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
        flat = _filled(source.params, params) | _filled(source.stats, values)
        streams = {path: v.replace(v[...]) for path, v in source.rest.items()}
        module = nnx.merge(source.graph, nnx.from_flat_state(flat | streams))
        if train:
            module.train()
            tags = {v.tag for v in source.rest.values() if isinstance(v, nnx.RngKey)}
            if tags and self.has_rng("dropout"):
                keys = jax.random.split(self.make_rng("dropout"), len(tags))
                nnx.reseed(module, **dict(zip(sorted(tags), keys, strict=True)))
        else:
            module.eval()
        outputs = module(*args, **kwargs)
        if train and not self.is_initializing():
            after = _nested(dict(nnx.to_flat_state(nnx.state(module, nnx.BatchStat))))
            for name, variable in stats.items():
                variable.value = after[name]
        return outputs


def from_nnx(module: nnx.Module) -> FromNNX:
    """Returns a network of `flax.nnx` as a Linen module.

    Raises:
      UserError: it is no NNX module, or it has variables of other kinds than parameters and batch statistics.
    """
    if not isinstance(module, nnx.Module):
        raise UserError(f"{type(module).__name__} is no nnx.Module")
    return FromNNX(_Source(module))


def _nested(flat: dict) -> _Tree:
    """{path: variable} as nested dicts of arrays under strings."""
    tree: _Tree = {}
    for path, variable in flat.items():
        *parents, last = map(str, path)
        at = tree
        for name in parents:
            at = at.setdefault(name, {})
        at[last] = variable[...]
    return tree


def _filled(flat: dict, tree: _Tree) -> dict:
    """{path: variable} with the arrays of nested dicts."""
    filled = {}
    for path, variable in flat.items():
        value = tree
        for name in map(str, path):
            value = value[name]
        filled[path] = variable.replace(value)
    return filled
