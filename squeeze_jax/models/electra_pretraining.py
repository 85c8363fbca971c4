"""ELECTRA in pretraining: a small generator fills in masked tokens, and a discriminator tells which of them it did.

Clark, Luong, Le, Manning 2020, arXiv 2003.10555, section 2. Both are ELECTRAs and share their embeddings (section 3.2). The
generator's tokens are drawn from its distribution: no gradient goes through them, so that each learns by its own loss
(`train/replaced.py`). Variants are the discriminators of `electra`; generators have a part of their channels (Table 6).
`apart` gives both as networks of `electra`, to save; `fine_tuned` says what other tasks begin with.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.models import _encoder, electra
from squeeze_jax.models._encoder import Row, Settings
from squeeze_jax.models.electra import Electra
from squeeze_jax.nn import encoder
from squeeze_jax.nn.embed import TEXT_INPUTS, named_inputs
from squeeze_jax.ranges import Count, Part, Whole

INPUTS = "tokens"
CLASSIFIER = ("generator/head", "discriminator/head")
VARIANTS = {
    name: row
    for name, row in electra.VARIANTS.items()
    if not name.endswith("generator")
}
# Of the discriminator's channels, heads and feed-forward channels.
GENERATORS = {"large": 1 / 4, "base": 1 / 3, "small": 1 / 4, "toy": 1 / 2}

# The inputs that tell the original tokens.
_TARGETS = ("targets", "chosen")


class ElectraPretraining(nn.Module):
    """Both networks; the parameters are "embeddings", "generator" and "discriminator".

    Logits are {"masked_lm": the generator's, [b, p, vocabulary] or [b, l, vocabulary], "replaced": the discriminator's,
    [b, l], "is_replaced": float32 [b, l], whether the token there is another than the original's}. Endpoints are those of the
    discriminator, "corrupted" int [b, l], the tokens that it sees, and "is_replaced".

    Attributes:
      row, generator_row: sizes of the discriminator and the generator.
      settings: of both, see `_encoder.Settings`.
    """

    row: Row
    generator_row: Row
    settings: Settings

    task = "pretraining"

    def setup(self):
        plain = self.networks()
        self.embeddings = _encoder.embeddings(plain.discriminator, name=None)
        self.generator = plain.generator.clone(shared=self.embeddings, parent=self)
        self.discriminator = plain.discriminator.clone(
            shared=self.embeddings, parent=self
        )

    @nn.nowrap
    def networks(self) -> "Networks":
        """The two as they are alone."""
        both = {"discriminator": (self.row, "replaced")}
        both["generator"] = (self.generator_row, "masked_lm")
        return Networks(
            **{
                name: Electra(row, task, 2, False, self.settings, parent=None)
                for name, (row, task) in both.items()
            }
        )

    def __call__(self, x, *, train: bool = False):
        """Logits and endpoints.

        Args:
          x: {"tokens", "segments", "attended"} of [b, l], tokens masked; "targets" int and "chosen" bool, the original tokens and
            which of the places count, both [b, p] for "positions" int [b, p], or without those [b, l]. Without targets
            the generator scores all tokens and none is replaced.
          train: whether dropout acts. The draws take the rng "sample"; without it they are the same every time.
        """
        x = named_inputs(x, (*TEXT_INPUTS, "positions", *_TARGETS), type(self).__name__)
        told = [name for name in _TARGETS if name in x]
        if len(told) == 1:
            raise UserError(
                f"inputs have {told[0]!r} alone: give both of {' and '.join(_TARGETS)}, or neither"
            )
        plain = {name: array for name, array in x.items() if name not in _TARGETS}
        scores, _ = self.generator(plain, train=train)
        corrupted, is_replaced = x["tokens"], jnp.zeros(x["tokens"].shape, bool)
        if "targets" in x:
            key = self._key()
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(scores))
            corrupted, original = (
                _put(x, tokens) for tokens in (drawn.astype(jnp.int32), x["targets"])
            )
            is_replaced = corrupted != original
        plain.pop("positions", None)
        replaced, endpoints = self.discriminator(
            plain | {"tokens": corrupted}, train=train
        )
        endpoints |= {"corrupted": corrupted, "is_replaced": is_replaced}
        logits = {
            "masked_lm": scores,
            "replaced": replaced,
            "is_replaced": is_replaced.astype(jnp.float32),
        }
        return logits, endpoints

    def _key(self) -> jax.Array:
        return self.make_rng("sample") if self.has_rng("sample") else jax.random.key(0)


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


@registry.options(electra.OPTIONS, without=("num_classes", "head_dropout"))
def make(
    variant: str = _VARIANT,
    *,
    generator: Part | None = None,
    segments: Whole | None = None,
    embedding_features: Count | None = None,
    **options: Any,
) -> ElectraPretraining:
    """Builds both networks.

    Args:
      variant: a row of VARIANTS, the discriminator's.
      generator: the part of the discriminator's channels, heads and feed-forward channels that the generator has; None for
        the paper's. It has as many layers.
      segments: see `bert.make`.
      embedding_features: channels of the embeddings instead of the variant's.
      **options: of the discriminator, see `Options`; rates, activation and epsilon are the generator's too.

    Raises:
      UserError: unknown variant or activation, heads that do not divide the features, or a part out of range.
    """
    shared = electra.OPTIONS._replace(**options)
    sizes = {"segments": segments, "embedding_features": embedding_features}
    row, settings = _encoder.chosen(
        VARIANTS, variant, "electra_pretraining", shared, **sizes
    )
    part = GENERATORS[variant] if generator is None else generator
    if not 0 < part <= 1:
        raise UserError(f"generator = {part} should lie above 0 and be at most 1")
    sizes = {
        name: max(1, round(getattr(row, name) * part))
        for name in ("features", "heads", "ffn_features")
    }
    small = row._replace(**sizes)
    encoder.check_divisors(small.features, small.ffn_features, small.heads)
    return ElectraPretraining(row, small, settings)


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
