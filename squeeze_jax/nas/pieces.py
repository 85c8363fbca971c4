"""Runs networks piece by piece, so that each piece is compiled once and serves every network that has it.

A network of a space is a `Chain`. The forward pass of a piece returns its pullback as a pytree, which holds the values that the
backward pass needs. Python chains the pieces of a network. So a step of a small network takes little time, and the
number of compilations is the number of different pieces, not of networks.
"""

import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from squeeze_jax import tree
from squeeze_jax.in_order import in_order
from squeeze_jax.methods import Passes
from squeeze_jax.nas import subnetwork
from squeeze_jax.nn.chain import Chain, Piece
from squeeze_jax.nn.norm import SHARES
from squeeze_jax.nn.placement import placements

SHOWN_EVERY = 10.0  # seconds between two lines about compilations


class Run(NamedTuple):
    """A forward pass of a network.

    Attributes:
      logits: output of the last piece.
      endpoints: {name: array} of the endpoints that were asked for.
      stats: the statistics after the pass.
      pullbacks: the `Pullback`s in order; None if the pass cannot be differentiated.
    """

    logits: Any
    endpoints: dict[str, Any]
    stats: Any
    pullbacks: list | None


class Pullback(NamedTuple):
    """The backward pass of a piece.

    Attributes:
      scope: the piece's name in the variables.
      compiled: its name in its compiled program.
      endpoints: {name in the program: name in the network} of its outputs beside the next piece's input.
      pull: gradients of the outputs → gradients of (parameters, matrices of kernels, input).
    """

    scope: str
    compiled: str
    endpoints: Mapping[str, str]
    pull: Any


class _Progress:
    """Prints now and then how many pieces were compiled, because the first steps wait for them."""

    def __init__(self):
        self._number, self._start = 0, time.monotonic()
        self._shown = self._start

    def count(self) -> None:
        """Counts a piece that is compiled next."""
        now = time.monotonic()
        if self._number and now - self._shown > SHOWN_EVERY and not jax.process_index():
            self._shown = now
            print(
                f"compiled   {self._number} pieces, {now - self._start:.0f} s since the phase began",
                flush=True,
            )
        self._number += 1


class Runner:
    """Runs and differentiates networks on slices of the largest network's variables; each piece is compiled once."""

    def __init__(self, passes: Passes, holder: Sequence[Piece] = ()):
        """Builds a runner.

        Args:
          passes: the functions of the training step.
          holder: pieces of the network that holds the weights, for placements.
        """
        self._passes = passes
        self._held = placements(holder)
        self._progress = _Progress()
        static = ("piece", "held", "first", "update", "differentiate", "endpoints")
        self._forward = in_order(jax.jit(self._run_piece, static_argnames=static))
        self._backward = in_order(jax.jit(lambda pull, cotangent: pull(cotangent)))

    def run(
        self,
        pieces: Sequence[Piece],
        params: Mapping[str, Any],
        stats: Mapping[str, Any],
        transforms: subnetwork.Transforms,
        x: Any,
        key: jax.Array,
        *,
        endpoints: Sequence[str] = (),
        update: bool = False,
        differentiate: bool = True,
    ) -> Run:
        """Runs a network in training mode.

        Args:
          pieces: of the network.
          params, stats: of the network that holds the weights, see `methods.Passes`.
          transforms: matrices of kernels, see `subnetwork.take`.
          x: inputs of the first piece.
          key: random key of the step.
          endpoints: pieces whose outputs are returned.
          update: whether the pass changes the statistics.
          differentiate: whether pullbacks are computed.
        """
        outputs, pullbacks, first = {}, [], True
        for index, piece in enumerate(pieces):
            scope = piece.scope
            name = scope if self._passes.named else _ANY
            own = matrices_of(transforms, scope, name)
            part, before = moved(params, scope, name), _part(stats, scope, name)
            named = _endpoints_of(piece, endpoints)
            x, found, after, pullback = self._forward(
                part,
                own,
                before,
                x,
                key,
                np.int32(index),
                piece=Piece(name, piece.module),
                held=self._held.get(scope),
                first=first,
                update=update,
                differentiate=differentiate and not (first and not part),
                endpoints=tuple(sorted(named)),
            )
            if update:
                stats = _with_part(stats, scope, after, name)
            first = first and not part  # no parameters so far
            outputs |= {named[k]: v for k, v in found.items()}
            if piece.name in endpoints:
                outputs.setdefault(piece.name, x)
            named = {k: named[k] for k in found}
            if pullback is not None:
                pullback = Pullback(scope, name, named, pullback)
                pullbacks.append((piece.name, pullback))
        return Run(x, outputs, stats, pullbacks if differentiate else None)

    def _run_piece(
        self,
        params,
        transforms,
        stats,
        x,
        key,
        index,
        *,
        piece,
        held,
        first,
        update,
        differentiate,
        endpoints,
    ):
        """Runs a piece; returns (output, its endpoints, its statistics or None, its pullback or None)."""
        self._progress.count()  # JAX calls the function once for each program
        module, key = Chain((piece,)), jax.random.fold_in(key, index)
        shapes = jax.eval_shape(module.init, jax.random.key(0), x)
        both = {piece.name: held} if held else {}, placements((piece,))

        def run(params, transforms, x):
            large = {"params": params, "batch_stats": stats["batch_stats"]}
            small = subnetwork.take(large, shapes, transforms, both)
            small_stats = stats | {"batch_stats": small.get("batch_stats", {})}
            y, found, after = self._passes.run(
                module, small.get("params", {}), small_stats, x, key
            )
            found = {k: found[k] for k in endpoints if k in found}
            return (y, found), (after if update else None)

        if not differentiate:
            (y, found), after = run(params, transforms, x)
            return y, found, after, None
        if first:  # its inputs need no gradients, and may be integers
            (y, found), pullback, after = jax.vjp(
                lambda p, t: run(p, t, x), params, transforms, has_aux=True
            )
        else:
            (y, found), pullback, after = jax.vjp(
                run, params, transforms, x, has_aux=True
            )
        return y, found, after, pullback

    def pull(
        self, run: Run, cotangent: Any, of_endpoints: Mapping[str, Any], sums: "Sums"
    ) -> None:
        """Adds the gradients of a network to sums.

        Args:
          run: the network's forward pass.
          cotangent: gradient of the loss with respect to the logits.
          of_endpoints: the same for endpoints, {name: gradient}.
          sums: collects the gradients.
        """
        for name, (scope, compiled, endpoints, pull) in reversed(run.pullbacks):
            if name in of_endpoints and name not in endpoints.values():
                cotangent = _add(cotangent, of_endpoints[name])
            own_endpoints = {k: of_endpoints[v] for k, v in endpoints.items()}
            part, own, *rest = self._backward(pull, (cotangent, own_endpoints))
            sums.add(
                {scope: tree.value_at(part, compiled)} if part else {},
                {_with_name(k, compiled, scope): v for k, v in own.items()},
            )
            cotangent = rest[0] if rest else None


