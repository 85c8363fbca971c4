"""Changes a network from outside: the widths of single layers, residual blocks that are left out, the momentum of BatchNorm.

`Conv`, `Dense` and `LSTM` call `features` to get their number of output channels, and `BatchNorm` calls `norm_momentum`. While
a network runs inside `Reshaped`, these functions return the changed values for the layer's path. `Reshaped` also skips the
blocks that are left out. The names of parameters stay the same.
"""

import contextvars
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn

from squeeze_jax.errors import UserError, nearest


class _Shape(NamedTuple):
    """The changes that apply to the running network, by full paths, and the paths of its modules that have run so far.

    Attributes:
      widths: {layer: output channels}.
      absent: blocks that are left out.
      momentum: momentum of every BatchNorm; None for their own.
      layers, blocks, norms: layers, residual blocks and BatchNorms that have run.
    """

    widths: Mapping[str, int]
    absent: frozenset[str]
    momentum: float | None
    layers: set[str]
    blocks: set[str]
    norms: set[str]


_shape = contextvars.ContextVar("shape", default=None)


def features(module: nn.Module, planned: int, *, fixed: bool = False) -> int:
    """Returns the number of output channels of a layer: its width in the enclosing `Reshaped`, or else `planned`.

    Args:
      module: the layer, bound.
      planned: number of output channels without `Reshaped`.
      fixed: whether the number must not change, because other parts of the network depend on it.

    Raises:
      UserError: The number is fixed, and the enclosing `Reshaped` has another width for this layer.
    """
    shape = _shape.get()
    if shape is None:
        return planned
    name = "/".join(module.path)
    shape.layers.add(name)
    width = shape.widths.get(name, planned)
    if fixed and width != planned:
        raise UserError(
            f"widths: {name} must have {planned} features, not {width}: its outputs are logits, or are combined with outputs of"
            " the same width"
        )
    return width


def norm_momentum(module: nn.Module, planned: float) -> float:
    """Returns the momentum of a BatchNorm: the momentum of the enclosing `Reshaped`, or else `planned`.

    Args:
      module: the layer, bound.
      planned: momentum without `Reshaped`.
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
    """Returns the network with other widths, without some blocks and with another momentum; `net` itself without changes.

    Args:
      net: the network.
      widths: {path of a layer: output channels}.
      absent: paths of the residual blocks to leave out.
      momentum: momentum of every BatchNorm; None for their own.

    Raises:
      UserError: A width is not a positive integer, a block is named twice, or the momentum is outside [0, 1).
    """
    for name, width in widths.items():
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            raise UserError(f"widths: {name} = {width!r} should be a positive integer")
    for name in absent:
        if list(absent).count(name) > 1:
            raise UserError(f"absent: {name} is named twice: name it once")
    if momentum is not None and not 0 <= momentum < 1:
        raise UserError(f"norm_momentum = {momentum} should lie in [0, 1)")
    if not widths and not absent and momentum is None:
        return net
    return Reshaped(net, tuple(sorted(widths.items())), tuple(absent), momentum)


class Reshaped(nn.Module):
    """A network with other widths, without some blocks, or with another momentum; its parameters keep their names.

    A block can be left out if its attribute `residual` is true, which means that its output is its input plus a branch. All
    attributes that this module does not have are looked up in the network.

    Attributes:
      net: the network without changes.
      widths: pairs (path, output channels) of `Conv`, `Dense` and `LSTM` layers.
      absent: paths of the blocks that are left out.
      momentum: momentum of every `BatchNorm`; None for their own.
    """

    net: nn.Module
    widths: tuple[tuple[str, int], ...] = ()
    absent: tuple[str, ...] = ()
    momentum: float | None = None

    def setup(self):
        """Creates the layers."""
        nn.share_scope(self, self.net)

    def __call__(self, *args, **options):
        """Returns the outputs of the changed network.

        Raises:
          UserError: The network does not have a layer or a block, or a momentum is set and it has no BatchNorm. This is
            checked while parameters are initialised.
        """
        shape = self._shape()
        token = _shape.set(shape)
        try:
            # Costs are listed by the names of operations, so these names must not contain this module and `net`.
            with nn.override_named_call(False), nn.intercept_methods(self._run):
                outputs = self.net(*args, **options)
        finally:
            _shape.reset(token)
        if self.is_initializing():
            self._check(shape)
        return outputs

    @nn.nowrap
    def _full_path(self, path: str) -> str:
        return "/".join((*self.path, path))

    @nn.nowrap
    def _shape(self) -> _Shape:
        """Returns the changes by this module and by those around it, which take precedence."""
        outer = _shape.get()
        widths = {self._full_path(path): width for path, width in self.widths}
        absent = frozenset(map(self._full_path, self.absent))
        if outer is None:
            return _Shape(widths, absent, self.momentum, set(), set(), set())
        return outer._replace(
            widths={**widths, **outer.widths},
            absent=absent | outer.absent,
            momentum=self.momentum if outer.momentum is None else outer.momentum,
        )

    @nn.nowrap
    def _run(self, method, args, kwargs, context) -> Any:
        """Runs a method of a module in the network; for an absent block, returns its input instead."""
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
                    f"absent: {name} cannot be left out: with these options it has no residual connection from its input to its"
                    " output"
                )
        return method(*args, **kwargs)

    @nn.nowrap
    def _check(self, shape: _Shape) -> None:
        if self.momentum is not None and not shape.norms:
            raise UserError(
                f"norm_momentum = {self.momentum}: the network has no BatchNorm; leave it out"
            )
        widened = [path for path, _ in self.widths]
        for option, kind, paths, known in (
            ("absent", "block", self.absent, shape.blocks),
            ("widths", "layer", widened, shape.layers),
        ):
            for path in map(self._full_path, paths):
                if path not in known:
                    raise UserError(
                        f"{option}: unknown {kind} {path!r}{nearest(path, known)}"
                    )

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "net" not in self.__dict__:
                raise
        value = getattr(self.net, name)
        if name == "initial_carry":  # its size depends on the widths of the layers
            return functools.partial(value, widths=dict(self.widths))
        return value
