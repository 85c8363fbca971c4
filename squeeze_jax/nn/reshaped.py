"""Networks with single layers of other widths, with residual blocks left out, or with another momentum of BatchNorm.

`Conv` and `Dense` ask `features` how many output channels they have, by the path that their parameters have. `BatchNorm`
asks `norm_momentum`. `Reshaped` answers while the network inside it runs, and passes over absent blocks. It adds nothing
to the names of parameters.
"""

import contextvars
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from squeeze_jax.errors import UserError, nearest


class _Shape(NamedTuple):
    """The widths, absent blocks and momentum in force, by full paths, and the names that the running network has."""

    widths: Mapping[str, int]
    absent: frozenset[str]
    momentum: float | None
    layers: set[str]
    blocks: set[str]
    norms: set[str]


_shape = contextvars.ContextVar("shape", default=None)


def features(module: nn.Module, planned: int, *, fixed: bool = False) -> int:
    """Returns the number of output channels of a layer: its width in the enclosing `Reshaped`, else the planned one.

    Args:
      module: the layer, bound.
      planned: its output channels by the network's options.
      fixed: whether a width is an error, because something else decides on the number.

    Raises:
      UserError: another width for a layer whose number is fixed.
    """
    shape = _shape.get()
    if shape is None:
        return planned
    name = "/".join(module.path)
    shape.layers.add(name)
    width = shape.widths.get(name, planned)
    if fixed and width != planned:
        raise UserError(
            f"widths: {name} must have {planned} features, not {width}: its outputs are logits, or meet others as wide"
        )
    return width


def norm_momentum(module: nn.Module, planned: float) -> float:
    """Returns the momentum of a BatchNorm: that of the enclosing `Reshaped`, else the planned one.

    Args:
      module: the layer, bound.
      planned: its momentum by the network's options.
    """
    shape = _shape.get()
    if shape is None:
        return planned
    shape.norms.add("/".join(module.path))
    return planned if shape.momentum is None else shape.momentum


def reshaped(
    net: nn.Module,
    widths: Mapping[str, int],
    absent: Sequence[str],
    momentum: float | None = None,
) -> nn.Module:
    """Returns the network with these widths, without these blocks and with this momentum; `net` itself if none is set.

    Raises:
      UserError: a width that is not a positive integer, a block that is named twice, or a momentum outside [0, 1).
    """
    for name, width in widths.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise UserError(f"widths: {name} = {width!r} should be a positive integer")
    for name in absent:
        if list(absent).count(name) > 1:
            raise UserError(f"absent: {name} is there twice: name it once")
    if momentum is not None and not 0 <= momentum < 1:
        raise UserError(f"norm_momentum = {momentum} should lie in [0, 1)")
    if not widths and not absent and momentum is None:
        return net
    return Reshaped(net, tuple(sorted(widths.items())), tuple(absent), momentum)


class Reshaped(nn.Module):
    """A network with other widths or another momentum, or without some blocks, under the same names of parameters.

    A block can be left out if its attribute `residual` is true: its output is its input plus a branch. Attributes that
    this module does not have are those of the network.

    Attributes:
      net: the network by its options.
      widths: (path, output channels) of `Conv`s and `Dense`s.
      absent: paths of the blocks that are left out.
      momentum: of every `BatchNorm`, instead of its own.
    """

    net: nn.Module
    widths: tuple[tuple[str, int], ...] = ()
    absent: tuple[str, ...] = ()
    momentum: float | None = None

    def setup(self):
        nn.share_scope(self, self.net)

    def __call__(self, *args, **options):
        """Returns what the network returns.

        Raises:
          UserError: while parameters are initialized: a layer or a block that the network does not have, or a momentum
            for a network without BatchNorm.
        """
        shape = self._shape()
        token = _shape.set(shape)
        try:
            # The names of operations, which costs are listed by, shall not contain this module and `net`.
            with nn.override_named_call(False), nn.intercept_methods(self._run):
                outputs = self.net(*args, **options)
        finally:
            _shape.reset(token)
        if self.is_initializing():
            self._check(shape)
        return outputs

    @nn.nowrap
    def _name(self, name: str) -> str:
        return "/".join((*self.path, name))

    @nn.nowrap
    def _shape(self) -> _Shape:
        outer = _shape.get()
        widths = {self._name(name): width for name, width in self.widths}
        absent = frozenset(map(self._name, self.absent))
        if outer is None:
            return _Shape(widths, absent, self.momentum, set(), set(), set())
        return outer._replace(
            widths={**widths, **outer.widths},
            absent=absent | outer.absent,
            momentum=self.momentum if outer.momentum is None else outer.momentum,
        )

    @nn.nowrap
    def _run(self, method, args, kwargs, context) -> Any:
        """Runs a method of a module inside of the network, but returns the input of an absent block."""
        if context.module is self.net:
            with nn.override_named_call(True):
                return method(*args, **kwargs)
        if context.method_name == "__call__" and hasattr(context.module, "residual"):
            name = "/".join(context.module.path)
            shape = _shape.get()
            shape.blocks.add(name)
            if name in shape.absent:
                if context.module.residual:
                    return args[0]
                raise UserError(
                    f"absent: {name} cannot be left out: by its options its output is not its input plus a branch"
                )
        return method(*args, **kwargs)

    @nn.nowrap
    def _check(self, shape: _Shape) -> None:
        if self.momentum is not None and not shape.norms:
            raise UserError(
                f"norm_momentum = {self.momentum}: the network has no BatchNorm; leave it out"
            )
        for what, names, known in (
            ("block", map(self._name, self.absent), shape.blocks),
            ("layer", [self._name(name) for name, _ in self.widths], shape.layers),
        ):
            for name in names:
                if name not in known:
                    where = "absent" if what == "block" else "widths"
                    raise UserError(
                        f"{where}: unknown {what} {name!r}{nearest(name, known)}"
                    )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "net" not in self.__dict__:
                raise
        value = getattr(self.net, name)
        if name == "initial_carry":  # it is as wide as the layers
            return functools.partial(value, widths=dict(self.widths))
        return value
