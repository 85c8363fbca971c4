"""ELECTRA pretraining: a small generator fills in masked tokens, and a discriminator finds the tokens that it replaced.

Clark, Luong, Le, Manning 2020, arXiv 2003.10555, section 2. Both networks are ELECTRAs and share their embeddings (section
3.2). The generator's tokens are sampled from its distribution. No gradient flows through the samples, so each network learns
from its own loss (`train/replaced.py`). Variants are the discriminators of `electra`; a generator has a fraction of the
discriminator's channels (Table 6). `split_networks` returns both as networks of `electra`, to save them. `fine_tuned` selects
the part that fine-tuning starts from.
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
# {variant: the generator's fraction of the discriminator's channels, heads and feed-forward channels}.
GENERATORS = {"large": 1 / 4, "base": 1 / 3, "small": 1 / 4, "toy": 1 / 2}

# The inputs that hold the original tokens.
_TARGETS = ("targets", "chosen")


class ElectraPretraining(nn.Module):
    """Generator and discriminator; the parameters are "embeddings", "generator" and "discriminator".

    Logits are {"masked_lm": the generator's logits, [b, p, vocabulary] or [b, l, vocabulary], "replaced": the discriminator's
    logits, [b, l], "is_replaced": float32 [b, l], 1 where the token differs from the original}. Endpoints are those of the
    discriminator, "corrupted" int [b, l], its input tokens, and "is_replaced".

    Attributes:
      row, generator_row: sizes of the discriminator and the generator.
      settings: settings of both, see `_encoder.Settings`.
    """

    row: Row
    generator_row: Row
    settings: Settings

    task = "pretraining"

    def setup(self):
        """Creates the layers."""
        plain = self.networks()
        self.embeddings = _encoder.embeddings(plain.discriminator, name=None)
        self.generator = plain.generator.clone(shared=self.embeddings, parent=self)
        self.discriminator = plain.discriminator.clone(
            shared=self.embeddings, parent=self
        )

    @nn.nowrap
    def networks(self) -> "Networks":
        """Returns both networks, each with its own embeddings."""
        both = {"discriminator": (self.row, "replaced")}
        both["generator"] = (self.generator_row, "masked_lm")
        return Networks(
            **{
                name: Electra(row, task, 2, False, self.settings, parent=None)
                for name, (row, task) in both.items()
            }
        )

    def __call__(self, x, *, train: bool = False):
        """Returns (logits, endpoints).

        Args:
          x: {"tokens", "segments", "attended"}, each [b, l], with masked tokens; "targets" int, the original tokens, and
            "chosen" bool, the places that count. Both are [b, p] for "positions" int [b, p], or [b, l] without positions.
            Without targets the generator scores all tokens and none is replaced.
          train: whether dropout acts. Sampling uses the rng "sample"; without it the samples are the same in every call.
        """
        x = named_inputs(x, (*TEXT_INPUTS, "positions", *_TARGETS), type(self).__name__)
        target_names = [name for name in _TARGETS if name in x]
        if len(target_names) == 1:
            raise UserError(
                f"inputs have only {target_names[0]!r}: give both of {' and '.join(_TARGETS)}, or neither"
            )
        plain = {name: array for name, array in x.items() if name not in _TARGETS}
        scores, _ = self.generator(plain, train=train)
        corrupted, is_replaced = x["tokens"], jnp.zeros(x["tokens"].shape, bool)
        if "targets" in x:
            key = self._key()
            samples = jax.random.categorical(key, jax.lax.stop_gradient(scores))
            corrupted, original = (
                _fill_in(x, tokens)
                for tokens in (samples.astype(jnp.int32), x["targets"])
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
    """One value for each of the two networks."""

    discriminator: Any
    generator: Any


def _fill_in(x: Mapping[str, jax.Array], tokens: jax.Array) -> jax.Array:
    """Returns the tokens of x with other tokens in the chosen places, int [b, l]."""
    if "positions" not in x:
        return jnp.where(x["chosen"], tokens, x["tokens"])

    def fill_row(row, positions, new):
        return row.at[positions].set(new, mode="drop")

    # Places that are not chosen get a position beyond the end, which is dropped.
    positions = jnp.where(x["chosen"], x["positions"], x["tokens"].shape[1])
    return jax.vmap(fill_row)(x["tokens"], positions, tokens)


# The default variant of `make`: the paper's smallest.
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
    """Builds a generator and a discriminator.

    Args:
      variant: a row of VARIANTS, the discriminator's sizes.
      generator: the generator's channels, heads and feed-forward channels as a fraction of the discriminator's; None for the
        paper's. Both have the same number of layers.
      segments: rows of the table of segments that replace the variant's; 0 for no segments.
      embedding_features: channels of the embeddings that replace the variant's.
      **options: options of the discriminator, see `_encoder.Options`; the generator shares rates, activation and epsilon.

    Raises:
      UserError: the variant or activation is unknown, the heads do not divide the features, or `generator` is out of range.
    """
    shared = electra.OPTIONS._replace(**options)
    sizes = {"segments": segments, "embedding_features": embedding_features}
    row, settings = _encoder.row_and_settings(
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


def split_networks(net: ElectraPretraining, variables: Mapping[str, Any]) -> Networks:
    """Splits a trained pair into two networks as `electra.make` builds them, which `models.save` can write.

    Args:
      net: the trained pair.
      variables: its {"params": …}.

    Returns:
      Networks of (discriminator, its variables) and (generator, its variables). Both contain the same embeddings.
    """
    params = variables["params"]
    plain = net.networks()
    pairs = {}
    for name in Networks._fields:
        own = {**params[name], "embeddings": params["embeddings"]}
        pairs[name] = (getattr(plain, name), {"params": own})
    return Networks(**pairs)


def fine_tuned(
    options: Mapping[str, Any],
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]]]:
    """Selects the network that fine-tuning starts from: the discriminator (section 2). The generator is discarded.

    Args:
      options: the options of `make` of the pretraining run's network.

    Returns:
      (the discriminator's options of `models.make`, a function from the run's variables to the discriminator's).
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
    return own, lambda variables: split_networks(net, variables).discriminator[1]
