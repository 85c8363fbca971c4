"""Loads published weights into a network in one call, and recognises whose names they have.

What a load converts, leaves out or initialises is logged under the name "squeeze_jax": as warnings, which Python prints
unless a program configures logging otherwise.
"""

import logging
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from squeeze_jax import files, tree
from squeeze_jax.errors import UserError
from squeeze_jax.models import _folder, _make
from squeeze_jax.nn.reshaped import Reshaped
from squeeze_jax.weights import foreign, pretrained

_log = logging.getLogger("squeeze_jax")
# At which share of a network's layers a file is taken to have a naming; a classifier may be missing.
_ENOUGH = 0.5


def load(
    path: str | Path,
    model: nn.Module | str | None = None,
    example: Any = None,
    *,
    names: pretrained.Names | None = None,
    under: str = "",
    key: str = "",
    fresh: jax.Array | None = None,
    **options: Any,
) -> Any:
    """Loads published weights into a network.

        variables = load("squeezenet_v1_0.npz", model=models.make("squeezenet"))
        net, variables = load("mobilenet_v2.pth", model="mobilenet_v2", num_classes=7)
        net, variables = load("bert-base-uncased", task="classification", num_classes=3)
        logits, endpoints = net.apply(variables, x, train=False)

    Args:
      path: a file (.safetensors, .pth, .pt, .bin, .npz, .h5, .keras), or a folder as `transformers` saves it. Code in
        them is never run.
      model: a network; or the name of a file of `models`; None for a folder, whose config.json says it.
      example: an input of the network or its shape (b, h, w, c); None for images (1, 224, 224, 3) or for one token.
      names: whose names a file has, see `pretrained.load`; None recognises them.
      under: what stands before each name in the file, such as "backbone".
      key: which part of a PyTorch checkpoint has the weights, such as "model_ema"; "" for the first that can.
      fresh: a key from `jax.random.key` for a classifier that the file lacks or has for other classes; None for
        `jax.random.key(0)`.
      **options: of the network's `make`, such as num_classes=7; not beside a network that is already made.

    Returns:
      variables, {"params": …, "batch_stats": …} of float32, if `model` is a network; else (network, variables).

    Raises:
      UserError: the file cannot be read, its names are not recognised, or missing, unexpected or misshapen arrays, the
        first of each by name.
    """
    made = isinstance(model, nn.Module)
    if made and options:
        raise UserError(
            f"{next(iter(options))} has no effect on a network that is made: give the network's name as model, or make it so"
        )
    if fresh is None:
        fresh = jax.random.key(0)
    try:
        if files.path(path).is_dir():
            unused = {"names": names, "under": under, "key": key}
            if first := next((name for name, value in unused.items() if value), None):
                raise UserError(f"{first} has no effect on the folder {path}")
            net, variables = _of_folder(path, model, fresh, options)
        else:
            if model is None:
                raise UserError(
                    f"{path} does not say which network it is of: give model=models.make(…) or its name"
                )
            net = model if made else _make.make(model, **options)
            variables = _of_file(path, net, example, names, under, key, fresh)
    except UserError as error:
        raise UserError(_as_argument(error)) from None
    return variables if made else (net, variables)


def completed(
    net: nn.Module, loaded: Mapping[str, Any], example: Any, fresh: jax.Array
) -> dict[str, Any]:
    """Returns a network's variables from loaded ones, with initial values for those that are not loaded.

    Args:
      net: the network.
      loaded: {"params", "batch_stats"} without some of the parameters, or {name: array} of them.
      example: see `load`.
      fresh: a key from `jax.random.key`.
    """
    example, arrays = input_of(net, example), tree.flatten(dict(loaded))
    shapes = tree.flatten(dict(foreign.shapes(net, example)))
    lacking = [name for name in shapes if name not in arrays]
    if lacking:

        @jax.jit
        def init(key):
            initial = tree.flatten(dict(net.init(key, example)))
            return {name: initial[name] for name in lacking}

        arrays |= jax.tree.map(np.asarray, init(fresh))
    ordered = {name: arrays[name] for name in shapes}
    return traverse_util.unflatten_dict(ordered, sep="/")


def _of_folder(path, model, fresh, options):
    """Returns the network and variables of a folder of `transformers`."""
    stored = _folder.options(path)["name"]
    if isinstance(model, nn.Module):
        net, (variables, layers) = model, _folder.fitted(path, model, fresh)
    elif model not in (None, stored):
        raise UserError(f"{path} holds the network {stored!r}, not {model!r}")
    else:
        task = options.pop("task", None)
        net, variables, layers = _folder.loaded(path, task, fresh, options)
    if layers:
        _log.warning("%s: %s initialised anew: train it", path, ", ".join(layers))
    return net, variables