class Sums:
    """Sums of gradients of networks that share their weights.

    Attributes:
      transforms: sums for the matrices of kernels, {layer: {"7to5": ...}}.
    """

    def __init__(self):
        """Builds empty sums."""
        self._whole, self._parts, self.transforms = None, {}, {}

    def add_whole(self, grads: Mapping[str, Any]) -> None:
        """Adds gradients with respect to all parameters."""
        self._whole = grads if self._whole is None else _add(self._whole, grads)

    def add(self, part: Mapping[str, Any], transforms: Mapping[str, Any]) -> None:
        """Adds gradients of one piece, {path: ...}, and of the matrices of its kernels."""
        for sums, new in (self._parts, part), (self.transforms, transforms):
            for name, value in new.items():
                sums[name] = _add(sums[name], value) if name in sums else value

    def total(self) -> dict[str, Any]:
        """Returns the gradients with respect to all parameters, without those of the matrices."""
        total = self._whole
        for path, part in self._parts.items():
            total = tree.with_value_at(
                total, path, _add(tree.value_at(total, path), part)
            )
        return total


def endpoints_read(passes: Passes, params, stats, batch, key) -> tuple[str, ...]:
    """Returns the endpoints that the objective reads; only their gradients have to be computed and added.

    Args:
      passes: the functions of the training step.
      params, stats, batch, key: see `methods.Passes`.
    """
    shapes = jax.eval_shape(passes.outputs, params, stats, batch, key)
    logits, endpoints, stats = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), shapes
    )

    def loss(endpoints):
        return passes.objective(logits, endpoints, batch, params, key, stats)[:2]

    program = jax.make_jaxpr(loss)(endpoints).jaxpr
    used = {id(v) for equation in program.eqns for v in equation.invars}
    used |= {id(v) for v in program.outvars}
    paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(endpoints)[0]]
    pairs = zip(paths, program.invars, strict=True)
    return tuple({path[0].key for path, variable in pairs if id(variable) in used})


_add = jax.jit(functools.partial(jax.tree.map, jnp.add))


def _endpoints_of(piece: Piece, names: Sequence[str]) -> dict[str, str]:
    """Returns {key: name} of the endpoints of a piece's `Output` that are among the names of endpoints of the network."""
    keys = getattr(piece.module, "endpoints", ())
    return {k: k + piece.number for k in keys if k + piece.number in names}


_ANY = "piece"  # the name of each piece, so that equal pieces share a compilation


def _with_name(layer: str, old: str, new: str) -> str:
    return new + layer.removeprefix(old)


def moved(arrays: Any, old: str, new: str) -> dict[str, Any]:
    """Returns the arrays of one piece under another path, without all others; {} if it has none."""
    own = tree.value_at(arrays, old)
    return tree.with_value_at({}, new, own) if own else {}


def matrices_of(
    transforms: subnetwork.Transforms, scope: str, name: str
) -> dict[str, Any]:
    """Returns the matrices of one piece's kernels under another name of the piece."""
    return {
        _with_name(layer, scope, name): matrices
        for layer, matrices in transforms.items()
        if f"{layer}/".startswith(f"{scope}/")
    }


def _part(stats, scope: str, name: str):
    """Returns the statistics of one piece under another name: its batch_stats and shares, and everything else whole."""
    extra = dict(stats["extra"])
    if SHARES in extra:
        extra[SHARES] = moved(extra[SHARES], scope, name)
    own = moved(stats["batch_stats"], scope, name)
    return stats | {"batch_stats": own, "extra": extra}


def _with_part(stats, scope: str, after, name: str):
    """Returns the statistics with those that a piece has changed, which have another name there."""
    extra, new_extra = dict(stats["extra"]), dict(after["extra"])
    if SHARES in extra:
        own = tree.value_at(new_extra.pop(SHARES, {}), name)
        extra[SHARES] = (
            tree.with_value_at(extra[SHARES], scope, own) if own else extra[SHARES]
        )
    own, batch_stats = tree.value_at(after["batch_stats"], name), stats["batch_stats"]
    if own:
        batch_stats = tree.with_value_at(batch_stats, scope, own)
    return stats | {"batch_stats": batch_stats, "extra": extra | new_extra}
