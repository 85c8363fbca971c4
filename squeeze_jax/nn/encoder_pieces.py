"""The parts of a transformer layer whose sizes and numbers of groups are elastic, as modules of a `Chain`.

Each part has at most one layer with weights, so a search compiles and measures it alone: a whole layer has half a million
choices, but each of its convolutions has few. The parts pass a dict on: "hidden" [b, l, d], "attended" [b, l] (the padding mask,
1 for real tokens), and between them "query", "key", "value" and "branch". Layers are normalised after the residual sums, as
by `encoder.Layer` without `norm_first`.
"""

from functools import partial

import flax.linen as nn
import jax

from squeeze_jax.nn import activations, encoder
from squeeze_jax.nn.attention import (
    attend,
    attend_groups,
    is_grouped,
    join_groups,
    shuffle_channels,
)
from squeeze_jax.nn.chain import Output
from squeeze_jax.nn.conv import Conv
from squeeze_jax.nn.dropout import Dropout
from squeeze_jax.nn.intercept import tap
from squeeze_jax.nn.layer_norm import LayerNorm
from squeeze_jax.nn.placement import Axis, Placement


def _conv(features: int, groups: int) -> Conv:
    init = encoder.KERNEL_INIT
    return Conv(features, (1,), feature_group_count=groups, kernel_init=init)


class Project(nn.Module):
    """A convolution of the hidden states to heads, which adds `role` ("query", "key" or "value") to the dict."""

    role: str
    features: int
    groups: int
    axis: Axis

    def setup(self):
        """Creates the convolution; its parameters are the piece's own."""
        self.conv = _conv(self.features, self.groups)
        nn.share_scope(self, self.conv)

    def __call__(self, x, *, train: bool):
        """Adds an array [b, l, heads * size], or the tuple of its groups."""
        del train
        projected = self.conv(x["hidden"], join_groups=False)
        return Output(x | {self.role: projected}, {})

    @nn.nowrap
    def placement(self) -> Placement:
        """Returns where the channels lie among those of the largest network."""
        return Placement(self.groups, None, self.axis)


class Attend(nn.Module):
    """Attention and the convolution of its result, which becomes "branch"."""

    features: int
    heads: int
    groups: int
    axis: Axis
    dropout: float

    endpoints = ("attention", "scores")

    def setup(self):
        """Creates the convolution; its parameters are the piece's own."""
        self.conv = _conv(self.features, self.groups)
        self.drop = Dropout(self.dropout)
        nn.share_scope(self, self.conv)

    def __call__(self, x, *, train: bool):
        """Replaces "query", "key" and "value" by "branch", [b, l, d]."""
        one_head = partial(
            attend,
            mask=x.get("attended"),
            drop=partial(self.drop, train=train),
            replace=partial(tap, self),
        )
        roles = ("query", "key", "value")
        attended = attend_groups(*map(x.get, roles), heads=self.heads, attend=one_head)
        context, (before, after) = attended.context, self.axis.shuffle
        if after > 1:
            context = shuffle_channels(join_groups(context), before, after)
        elif not is_grouped(context, self.groups):
            context = join_groups(context)
        others = {k: v for k, v in x.items() if k not in roles}
        endpoints = dict(attention=attended.probabilities, scores=attended.scores)
        return Output(others | {"branch": self.conv(context)}, endpoints)

    @nn.nowrap
    def placement(self) -> Placement:
        """Returns where the channels lie among those of the largest network."""
        return Placement(self.groups, self.axis, None)


class Hidden(nn.Module):
    """The first convolution of the feed-forward network and its activation; they become "branch"."""

    features: int
    groups: int
    axis: Axis
    activation: str

    def setup(self):
        """Creates the convolution; its parameters are the piece's own."""
        self.conv = _conv(self.features, self.groups)
        nn.share_scope(self, self.conv)

    def __call__(self, x, *, train: bool):
        """Adds an array [b, l, ffn], or the tuple of its groups."""
        del train
        y = self.conv(x["hidden"], join_groups=False)
        y = jax.tree.map(activations.by_name(self.activation), y)
        return Output(x | {"branch": y}, {})

    @nn.nowrap
    def placement(self) -> Placement:
        """Returns where the channels lie among those of the largest network."""
        return Placement(self.groups, None, self.axis)


class Reduce(nn.Module):
    """The second convolution of the feed-forward network, from and to "branch"."""

    features: int
    groups: int
    axis: Axis

    def setup(self):
        """Creates the convolution; its parameters are the piece's own."""
        self.conv = _conv(self.features, self.groups)
        nn.share_scope(self, self.conv)

    def __call__(self, x, *, train: bool):
        """Applies the convolution."""
        del train
        y = x["branch"]
        y = y if is_grouped(y, self.groups) else join_groups(y)
        return Output(x | {"branch": self.conv(y)}, {})

    @nn.nowrap
    def placement(self) -> Placement:
        """Returns where the channels lie among those of the largest network."""
        return Placement(self.groups, self.axis, None)


class AddNorm(nn.Module):
    """The residual sum and its normalisation: "hidden" becomes norm(hidden + dropout(branch)).

    `last`: whether the hidden states are the layer's.
    """

    dropout: float
    epsilon: float
    last: bool

    endpoints = ("layer",)

    def setup(self):
        """Creates the normalisation; its parameters are the piece's own."""
        self.norm, self.drop = LayerNorm(self.epsilon), Dropout(self.dropout)
        nn.share_scope(self, self.norm)

    def __call__(self, x, *, train: bool):
        """Adds the branch."""
        y = self.norm(x["hidden"] + self.drop(x["branch"], train=train))
        others = {k: v for k, v in x.items() if k != "branch"}
        return Output(others | {"hidden": y}, {"layer": y} if self.last else {})