def _of_file(path, net, example, names, under, key, fresh):
    """Returns a network's variables from a file."""
    module = _module(net)
    arrays, lines = pretrained.read(path, under=under, key=key)
    if names is None:
        names, line = recognised(arrays, net, module, path)
        lines.append(line)
    elif names != pretrained.OWN and names not in pretrained.namings(module):
        pretrained.check(path, names, _called(module), module, net)
    like = foreign.shapes(net, input_of(net, example))
    variables, more = pretrained.fit(arrays, names, net, module, like, path)
    for line in map(_as_argument, lines + more):
        counters = line.endswith("counters of batches ignored")
        _log.log(logging.INFO if counters else logging.WARNING, "%s: %s", path, line)
    return completed(net, variables, example, fresh)


def _as_argument(message: object) -> str:
    """Returns a message of functions that read a config with the names of arguments instead of those of its keys."""
    return str(message).replace("config.init.", "").replace("config.model.", "")


def recognised(
    arrays: Mapping[str, Any], net: nn.Module, module: types.ModuleType, path
) -> tuple[str, str]:
    """Finds whose names arrays have: those that name the most of a network's layers.

    Args:
      arrays: {name: array}, as `pretrained.read` returns them.
      net: the network.
      module: its file.
      path: of the file, for errors.

    Returns:
      A value of `pretrained.Names`, and a line that says so.

    Raises:
      UserError: no naming has half of the network's layers, or the network computes differently from the published one.
    """
    if any(name.startswith("params/") for name in arrays):
        return pretrained.OWN, f"the names are {pretrained.OWN}'s own"
    shares, refused = {}, []
    keras = Path(path).suffix in (".h5", ".keras")
    for naming in pretrained.namings(module):
        if keras != (naming == "keras"):
            continue
        try:
            layers = getattr(module, f"{naming}_names")(net)
        except UserError as error:
            refused.append(error)
            continue
        shares[naming] = _share(layers, arrays)
    best = max(shares, key=shares.get, default=None)
    if best is not None and shares[best] >= _ENOUGH:
        return best, f"the names are recognised as those of {best}"
    if refused:
        raise refused[0]
    raise UserError(_unknown(arrays, net, module, path, shares))


def _share(layers, arrays) -> float:
    """Returns the share of a network's layers that the arrays have."""
    stored = {name.rpartition("/")[0] for name in arrays}
    stored |= {name.rpartition(".")[0] for name in arrays}
    alternatives = [(n,) if isinstance(n, str) else n for n in layers.values()]
    return sum(not stored.isdisjoint(a) for a in alternatives) / max(len(layers), 1)


def _unknown(arrays, net, module, path, shares) -> str:
    """Returns the error for names that are not recognised: a prefix that would do, or what is missing first."""
    first = next(iter(arrays), "nothing")
    prefixes = dict.fromkeys(name.partition(".")[0] for name in arrays if "." in name)
    for prefix in prefixes:
        start = f"{prefix}."
        inside = {n.removeprefix(start) for n in arrays if n.startswith(start)}
        for naming in shares:
            layers = getattr(module, f"{naming}_names")(net)
            if _share(layers, inside) >= _ENOUGH:
                return f"{path}: the names of {naming} begin with {start!r}: give under={prefix!r}"
    if not shares:
        return f"{path}: {_called(module)} has no map of names that the file has, such as {first}: rename them to squeeze_jax's own, such as params/conv1/kernel"
    best = max(shares, key=shares.get)
    layers = getattr(module, f"{best}_names")(net)
    missing = next(
        (ours, theirs)
        for ours, theirs in layers.items()
        if not _share({"": theirs}, arrays)
    )
    return (
        f"{path} is not of {_called(module)} by the names of {', '.join([*shares, pretrained.OWN])}: {missing[0]} would be"
        f" {missing[1]} in {best}'s, the file has {first}, for example: choose another model, or give names and under"
    )


def _inner(net: nn.Module) -> nn.Module:
    return net.net if isinstance(net, Reshaped) else net


def _module(net: nn.Module) -> types.ModuleType:
    """Returns the file of a network, which has its maps of names."""
    return sys.modules[type(_inner(net)).__module__]


def _called(module: types.ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


def input_of(net: nn.Module, example: Any) -> Any:
    """Returns an input of a network: zeros of the shapes of `example`, or of a default by what its file says it reads."""
    if isinstance(example, tuple) and all(isinstance(n, int) for n in example):
        return jnp.zeros(example, jnp.float32)
    if example is not None:
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), example)
    if getattr(_module(net), "INPUTS", "images") == "images":
        return jnp.zeros((1, 224, 224, 3), jnp.float32)
    choices = getattr(_inner(net), "task", "") == "choice"
    return {"tokens": jnp.zeros((1,) * (2 + choices), jnp.int32)}
