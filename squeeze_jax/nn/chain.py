"""A network that runs its modules one after the other, so that each of them can also run on its own."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError
from squeeze_jax.nn.dense import Dense
from squeeze_jax.nn.dropout import Dropout


@dataclasses.dataclass(frozen=True)
class Piece:
    """A module and its name in a `Chain`; two pieces are equal if they compute the same function of their variables."""

    name: str
    module: nn.Module


class Chain(nn.Module):
    """A network of pieces: each piece's output is the next piece's input, and the last output is the logits.

    `Chain((piece,))` runs a piece alone, on the part of the network's variables that has its name. So a method can compile
    each piece once and compose many networks of them.

    Attributes:
      pieces: pieces with different names, each called with (x, train=...).
    """

    pieces: tuple[Piece, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False):
        """Returns (output of the last piece in float32, {name: output} of all pieces before it).

        Args:
          x: input of the first piece.
          train: whether normalisations use the batch's statistics and dropout is active.

        Raises:
          UserError: Two pieces have the same name.
        """
        names = [piece.name for piece in self.pieces]
        if len(set(names)) < len(names):
            raise UserError(f"Chain: its pieces are named {names}: name each once")
        endpoints = {}
        for name, module in ((p.name, p.module) for p in self.pieces):
            x = endpoints[name] = module.clone(parent=self, name=name)(x, train=train)
        endpoints.pop(names[-1])
        return x.astype(jnp.float32), endpoints


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
