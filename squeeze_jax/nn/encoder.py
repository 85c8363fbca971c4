"""The layer of a transformer, and a stack of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Integral

import flax.linen as nn
import jax

from squeeze_jax import registry
from squeeze_jax.errors import UserError
from squeeze_jax.nn import activations
from squeeze_jax.nn.attention import Attended, Groups, SelfAttention
from squeeze_jax.nn.blocks import residual_sum
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.dtypes import float_dtype
from squeeze_jax.nn.layer_norm import LayerNorm

DENSE = Groups()
GroupsLike = int | Mapping[str, int]
KERNEL_INIT = nn.initializers.truncated_normal(0.02)


class Layer(nn.Module):
    """Self-attention, then a position-wise feed-forward network, each with a residual; arXiv 1706.03762, Figure 1.

    y = norm(x + attention(x)), z = norm(y + ffn(y)); with `norm_first` y = x + attention(norm(x)), z = y + ffn(norm(y)).
    Every fully connected layer is a convolution with kernel 1 and groups (SqueezeBERT, arXiv 2006.11316, section 3).

    Attributes:
      heads: of attention.
      ffn_features: between the two layers of the feed-forward network.
      groups: of the six convolutions.
      activation: a name of `activations.ACTIVATIONS`, between those two layers.
      dropout: rate before the residual sums, 0 to 1; needs the rng "dropout" in training.
      attention_dropout: rate on attention's probabilities, 0 to 1.
      epsilon: of the normalisations.
      norm_first: normalises before attention and feed-forward network instead of after the sums.
      causal: a position sees none that come after it.
      kernel_init: initializer of all kernels.
      output_init: of those of attention's output and the feed-forward network's second layer; None for `kernel_init`.
      shuffle: see `SelfAttention`.
      features: see `SelfAttention`.
    """

    heads: int
    ffn_features: int
    groups: Groups = Groups()
    activation: str = "gelu"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    epsilon: float = 1e-12
    norm_first: bool = False
    causal: bool = False
    kernel_init: Callable = KERNEL_INIT
    output_init: Callable | None = None
    shuffle: bool = False
    features: int | None = None

    residual = True

    @nn.compact
    def __call__(
        self, x: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> tuple[jax.Array, Attended]:
        """x: [b, l, d], mask: bool [b, l], True for real tokens → [b, l, d] and what attention gave."""
        drop = partial(Dropout(self.dropout), train=train)
        attention = SelfAttention(
            self.heads,
            self.groups,
            self.attention_dropout,
            self.causal,
            self.kernel_init,
            self.output_init,
            self.shuffle,
            self.features,
            name="attention",
        )
        norms = [
            LayerNorm(self.epsilon, name=name)
            for name in ("attention_norm", "ffn_norm")
        ]
        if self.norm_first:
            y, attended = attention(norms[0](x), mask, train=train)
            y = residual_sum(x, drop(y), self, "attention/output")
            z = drop(self._ffn(norms[1](y)))
            return residual_sum(y, z, self, "ffn_out"), attended
        y, attended = attention(x, mask, train=train)
        y = norms[0](residual_sum(x, drop(y), self, "attention/output"))
        z = drop(self._ffn(y))
        return norms[1](residual_sum(y, z, self, "ffn_out")), attended

    def _ffn(self, x):
        return feed_forward(
            x,
            self.ffn_features,
            activation=self.activation,
            groups=self.groups,
            kernel_init=self.kernel_init,
            output_init=self.output_init,
        )


def feed_forward(
    x: jax.Array,
    features: int,
    *,
    activation: str,
    groups: Groups = DENSE,
    kernel_init: Callable = KERNEL_INIT,
    output_init: Callable | None = None,
    name: str = "ffn",
) -> jax.Array:
    """Two layers with an activation between, inside a module's `nn.compact` method; they are called name_in and name_out.

    Args:
      x: [b, l, d].
      features: between the two.
      activation: a name of `activations.ACTIVATIONS`.
      groups: of both.
      kernel_init: initializer of both, or of the first.
      output_init: of the second; None for `kernel_init`.
      name: what their names begin with.

    Returns:
      [b, l, d].
    """
    conv = partial(Conv, kernel_size=(1,), dtype=float_dtype(x))
    first = conv(
        features,
        feature_group_count=groups.ffn_in,
        kernel_init=kernel_init,
        name=f"{name}_in",
    )
    init = output_init or kernel_init
    out = conv(
        x.shape[-1],
        feature_group_count=groups.ffn_out,
        kernel_init=init,
        name=f"{name}_out",
    )
    y = first(x, whole=groups.ffn_in != groups.ffn_out)  # or one array for each group
    return out(jax.tree.map(activations.named(activation), y))


def stack(
    layers: Iterable[nn.Module],
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs layers one after the other; the same one may come again.

    Returns:
      The last layer's [b, l, d], and of the n-th layer layer<n> [b, l, d], attention<n> (probabilities) and scores<n>
      (before the softmax) [b, heads, l, l]. Of a layer that is left out there is only layer<n>, its input.
    """
    endpoints = {}
    for number, layer in enumerate(layers, 1):
        outputs = layer(x, mask, train=train)
        if not isinstance(outputs, tuple):  # the input, as `Reshaped` gives it
            endpoints[f"layer{number}"] = outputs
            continue
        x, attended = outputs
        endpoints[f"layer{number}"] = x
        endpoints[f"attention{number}"] = attended.probabilities
        endpoints[f"scores{number}"] = attended.scores
    return x, endpoints


