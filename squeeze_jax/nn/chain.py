"""A network that runs its modules one after the other, so that each of them can also run on its own."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.dropout import Dropout


class Output(NamedTuple):
    """The output of a module that has endpoints of its own, such as attention probabilities.

    The module names them in its attribute `endpoints`.

    Attributes:
      value: input of the next module, an array or a pytree of arrays.
      endpoints: {name: array}; the network's endpoints have these names with the piece's number at the end.
    """

    value: Any
    endpoints: Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A module and its name in a `Chain`; two pieces are equal if they compute the same function of their variables.

    Attributes:
      name: name of the piece, which may be a path such as "layer1/attention/query".
      module: the module, called with (x, train=...). It returns an array, a pytree of arrays or an `Output`.
      owner: name of the earlier piece whose weights this piece uses, by an equal module; None for weights of its own.
      number: end of the names of its endpoints if it returns an `Output`, such as "1".
    """

    name: str
    module: nn.Module
    owner: str | None = None
    number: str = ""

    @property
    def scope(self) -> str:
        """Returns the name of the piece that owns the weights, as it stands in the variables."""
        return self.owner or self.name


class Chain(nn.Module):
    """A network of pieces: each piece's output is the next piece's input, and the last output is the logits.

    `Chain((piece,))` runs a piece alone, on the part of the network's variables that has its name. So a method can compile
    each piece once and compose many networks of them.

    Attributes:
      pieces: pieces with different names.
    """

    pieces: tuple[Piece, ...]

    @nn.compact
    def __call__(self, x: Any, *, train: bool = False):
        """Returns (output of the last piece in float32, endpoints).

        The endpoints are {name: output} of all pieces before the last one. A piece that returns an `Output` has the
        endpoints of the `Output` instead, also if it is the last one.

        Args:
          x: input of the first piece, an array or a pytree of arrays.
          train: whether normalisations use the batch's statistics and dropout is active.

        Raises:
          UserError: Two pieces have the same name, or a piece differs from the piece that owns its weights.
        """
        names = [piece.name for piece in self.pieces]
        if len(set(names)) < len(names):
            raise UserError(f"Chain: its pieces are named {names}: name each once")
        modules, endpoints = self._modules(), {}
        for piece in self.pieces:
            x = modules[piece.scope](x, train=train)
            if isinstance(x, Output):
                endpoints |= {k + piece.number: v for k, v in x.endpoints.items()}
                x = x.value
            elif piece.name != names[-1]:
                endpoints[piece.name] = x
        return jax.tree.map(lambda a: a.astype(jnp.float32), x), endpoints

    def _modules(self) -> dict[str, nn.Module]:
        """Creates the modules of all pieces, {scope: module}."""
        root = _Modules({})
        for piece in self.pieces:
            *folders, last = piece.scope.split("/")
            folder = root
            for name in folders:
                folder = folder.children.setdefault(name, _Modules({}))
            if folder.children.setdefault(last, piece.module) != piece.module:
                raise UserError(
                    f"Chain: {piece.name} uses the weights of {piece.scope}, but is another module: make both equal"
                )
        created = {
            name: _Folder(child, name=name)
            if isinstance(child, _Modules)
            else child.clone(parent=self, name=name)
            for name, child in root.children.items()
        }
        return {
            scope: functools.reduce(getattr, rest, created[first])
            for scope in dict.fromkeys(piece.scope for piece in self.pieces)
            for first, *rest in [scope.split("/")]
        }


class _Modules:
    """Modules by name, in folders; Linen leaves them alone, because it does not know the class."""

    def __init__(self, children: dict):
        self.children = children


class _Folder(nn.Module):
    """A module without a computation of its own, which gives the names of its modules a common beginning."""

    modules: _Modules

    def setup(self):
        for name, child in self.modules.children.items():
            nested = isinstance(child, _Modules)
            setattr(self, name, _Folder(child) if nested else child.clone())


class Classifier(nn.Module):
    """Dropout and a dense layer in float32: [b, c] → [b, num_classes]; the last piece of a `Chain`.

    Attributes:
      num_classes: number of outputs.
      dropout: dropout rate, needs the rng "dropout" in training.
    """

    num_classes: int
    dropout: float = 0.0

    def setup(self):
        """Creates the layers; the dense layer's parameters are the piece's own."""
        self.drop = Dropout(self.dropout)
        self.dense = Dense(
            self.num_classes,
            dtype=jnp.float32,
            kernel_init=nn.initializers.normal(0.01),
            fixed=True,
        )
        nn.share_scope(self, self.dense)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the logits."""
        return self.dense(self.drop(x, train=train))
