"""The transformer layer, a function that runs a stack of layers, and checks of their sizes."""

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
    """A transformer layer: self-attention and a position-wise feed-forward network, each with a residual connection.

    Vaswani et al. 2017, arXiv 1706.03762, Figure 1:

        y = norm(x + attention(x)),  z = norm(y + ffn(y));  with `norm_first`  y = x + attention(norm(x)),  z = y + ffn(norm(y))

    Every fully connected layer is a grouped convolution with kernel 1 (SqueezeBERT, arXiv 2006.11316, section 3).

    Attributes:
      heads: number of attention heads.
      ffn_features: number of hidden channels of the feed-forward network.
      groups: numbers of groups of the six convolutions.
      activation: activation of the feed-forward network, a name in `activations.ACTIVATIONS`.
      dropout: dropout rate before the residual sums, 0 to 1; needs the rng "dropout" in training.
      attention_dropout: dropout rate of the attention probabilities, 0 to 1.
      epsilon: added to the variances of the normalisations.
      norm_first: whether to normalise the inputs of attention and feed-forward network instead of the residual sums.
      causal: whether a position attends only to itself and to earlier positions.
      kernel_init: initializer of all kernels.
      output_init: initializer of the kernels of attention's output projection and of the feed-forward network's second
        layer; None for `kernel_init`.
      shuffle, features: see `SelfAttention`.
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
        """Applies the layer.

        Args:
          x: hidden states [b, l, d].
          mask: padding mask, bool [b, l], True for real tokens; None if all are.
          train: whether to apply dropout.

        Returns:
          Hidden states [b, l, d], and the outputs of attention.
        """
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
    """Applies a position-wise feed-forward network: two 1x1 convolutions with an activation between them.

    Call it inside a module's `nn.compact` method; it creates the layers `<name>_in` and `<name>_out` there.

    Args:
      x: [b, l, d].
      features: number of hidden channels.
      activation: a name in `activations.ACTIVATIONS`.
      groups: numbers of groups; the fields ffn_in and ffn_out count.
      kernel_init: initializer of the kernels.
      output_init: initializer of the second kernel; None for `kernel_init`.
      name: prefix of the layers' names.

    Returns:
      [b, l, d].
    """
    conv = partial(Conv, kernel_size=(1,), dtype=float_dtype(x))
    layer_in = conv(
        features,
        feature_group_count=groups.ffn_in,
        kernel_init=kernel_init,
        name=f"{name}_in",
    )
    init = output_init or kernel_init
    layer_out = conv(
        x.shape[-1],
        feature_group_count=groups.ffn_out,
        kernel_init=init,
        name=f"{name}_out",
    )
    # With equal groups, y may be a tuple of one array per group.
    y = layer_in(x, join_groups=groups.ffn_in != groups.ffn_out)
    return layer_out(jax.tree.map(activations.by_name(activation), y))


def run_layers(
    layers: Iterable[nn.Module],
    x: jax.Array,
    mask: jax.Array | None = None,
    *,
    train: bool = False,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Runs layers one after the other, and collects their outputs.

    Args:
      layers: modules like `Layer`; the same module may occur several times.
      x: hidden states [b, l, d].
      mask: padding mask, bool [b, l], True for real tokens; None if all are.
      train: whether to apply dropout.

    Returns:
      The last layer's hidden states [b, l, d], and a dict of endpoints. For the n-th layer it has its hidden states
      layer<n> [b, l, d], its attention probabilities attention<n> and its attention scores before the softmax scores<n>
      [b, heads, l, l]. For a layer that `Reshaped` leaves out it has only layer<n>, the layer's input.
    """
    endpoints = {}
    for number, layer in enumerate(layers, 1):
        outputs = layer(x, mask, train=train)
        # `Reshaped` replaces the outputs of an absent layer by its input.
        if not isinstance(outputs, tuple):
            endpoints[f"layer{number}"] = outputs
            continue
        x, attended = outputs
        endpoints[f"layer{number}"] = x
        endpoints[f"attention{number}"] = attended.probabilities
        endpoints[f"scores{number}"] = attended.scores
    return x, endpoints


def with_sizes(row, **sizes: int | None):
    """Returns a NamedTuple of sizes with some of them replaced; a size of None keeps the old one.

    Raises:
      UserError: A size is not positive; only "segments" may be 0.
    """
    changes = {name: size for name, size in sizes.items() if size is not None}
    for name, size in changes.items():
        if size < (name != "segments"):
            raise UserError(f"{name} = {size}: should be a positive number")
    return row._replace(**changes)


def layer_groups(
    groups: GroupsLike | Sequence[GroupsLike], default: Groups, layers: int
) -> tuple[Groups, ...]:
    """Returns the numbers of groups of each layer, from any of the forms in which a user may give them.

    Args:
      groups: one number for all convolutions; or a mapping {field of `Groups`: number}; or a sequence of these, one per
        layer.
      default: numbers of the fields that a mapping leaves out.
      layers: number of layers.

    Raises:
      UserError: A field is unknown, a number is not positive, or a sequence does not have one entry per layer.
    """
    if isinstance(groups, int | Mapping):
        return (_groups(groups, default),) * layers
    if len(groups) != layers:
        raise UserError(
            f"groups = {groups!r}: {layers} layers need as many entries, or one for all"
        )
    return tuple(_groups(layer, default) for layer in groups)


def _groups(groups: GroupsLike, default: Groups) -> Groups:
    if isinstance(groups, int):
        groups = dict.fromkeys(Groups._fields, groups)
    for position, number in groups.items():
        registry.row(default._asdict(), position, "position in groups")
        if not isinstance(number, Integral) or number < 1:
            raise UserError(
                f"groups of {position} = {number!r}: should be a positive number"
            )
    return default._replace(**groups)


def check_divisors(
    features: int, ffn_features: int, heads: int, groups: Iterable[Groups] = ()
):
    """Raises a UserError unless the numbers of heads and groups divide the numbers of channels.

    Args:
      features: number of channels of the hidden states.
      ffn_features: number of hidden channels of the feed-forward network.
      heads: number of attention heads.
      groups: numbers of groups of each layer.
    """
    if features % heads:
        raise UserError(f"features = {features} do not divide into heads = {heads}")
    for layer, numbers in enumerate(groups, 1):
        for position, number in numbers._asdict().items():
            widths = (features, ffn_features) if "ffn" in position else (features,)
            if any(width % number for width in widths):
                raise UserError(
                    f"layer {layer}: {' and '.join(map(str, widths))} features do not divide into"
                    f" groups of {position} = {number}"
                )