def resized(row, **sizes: int | None):
    """A NamedTuple of sizes with those given instead of its own; None keeps them.

    Raises:
      UserError: a size that is not positive.
    """
    given = {name: size for name, size in sizes.items() if size is not None}
    for name, size in given.items():
        if size < (name != "segments"):
            raise UserError(f"{name} = {size}: should be a positive number")
    return row._replace(**given)


def layer_groups(
    groups: GroupsLike | Sequence[GroupsLike], own: Groups, layers: int
) -> tuple[Groups, ...]:
    """The groups of each layer from the ways of saying them.

    Args:
      groups: one number for all convolutions; a mapping from positions, the fields of `Groups`, to numbers, in which
        those left out keep `own`; or a sequence of these, one for each layer.
      own: the groups of positions that a mapping leaves out.
      layers: how many there are.

    Raises:
      UserError: an unknown position, no positive number, or not one for each layer.
    """
    if isinstance(groups, int | Mapping):
        return (_groups(groups, own),) * layers
    if len(groups) != layers:
        raise UserError(
            f"groups = {groups!r}: {layers} layers need as many entries, or one for all"
        )
    return tuple(_groups(g, own) for g in groups)


def _groups(given: GroupsLike, own: Groups) -> Groups:
    if isinstance(given, int):
        given = dict.fromkeys(Groups._fields, given)
    for position, number in given.items():
        registry.row(own._asdict(), position, "position in groups")
        if not isinstance(number, Integral) or number < 1:
            raise UserError(
                f"groups of {position} = {number!r}: should be a positive number"
            )
    return own._replace(**given)


def check(features: int, ffn_features: int, heads: int, groups: Iterable[Groups] = ()):
    """Checks that heads and groups divide the channels.

    Raises:
      UserError: names the first that does not.
    """
    if features % heads:
        raise UserError(f"features = {features} do not divide into heads = {heads}")
    for layer, each in enumerate(groups, 1):
        for position, number in each._asdict().items():
            widths = (features, ffn_features) if "ffn" in position else (features,)
            if any(width % number for width in widths):
                raise UserError(
                    f"layer {layer}: {' and '.join(map(str, widths))} features do not divide into"
                    f" groups of {position} = {number}"
                )
