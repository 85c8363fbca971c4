"""ELECTRA in pretraining: a small generator fills in masked tokens, and a discriminator tells which of them it did.

Clark, Luong, Le, Manning 2020, arXiv 2003.10555, section 2. Both are ELECTRAs and share their embeddings (section 3.2). The
generator's tokens are drawn from its distribution: no gradient goes through them, so that each learns by its own loss
(`train/replaced.py`). Variants are the discriminators of `electra`; generators have a part of their channels (Table 6).
`apart` gives both as networks of `electra`, to save; `fine_tuned` says what other tasks begin with.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax.errors import UserError
from squeeze_jax.models import electra
from squeeze_jax.models._encoder import Row, sized
from squeeze_jax.models.electra import Electra
from squeeze_jax.nn.embed import Embeddings

INPUTS = "tokens"
VARIANTS = {
    name: row
    for name, row in electra.VARIANTS.items()
    if not name.endswith("generator")
}
# Of the discriminator's channels, heads and feed-forward channels.
GENERATORS = {"large": 1 / 4, "base": 1 / 3, "small": 1 / 4, "toy": 1 / 2}


class _Sharing(Electra):
    """An ELECTRA with the embeddings of another."""

    shared: Embeddings | None = None

    def make_embeddings(self, **options) -> Embeddings:
        return self.shared


class ElectraPretraining(nn.Module):
    """Both networks; the parameters are "embeddings", "generator" and "discriminator".

    Logits are {"masked_lm": the generator's, [b, p, vocabulary] or [b, l, vocabulary], "replaced": the discriminator's,
    [b, l], "is_replaced": float32 [b, l], whether the token there is another than the original's}. Endpoints are those of the
    discriminator, "corrupted" int [b, l], the tokens that it sees, and "is_replaced".

    Attributes:
      row, generator_row: sizes of the discriminator and the generator.
      activation, epsilon, dropout, attention_dropout, dtype: of both, see `electra.make`.
    """

    row: Row
    generator_row: Row
    activation: str
    epsilon: float
    dropout: float
    attention_dropout: float
    dtype: str

    task = "pretraining"

    def setup(self):
        plain = self.networks()
        self.embeddings = plain.discriminator.make_embeddings(parent=self)
        self.generator = self._sharing(plain.generator)
        self.discriminator = self._sharing(plain.discriminator)

    def _sharing(self, net: Electra) -> Electra:
        fields = {name: getattr(net, name) for name in _FIELDS}
        return _Sharing(**fields, shared=self.embeddings)

    def networks(self) -> "Networks":
        """The two as they are alone."""
        both = {"discriminator": (self.row, "replaced")}
        both["generator"] = (self.generator_row, "masked_lm")
        return Networks(
            **{
                name: Electra(
                    row,
                    task,
                    2,
                    self.activation,
                    self.epsilon,
                    self.dropout,
                    self.attention_dropout,
                    self.dropout,
                    False,
                    self.dtype,
                    parent=None,
                )
                for name, (row, task) in both.items()
            }
        )

    def __call__(self, x, *, train: bool = False):
        """Logits and endpoints.

        Args:
          x: {"tokens", "segments", "mask"} of [b, l], tokens masked; "targets" int and "chosen" bool, the original tokens and
            which of the places count, both [b, p] for "positions" int [b, p], or without those [b, l]. Without targets
            the generator scores all tokens and none is replaced.
          train: whether dropout acts. The draws take the rng "sample", or else "dropout"; without either they are the same
            every time.
        """
        scores, _ = self.generator(x, train=train)
        corrupted, is_replaced = x["tokens"], jnp.zeros(x["tokens"].shape, bool)
        if "targets" in x:
            key = self._key()
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
            corrupted, original = (
                _put(x, tokens) for tokens in (drawn.astype(jnp.int32), x["targets"])
            )
            is_replaced = corrupted != original
        told, endpoints = self.discriminator(x | {"tokens": corrupted}, train=train)
        endpoints |= {"corrupted": corrupted, "is_replaced": is_replaced}
        logits = {
            "masked_lm": scores,
            "replaced": told,
            "is_replaced": is_replaced.astype(jnp.float32),
        }
        return logits, endpoints

    def _key(self) -> jax.Array:
        for name in ("sample", "dropout"):
            if self.has_rng(name):
                return self.make_rng(name)
        return jax.random.key(0)


_FIELDS = [
    name for name in Electra.__dataclass_fields__ if name not in ("parent", "name")
]


class Networks(NamedTuple):
    """What belongs to each of the two."""

    discriminator: Any
    generator: Any


def _put(x: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """The tokens of x with others in the places that are chosen, int [b, l]."""
    if "positions" not in x:
        return jnp.where(x["chosen"], tokens, x["tokens"])

    def row(before, at, new):
        return before.at[at].set(new, mode="drop")

    # Beyond the end is nowhere.
    at = jnp.where(x["chosen"], x["positions"], x["tokens"].shape[1])
    return jax.vmap(row)(x["tokens"], at, tokens)


# What `make` makes unless told otherwise: the paper's smallest.
_VARIANT = "small"


def make(
    variant: str = _VARIANT,
    *,
    generator: float | None = None,
    layers: int | None = None,
    features: int | None = None,
    heads: int | None = None,
    ffn_features: int | None = None,
    vocabulary: int | None = None,
    positions: int | None = None,
    segments: int | None = None,
    embedding_features: int | None = None,
    activation: str = "gelu",
    epsilon: float = 1e-12,
    dropout: float = 0.1,
    attention_dropout: float = 0.1,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> ElectraPretraining:
    """Builds both networks.

    Args:
      variant: a row of VARIANTS, the discriminator's.
      generator: the part of the discriminator's channels, heads and feed-forward channels that the generator has; None for
        the paper's. It has as many layers.
      embedding_features: channels of the embeddings instead of the variant's.
      Others: of the discriminator, see `bert.make`; rates, activation and epsilon are the generator's too.

    Raises:
      UserError: unknown variant or activation, heads that do not divide the features, or a part out of range.
    """
    row = sized(
        VARIANTS,
        variant,
        "electra_pretraining",
        activation,
        layers=layers,
        features=features,
        heads=heads,
        ffn_features=ffn_features,
        vocabulary=vocabulary,
        positions=positions,
        segments=segments,
        embedding_features=embedding_features,
    )
    part = GENERATORS[variant] if generator is None else generator
    if not 0 < part <= 1:
        raise UserError(f"generator = {part} should lie above 0 and be at most 1")
    sizes = {
        name: max(1, round(getattr(row, name) * part))
        for name in ("features", "heads", "ffn_features")
    }
    small = {"generator": row._replace(**sizes)}
    small = sized(small, "generator", "electra_pretraining", activation)
    return ElectraPretraining(
        row, small, activation, epsilon, dropout, attention_dropout, dtype
    )


def apart(net: ElectraPretraining, variables: Mapping[str, Any]) -> Networks:
    """The two networks, each with its variables {"params": …}, as `electra.make` builds them and `models.save` writes them.

    Args:
      net: what was trained.
      variables: its {"params": …}.

    Returns:
      (discriminator, its variables), (generator, its variables); the embeddings' arrays are those of both.
    """
    params = variables["params"]
    plain = net.networks()
    found = {}
    for name in Networks._fields:
        own = {**params[name], "embeddings": params["embeddings"]}
        found[name] = (getattr(plain, name), {"params": own})
    return Networks(**found)


def fine_tuned(
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """What is fine-tuned of a run, section 2: the discriminator; the generator is thrown away.

    Args:
      options: of `make`, that the run's network was made with.

    Returns:
      The discriminator's options of `models.make`, and a function from the run's variables to the discriminator's.
    """
    others = ("generator", "widths", "absent")
    sizes = {key: value for key, value in options.items() if key not in others}
    net = make(**sizes)
    own = {"name": "electra", "variant": _VARIANT, "task": "replaced", **sizes}
    start = "discriminator/"
    widths = {
        name.removeprefix(start): width
        for name, width in (options.get("widths") or {}).items()
        if name.startswith(start)
    }
    absent = [n for n in options.get("absent", ()) if n.startswith(start)]
    if widths:
        own["widths"] = widths
    if absent:
        own["absent"] = tuple(name.removeprefix(start) for name in absent)
    return own, lambda variables: apart(net, variables).discriminator[1]
